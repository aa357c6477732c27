"""Layer-by-layer distillation."""
