"""Which tokens of a conversation the assistant said.

The checkpoint's own chat template renders the conversation. Where it marks the assistant's words
with ``{% generation %}`` that is the answer; elsewhere each turn is what rendering with it adds to
rendering without it, with the prompt for the assistant in front.
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moefuse.corpus import Document, apply_template
from moefuse.errors import UserError

ASSISTANT = "assistant"
_MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return a conversation's token ids and which of them the assistant said: (T,) int64 and bool.

    Said is what a model would have to write: the turn's words and whatever ends it, without the
    prompt that the template puts in front. Raises ``UserError`` naming the document's source where
    the template refuses the messages or does not tell whose words are whose.
    """
    encoded = apply_template(document, tokenizer)
    ids = list(encoded["input_ids"])
    if _MARKS_TURNS.search(tokenizer.get_chat_template()):
        marked = apply_template(document, tokenizer, return_assistant_tokens_mask=True)
        said_T = torch.tensor(marked["assistant_masks"], dtype=torch.bool)
    else:
        said_T = _said(document, tokenizer, ids)
    return torch.tensor(ids, dtype=torch.int64), said_T


def _said(document: Document, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Tensor:
    said_T = torch.zeros(len(ids), dtype=torch.bool)
    for number, message in enumerate(document.messages or []):
        if message["role"] == ASSISTANT:
            said_T |= _turn(document, tokenizer, ids, number)
    return said_T


def _turn(
    document: Document, tokenizer: PreTrainedTokenizerBase, ids: list[int], number: int
) -> Tensor:
    """Return which of a conversation's tokens the assistant said in message ``number``: T, bool."""
    messages = document.messages or []
    if number == 0:
        raise UserError(
            f"{document.source}: the assistant speaks first, so that its words cannot be told "
            "from the chat template's; put another message before, or mark the assistant's words "
            "in the tokenizer's chat template with {% generation %}."
        )

    def rendered(**options: Any) -> tuple[Any, Any]:
        before = apply_template(
            document, tokenizer, messages[:number], add_generation_prompt=True, **options
        )
        return before, apply_template(document, tokenizer, messages[: number + 1], **options)

    place_T = torch.arange(len(ids))
    before, after = (list(encoded["input_ids"]) for encoded in rendered())
    if _follows(before, after, ids):
        return (place_T >= len(before)) & (place_T < len(after))
    # A token may hold characters of both sides of a border: compare by characters then, and count
    # it, as Transformers does where the template marks the assistant's words.
    before, after = rendered(tokenize=False)
    whole = apply_template(document, tokenizer, tokenize=False)
    spans_T2 = _spans(whole, tokenizer, ids)
    if spans_T2 is None or not _follows(before, after, whole):
        raise UserError(
            f"{document.source}: the tokenizer's chat template renders message {number + 1} "
            "differently within the conversation and at its end, so that the assistant's words "
            "cannot be found; mark them in the template with {% generation %}, or cut the "
            "conversation into ones with a single answer each."
        )
    return (spans_T2[:, 1] > len(before)) & (spans_T2[:, 0] < len(after))


def _follows(before: Any, after: Any, whole: Any) -> bool:
    """Tell whether ``before`` is a true beginning of ``after``, and that one of ``whole``."""
    is_longer = len(before) < len(after)
    return is_longer and after[: len(before)] == before and whole[: len(after)] == after


def _spans(text: str, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Tensor | None:
    """Return where each token's characters start and end, (T, 2) int64, or None where untold."""
    if not tokenizer.is_fast:
        return None
    encoded: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    is_same = list(encoded["input_ids"]) == ids
    return torch.tensor(encoded["offset_mapping"]) if is_same else None
