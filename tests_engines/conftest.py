"""Fixtures of the engines' tests."""

from served import student

__all__ = ["student"]
