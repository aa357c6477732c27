"""Fixtures of the engines' tests."""

from engines import plugin
from served import expected, student

__all__ = ["expected", "plugin", "student"]
