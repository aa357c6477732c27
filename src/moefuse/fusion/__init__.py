"""Bases, deltas and the plan of their sizes."""
