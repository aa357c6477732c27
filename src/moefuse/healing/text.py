"""Text to heal on, packed: rows of one length, each holding pieces of several documents.

A piece is a document, or what fits of it in a row. Pieces share a row without seeing each other:
positions start again with every piece, and from that Transformers makes a mask in which a token
attends to its own piece alone, as long as it is given ``position_ids``, no ``attention_mask`` and
``use_cache=False``. The alternative, documents run together, wastes no token of a row (this wastes
its padding, usually few percent) but lets a token attend to what has nothing to do with it.

Families whose pieces cannot share a row (``Family.one_piece_a_row``: linear attention keeps a state
from token to token whatever the positions say) get one piece a row, and more padding. It comes
behind the text, where nothing sees it.

Shape suffixes: N rows, S tokens in a row, T tokens of a document.
"""

import bisect
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from moefuse import artifacts
from moefuse.corpus import Document, check_enough, text_ids
from moefuse.errors import UserError
from moefuse.healing.chat import render

PADDING = 0
"""What fills a row's end. Any token does: nothing attends to it and it never counts."""


@dataclass(frozen=True)
class PackedText:
    """Rows of tokens, what each token's position is and which of them predict something."""

    ids_NS: Tensor
    """Token ids, int32."""
    position_NS: Tensor
    """Positions, int32, that start again at 0 with every piece, and with a row's padding."""
    counted_NS: Tensor
    """Whether the prediction made at a token (of the next one) counts, bool: in text at all tokens
    but a piece's last, in conversations where the next token is the assistant's."""

    @property
    def tokens(self) -> int:
        """How many predictions count."""
        return int(self.counted_NS.sum())

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.ids_NS)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that tell this packed text from others."""
        parts = [
            hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
            for tensor in (self.ids_NS, self.position_NS, self.counted_NS)
        ]
        return artifacts.fingerprint([list(self.ids_NS.shape), parts])

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors for an artifact; they are the arguments to make it anew."""
        return dict(vars(self))


class PackedRows(Dataset):
    """A packed text as a data set: one item a row, keys ``input_ids``, ``position_ids``,
    ``counted`` (each (S,); int64, int64, bool) and ``row``, its number (int64 scalar)."""

    def __init__(self, text: PackedText) -> None:
        self.text = text

    def __len__(self) -> int:
        return self.text.rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.text.ids_NS[row].long(),
            "position_ids": self.text.position_NS[row].long(),
            "counted": self.text.counted_NS[row],
            "row": torch.tensor(row),
        }


class _Piece(NamedTuple):
    """Consecutive tokens of one document and whose prediction counts: (T,) int64 and bool."""

    ids_T: Tensor
    counted_T: Tensor


def pack(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    tokens: int,
    seed: int,
    apart: bool = False,
) -> PackedText:
    """Pack at most ``tokens`` tokens of ``documents`` into rows of ``sequence_length``.

    Documents are taken in an order drawn from ``seed``, so that fewer tokens are a sample of all of
    them, and the pieces they are cut into are shuffled again; documents that hold fewer tokens are
    all used, once. A piece in which nothing counts (a lone token, a conversation's turn that is not
    the assistant's) is left out. ``apart`` gives every piece a row of its own. The same arguments
    give the same rows.

    Raises ``UserError`` where nothing is left to learn from, and for conversations that the
    tokenizer's chat template cannot render or tell apart.
    """
    if sequence_length < 2:
        raise UserError(f"A sequence length of {sequence_length} predicts nothing; give 2 or more.")
    drawn = random.Random(seed)
    order = list(documents)
    drawn.shuffle(order)
    pieces = list(_pieces(order, tokenizer, sequence_length, tokens))
    check_enough(documents, sum(len(piece.ids_T) for piece in pieces), 2)
    drawn.shuffle(pieces)
    lengths = [len(piece.ids_T) for piece in pieces]
    rows = [[n] for n in range(len(pieces))] if apart else _arrange(lengths, sequence_length)
    return _fill(rows, pieces, sequence_length)


def _pieces(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    tokens: int,
) -> Iterator[_Piece]:
    left = tokens
    for document in documents:
        if left < 2:
            return
        ids_T, counts_T = _tokens(document, tokenizer, left)
        for part_T, count_T in zip(
            ids_T[:left].split(sequence_length), counts_T[:left].split(sequence_length), strict=True
        ):
            # What a token predicts is the next one of its own piece.
            counted_T = torch.cat([count_T[1:], torch.zeros(1, dtype=torch.bool)])
            if counted_T.any():
                yield _Piece(part_T, counted_T)
                left -= len(part_T)


def _tokens(
    document: Document, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[Tensor, Tensor]:
    """Return a document's token ids and which of them are worth predicting: (T,) int64 and bool."""
    if document.text is None:
        return render(document, tokenizer)
    ids_T = torch.tensor(text_ids(document.text, tokenizer, limit), dtype=torch.int64)
    return ids_T, torch.ones(len(ids_T), dtype=torch.bool)


def _arrange(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Put pieces into rows of ``room`` tokens: each where it leaves the least room, in order."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []
    for piece, length in enumerate(lengths):
        best = bisect.bisect_left(open_rows, (length, 0))
        if best == len(open_rows):
            left, row = room, len(rows)
            rows.append([])
        else:
            left, row = open_rows.pop(best)
        rows[row].append(piece)
        if left > length:
            bisect.insort(open_rows, (left - length, row))
    return rows


def _fill(
    rows: Sequence[Sequence[int]], pieces: Sequence[_Piece], sequence_length: int
) -> PackedText:
    shape = (len(rows), sequence_length)
    ids_NS = torch.full(shape, PADDING, dtype=torch.int32)
    position_NS = torch.empty(shape, dtype=torch.int32)
    counted_NS = torch.zeros(shape, dtype=torch.bool)
    for row, numbers in enumerate(rows):
        start = 0
        for piece in (pieces[number] for number in numbers):
            end = start + len(piece.ids_T)
            ids_NS[row, start:end] = piece.ids_T
            position_NS[row, start:end] = torch.arange(end - start)
            counted_NS[row, start:end] = piece.counted_T
            start = end
        position_NS[row, start:] = torch.arange(sequence_length - start)
    return PackedText(ids_NS, position_NS, counted_NS)
