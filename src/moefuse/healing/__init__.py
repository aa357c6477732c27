"""Healing: end-to-end distillation of a student, from a live teacher or from its cached logits."""
