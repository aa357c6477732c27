"""What all tests that run llama.cpp share; they are no part of the usual suite."""

import pytest
from engine import cutting_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that cuts as GPT-2 does."""
    return cutting_tokenizer(("bytes",))
