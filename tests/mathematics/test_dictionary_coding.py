"""Codewords for ternary sequences: exact both ways, near the entropy, the likeliest ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefuse.mathematics.dictionary_coding import (
    ENTRIES,
    LONGEST,
    PAIRS,
    ROOT,
    Dictionary,
    Encoded,
    decode,
    dictionary,
    encode,
)

SHARES = (0.34, 0.6, 0.885, 0.98)


def ternary(lines: int, width: int, zeros: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(0, 2, (lines, width), generator=generator) * 2
    code[torch.rand(lines, width, generator=generator) < zeros] = 1
    return code.to(torch.uint8)


def entropy(zeros: float) -> float:
    return -zeros * math.log2(zeros) - (1 - zeros) * math.log2((1 - zeros) / 2)


def sequence(known: Dictionary, codeword: int) -> list[int]:
    pairs = []
    while codeword != ROOT:
        pairs.insert(0, int(known.pair[codeword]))
        codeword = int(known.parent[codeword])
    return pairs


def likelihoods(known: Dictionary, zeros: float) -> np.ndarray:
    """Return every sequence's logarithm of probability, from its parent's."""
    of_code = np.log([(1 - zeros) / 2, zeros, (1 - zeros) / 2])
    of_pair = (of_code[:, None] + of_code).ravel()
    found = np.zeros(ENTRIES + 1)
    for length in range(1, known.length.max() + 1):
        these = np.flatnonzero(known.length == length)
        found[these] = found[known.parent[these]] + of_pair[known.pair[these]]
    return found[:ENTRIES]


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.3, 0.7, 0.9, 0.99, 1.0]),
    st.integers(1, 6),
    st.integers(1, 60),
)
@settings(max_examples=80, deadline=None)
def test_codes_come_back_exactly(seed: int, zeros: float, lines: int, width: int) -> None:
    codes_LI = ternary(lines, width, zeros, seed)

    assert torch.equal(decode(encode(codes_LI)), codes_LI)


@pytest.mark.parametrize("unlikely", [0, 2])
def test_what_the_dictionary_thinks_unlikely_can_be_coded_too(unlikely: int) -> None:
    codes_LI = torch.ones(300, 2000, dtype=torch.uint8)
    codes_LI[7, 100:300] = unlikely

    encoded = encode(codes_LI)

    assert encoded.zero_share == 0.999
    assert torch.equal(decode(encoded), codes_LI)


@pytest.mark.parametrize("zeros", SHARES)
def test_every_line_can_be_decoded_alone(zeros: float) -> None:
    codes_LI = ternary(9, 77, zeros)
    encoded = encode(codes_LI)

    for line, (start, stop) in enumerate(zip(encoded.offsets, encoded.offsets[1:], strict=False)):
        words = encoded.words[start:stop]
        alone = Encoded(words, torch.tensor([0, len(words)]), 77, encoded.zero_share)
        assert torch.equal(decode(alone)[0], codes_LI[line])


@pytest.mark.parametrize(
    ("zeros", "overhead"), [(0.34, 1.03), (0.6, 1.08), (0.885, 1.17), (0.98, 1.4)]
)
def test_the_stream_is_near_the_entropy(zeros: float, overhead: float) -> None:
    codes_LI = ternary(6, 20_000, zeros)

    bits = encode(codes_LI).words.nbytes * 8 / codes_LI.numel()

    assert entropy(zeros) < bits < overhead * entropy(zeros)


def test_the_size_is_that_of_the_stream() -> None:
    encoded = encode(ternary(10, 300, 0.8))

    assert encoded.words.dtype == torch.uint16
    stream, offsets = encoded.words.numpy().tobytes(), encoded.offsets.numpy().tobytes()
    assert len(offsets) == 11 * 4
    assert encoded.stored_bytes() == len(stream) + len(offsets) + 4


def test_a_long_run_of_zeros_is_one_codeword() -> None:
    encoded = encode(torch.ones(1, 2 * LONGEST, dtype=torch.uint8))

    assert encoded.words.tolist() == [encoded.words[0]]
    assert sequence(dictionary(0.999), int(encoded.words[0])) == [4] * LONGEST


@pytest.mark.parametrize("zeros", SHARES)
def test_the_dictionary_holds_the_likeliest_sequences_in_order(zeros: float) -> None:
    known = dictionary(zeros)

    likelihood = likelihoods(known, zeros)

    singles = np.flatnonzero(known.length == 1)
    longer = np.flatnonzero(known.length > 1)
    assert len(singles) == PAIRS, "every pair can be coded"
    assert (np.diff(likelihood[longer]) <= 1e-9).all(), "in order"
    of_code = np.log([(1 - zeros) / 2, zeros, (1 - zeros) / 2])
    of_pair = (of_code[:, None] + of_code).ravel()
    left_out = known.child[:ENTRIES] < 0
    left_out[known.length == LONGEST] = False
    outside = (likelihood[:, None] + of_pair)[left_out]
    assert outside.max() <= likelihood[longer].min() + 1e-9, "nothing outside is likelier"


@pytest.mark.parametrize("zeros", SHARES)
def test_the_dictionary_is_a_tree_without_doubles(zeros: float) -> None:
    known = dictionary(zeros)

    assert known.child.shape == (ENTRIES + 1, PAIRS)
    assert np.array_equal(known.child[known.parent, known.pair], np.arange(ENTRIES))
    assert int((known.child >= 0).sum()) == ENTRIES
    parents = np.append(known.length, 0)[known.parent]
    assert np.array_equal(parents + 1, known.length)
