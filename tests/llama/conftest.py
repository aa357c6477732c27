"""Fixtures of llama.cpp's tests."""

from files import tokenizer

__all__ = ["tokenizer"]
