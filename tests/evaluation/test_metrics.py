import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefuse.evaluation import metrics
from moefuse.evaluation.metrics import (
    agreement_per_token,
    bootstrap_interval,
    kl_per_token,
    token_losses,
)

SHAPES = st.tuples(st.integers(0, 9), st.integers(2, 17), st.integers(0, 1000))


def logits(shape: tuple[int, int, int], *, scale: float = 3.0, offset: int = 0) -> torch.Tensor:
    tokens, words, seed = shape
    generator = torch.Generator().manual_seed(seed + offset)
    return scale * torch.randn(tokens, words, generator=generator)


def log_softmax(x_TV: torch.Tensor) -> np.ndarray:
    x = x_TV.double().numpy()
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@given(SHAPES, st.integers(1, 40))
def test_losses_and_divergences_are_the_formulas(
    shape: tuple[int, int, int], chunk_numbers: int
) -> None:
    teacher, student = logits(shape), logits(shape, offset=1)
    labels = torch.arange(shape[0]) % shape[1]
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    losses = -log_q[np.arange(shape[0]), labels.numpy()]
    divergences = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "CHUNK_NUMBERS", chunk_numbers)
        found = token_losses(student, labels), kl_per_token(teacher, student)
    assert found[0].dtype == found[1].dtype == torch.float32
    np.testing.assert_allclose(found[0].numpy(), losses, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1].numpy(), divergences, rtol=1e-4, atol=2e-6)
    same = teacher.numpy().argmax(axis=-1) == student.numpy().argmax(axis=-1)
    assert agreement_per_token(teacher, student).tolist() == same.tolist()


@given(SHAPES)
def test_a_model_never_differs_from_itself(shape: tuple[int, int, int]) -> None:
    own = logits(shape, scale=30.0).bfloat16()
    assert kl_per_token(own, own).eq(0).all()
    assert agreement_per_token(own, own).all()


def test_words_that_the_teacher_rules_out_add_nothing() -> None:
    teacher = torch.tensor([[1.0, 2.0, -math.inf]])
    assert kl_per_token(teacher, teacher).tolist() == [0.0]
    student = torch.tensor([[1.0, 2.0, 3.0]])
    log_q = log_softmax(student)[0, :2]
    p = np.exp(log_softmax(teacher[:, :2])[0])
    expected = float((p * (np.log(p) - log_q)).sum())
    assert kl_per_token(teacher, student).item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_is_only_read_not_computed_in() -> None:
    teacher, student = logits((50, 300, 0)).bfloat16(), logits((50, 300, 1)).bfloat16()
    found = kl_per_token(teacher, student)
    assert torch.equal(found, kl_per_token(teacher.float(), student.float()))


def test_no_fp32_copy_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK_NUMBERS", 8 * 50)
    sizes: list[int] = []
    real = torch.Tensor.float

    def spy(self: torch.Tensor, *args: Any) -> torch.Tensor:
        sizes.append(self.numel())
        return real(self, *args)

    monkeypatch.setattr(torch.Tensor, "float", spy)
    both = torch.zeros(100, 50, dtype=torch.bfloat16)
    kl_per_token(both, both)
    token_losses(both, torch.zeros(100, dtype=torch.int64))
    assert max(sizes) == 8 * 50


# The bootstrap

DOCUMENTS = st.lists(st.tuples(st.floats(0, 50), st.integers(1, 400)), min_size=1, max_size=40)


@settings(max_examples=30)
@given(DOCUMENTS, st.integers(0, 5))
def test_an_interval_lies_within_the_documents_means(
    documents: list[tuple[float, int]], seed: int
) -> None:
    sums, tokens = zip(*documents, strict=True)
    low, high = bootstrap_interval(sums, tokens, seed, resamples=50)
    means = [total / count for total, count in documents]
    assert min(means) - 1e-9 <= low <= high <= max(means) + 1e-9
    assert (low, high) == bootstrap_interval(sums, tokens, seed, resamples=50)


def documents(count: int) -> tuple[list[float], list[int]]:
    generator = np.random.default_rng(count)
    tokens = generator.integers(50, 200, count)
    return list(generator.gamma(2.0, 0.5, count) * tokens), tokens.tolist()


def test_an_interval_covers_the_mean_and_shrinks_with_documents() -> None:
    widths = []
    for count in (10, 100, 1000):
        sums, tokens = documents(count)
        low, high = bootstrap_interval(sums, tokens, 0)
        assert low < sum(sums) / sum(tokens) < high
        widths.append(high - low)
    assert widths[0] > widths[1] > 2 * widths[2]


def test_an_interval_is_near_the_normal_one() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(5.0, 1.0, 400)
    low, high = bootstrap_interval((100 * values).tolist(), [100] * 400, 0, resamples=5000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_a_higher_level_is_wider() -> None:
    sums, tokens = documents(50)
    narrow, wide = (bootstrap_interval(sums, tokens, 0, level=level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
