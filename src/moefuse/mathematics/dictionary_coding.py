"""Ternary numbers below their 1.58 bits: 16-bit codewords for the likeliest sequences.

Frantar and Alistarh, "QMoE" (2023), section 4. Where most numbers are zero, sequences of them
differ in probability by orders of magnitude. The dictionary holds the 2^16 likeliest sequences of
pairs of numbers, every number zero with the probability ``zero_share`` and otherwise of either
sign; a codeword names one of them. As every beginning of a sequence is likelier than the sequence,
the dictionary is a tree, and a line of numbers is coded by walking down as far as it goes, again
and again. ``zero_share`` alone makes the dictionary. Lines are coded each by itself.

Codes are those of ``quantization``: 0, 1, 2 for -1, 0, 1. Suffixes: L lines, I numbers of a line,
P pairs of a line, W codewords.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ENTRIES = 2**16
ROOT = ENTRIES
"""The empty sequence's place in ``Dictionary.child``; it has no codeword."""
LONGEST = 256
"""Pairs of the longest sequence. The paper stops at 14, for its GPU kernel's sake: at 0.57 bits."""
PAIRS = 9
NONZEROS = np.array([(first != 1) + (second != 1) for first in range(3) for second in range(3)])
"""How many numbers of each pair are not zero; a pair is 3 * first code + second code."""
ZERO_CODE = 1
ZERO_SHARE_BYTES = 4
"""The share of zeros is stored as one fp32 number."""


@dataclass(frozen=True)
class Dictionary:
    """Sequences by codeword, likeliest first, as a tree.

    ``child`` (ENTRIES + 1, PAIRS) is the codeword of a sequence that goes on with a pair, -1 where
    there is none; ``parent``, ``pair`` and ``length`` (ENTRIES,) are the codeword (or ROOT) of a
    sequence without its last pair, that pair, and how many pairs it has.
    """

    child: NDArray[np.int64]
    parent: NDArray[np.int64]
    pair: NDArray[np.int64]
    length: NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """A coded ternary matrix: ``words`` (W,) uint16, ``offsets`` (L + 1,) int32 where lines begin.

    ``width`` numbers make a line; ``zero_share`` made the dictionary.
    """

    words: Tensor
    offsets: Tensor
    width: int
    zero_share: float

    def stored_bytes(self) -> int:
        """Return the bytes of the stream, of its offsets and of the dictionary's one number."""
        return self.words.nbytes + self.offsets.nbytes + ZERO_SHARE_BYTES


def encode(codes_LI: Tensor) -> Encoded:
    """Code ternary ``codes_LI`` (L, I), uint8 on the CPU, line by line."""
    lines, width = codes_LI.shape
    zero_share = _share_of_zeros(codes_LI)
    child = dictionary(zero_share).child
    pair_PL = _pairs(codes_LI).T
    word_PL = np.full(pair_PL.shape, -1)
    node_L = np.full(lines, ROOT)
    for place, pair_L in enumerate(pair_PL):
        next_L = child[node_L, pair_L]
        ends_L = next_L < 0
        word_PL[place - 1, ends_L] = node_L[ends_L]
        node_L = np.where(ends_L, child[ROOT, pair_L], next_L)
    word_PL[-1:] = node_L
    word_LP = word_PL.T
    offsets = np.concatenate([[0], (word_LP >= 0).sum(1).cumsum()]).astype(np.int32)
    words = word_LP[word_LP >= 0].astype(np.uint16)
    return Encoded(torch.from_numpy(words), torch.from_numpy(offsets), width, zero_share)


def decode(encoded: Encoded) -> Tensor:
    """Return the codes (L, I), uint8, that ``encode`` was given."""
    known = dictionary(encoded.zero_share)
    node_W = encoded.words.numpy().astype(np.int64)
    # A sequence is read from its end: codeword, last pair, codeword without it, and so on.
    place_W = known.length[node_W].cumsum() - 1
    pairs = np.empty(int(known.length[node_W].sum()), dtype=np.int64)
    while len(node_W):
        pairs[place_W] = known.pair[node_W]
        node_W, place_W = known.parent[node_W], place_W - 1
        place_W, node_W = place_W[node_W != ROOT], node_W[node_W != ROOT]
    codes = np.stack(np.divmod(pairs, 3), -1).astype(np.uint8)
    codes_LI = codes.reshape(len(encoded.offsets) - 1, -1)[:, : encoded.width]
    return torch.from_numpy(np.ascontiguousarray(codes_LI))


