"""Checkpoints that people's usual tools run."""
