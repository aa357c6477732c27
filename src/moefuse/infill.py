"""The special tokens by which models learn to fill in the middle of a text."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moefuse.errors import UserError


@dataclass(frozen=True)
class InfillMarkers:
    """The special tokens around a prefix and a suffix, in the order of the prompt."""

    before_prefix: str
    before_suffix: str
    after_suffix: str

    def prompt(self, prefix: str, suffix: str) -> str:
        """Return what the model is given; it goes on with the middle."""
        return f"{self.before_prefix}{prefix}{self.before_suffix}{suffix}{self.after_suffix}"

    @property
    def tokens(self) -> tuple[str, str, str]:
        """All three, in order."""
        return self.before_prefix, self.before_suffix, self.after_suffix


INFILL_STYLES = (
    InfillMarkers("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001  DeepSeek's bars
    InfillMarkers("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    InfillMarkers("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    InfillMarkers("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
)


def infill_markers(tokenizer: PreTrainedTokenizerBase) -> InfillMarkers:
    """Return the markers that the tokenizer knows; raises ``UserError`` where it knows none."""
    vocabulary = tokenizer.get_vocab()
    for style in INFILL_STYLES:
        if all(token in vocabulary for token in style.tokens):
            return style
    raise UserError(
        "The tokenizer has no tokens for filling in the middle, so the model never learnt it; "
        "use --prompt instead."
    )