@lru_cache(maxsize=16)
def dictionary(zero_share: float) -> Dictionary:
    """Return the dictionary for numbers that are zero with probability ``zero_share``."""
    first_NK, kept_NK = _kept_sequences(zero_share)
    parents, pairs, lengths, kinds = [], [], [], []
    node, nonzeros, made = np.array([-1]), np.array([0]), 0
    for length in range(1, LONGEST + 1):
        count_K = kept_NK[length]
        child_nonzeros = (nonzeros[:, None] + NONZEROS).reshape(-1)
        chosen = _first_of_each(child_nonzeros, count_K)
        if not len(chosen):
            break
        parents.append(node[chosen // PAIRS])
        pairs.append(chosen % PAIRS)
        nonzeros = child_nonzeros[chosen]
        lengths.append(np.full(len(chosen), length))
        kinds.append(first_NK[length, nonzeros])
        node = np.arange(made, made + len(chosen))
        made += len(chosen)
    likeliest_first = np.concatenate(kinds).argsort(kind="stable")
    return _as_tree(
        np.concatenate(parents), np.concatenate(pairs), np.concatenate(lengths), likeliest_first
    )


def _kept_sequences(zero_share: float) -> tuple[NDArray, NDArray]:
    """Say which sequences are among the likeliest, by pairs N and by numbers that are not zero K.

    Returns tables (LONGEST + 1, 2 * LONGEST + 1): the place of the first sequence of a kind when
    sequences are sorted by probability, and how many of the kind are kept. Single pairs are always
    kept, so that everything can be coded.
    """
    count_NK = np.zeros((LONGEST + 1, 2 * LONGEST + 1))
    count_NK[0, 0] = 1
    for pairs in range(1, LONGEST + 1):
        # (1 + 2x)^2: a pair has no, one or two numbers that are not zero, of either sign.
        count_NK[pairs] = np.convolve(count_NK[pairs - 1], [1, 4, 4])[: 2 * LONGEST + 1]
    pairs_NK, nonzeros_NK = np.indices(count_NK.shape)
    likelihood_NK = (2 * pairs_NK - nonzeros_NK) * np.log(zero_share)
    likelihood_NK = likelihood_NK + nonzeros_NK * np.log((1 - zero_share) / 2)
    likelihood_NK[1] = np.inf
    count_NK[0] = 0
    order = np.lexsort((nonzeros_NK.ravel(), pairs_NK.ravel(), -likelihood_NK.ravel()))
    first = np.empty(count_NK.size)
    first[order] = np.concatenate([[0], count_NK.ravel()[order].cumsum()[:-1]])
    first_NK = np.minimum(first.reshape(count_NK.shape), ENTRIES).astype(np.int64)
    kept_NK = np.clip(ENTRIES - first_NK, 0, count_NK).astype(np.int64)
    return first_NK, kept_NK


def _first_of_each(kind: NDArray, count: NDArray) -> NDArray:
    """Return, in order, the places of the first ``count[k]`` elements of every kind k."""
    kept = [np.flatnonzero(kind == k)[: count[k]] for k in np.unique(kind) if count[k]]
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, dtype=np.int64)


def _as_tree(parent: NDArray, pair: NDArray, length: NDArray, order: NDArray) -> Dictionary:
    """Number sequences anew in ``order``; ``parent`` is -1 for the empty sequence."""
    codeword = np.empty(ENTRIES + 1, dtype=np.int64)
    codeword[order] = np.arange(ENTRIES)
    codeword[-1] = ROOT
    parent, pair, length = codeword[parent][order], pair[order], length[order]
    child = np.full((ENTRIES + 1, PAIRS), -1)
    child[parent, pair] = np.arange(ENTRIES)
    return Dictionary(child, parent, pair, length)


def _share_of_zeros(codes_LI: Tensor) -> float:
    """Return the share to a thousandth, and never one that makes some number impossible."""
    share = float((codes_LI == ZERO_CODE).double().mean())
    return min(max(round(share, 3), 0.001), 0.999)


def _pairs(codes_LI: Tensor) -> NDArray:
    """Return pairs (L, P), the last number of an odd line being paired with a zero."""
    odd = codes_LI.shape[1] % 2
    codes = torch.nn.functional.pad(codes_LI, (0, odd), value=ZERO_CODE).numpy().astype(np.int64)
    return 3 * codes[:, 0::2] + codes[:, 1::2]
