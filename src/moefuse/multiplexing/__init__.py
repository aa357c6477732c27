"""Experts by the recipe of the checkpoints published in 2025: as a form to fuse to, and as rivals.

``student`` is what it makes, ``recipe`` how, ``soup`` and ``halving`` are two of its variants.
"""
