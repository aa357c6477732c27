"""The losses of healing against the formulas, written out in fp64, and their gradients."""

import math

import pytest
import torch
from numeric import assert_close
from torch import Tensor

from moefuse.mathematics.divergence import (
    cross_entropy,
    forward_kl,
    hidden_distance,
    reverse_kl,
)


def logits(seed: int, tokens: int = 5, vocabulary: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(tokens, vocabulary, generator=generator)


def naive_kl(p_logits_TV: Tensor, q_logits_TV: Tensor, temperature: float) -> Tensor:
    """KL(p || q), one word at a time."""
    totals = []
    for p_logits_V, q_logits_V in zip(p_logits_TV.double(), q_logits_TV.double(), strict=True):
        p_V, q_V = (p_logits_V / temperature).exp(), (q_logits_V / temperature).exp()
        pairs = zip(p_V / p_V.sum(), q_V / q_V.sum(), strict=True)
        totals.append(torch.stack([p * (p / q).log() for p, q in pairs]).sum())
    return temperature**2 * torch.stack(totals)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize(("loss", "turned"), [(forward_kl, False), (reverse_kl, True)])
def test_divergences_are_their_formulas(loss, turned: bool, temperature: float) -> None:
    teacher_TV, student_TV = logits(0), logits(1).requires_grad_()
    twin_TV = student_TV.detach().double().requires_grad_()
    pair = (twin_TV, teacher_TV) if turned else (teacher_TV, twin_TV)

    found_T, wanted_T = loss(teacher_TV, student_TV, temperature), naive_kl(*pair, temperature)

    assert found_T.dtype == torch.float32
    assert_close(found_T, wanted_T.float())
    found_T.sum().backward()
    wanted_T.sum().backward()
    assert student_TV.grad is not None
    assert twin_TV.grad is not None
    assert_close(student_TV.grad, twin_TV.grad.float())


def test_gradients_keep_their_size_at_high_temperature() -> None:
    """The limit is half the squared distance of centred logits, whatever the temperature."""
    teacher_TV, student_TV = logits(0), logits(1)
    difference_TV = teacher_TV - student_TV
    difference_TV = difference_TV - difference_TV.mean(-1, keepdim=True)
    limit_T = difference_TV.square().mean(-1) / 2
    for loss in (forward_kl, reverse_kl):
        assert_close(loss(teacher_TV.double(), student_TV, 300.0), limit_T, tolerance=0.05)


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl])
def test_the_same_predictions_are_no_distance_apart(loss) -> None:
    same_TV = logits(2)
    assert loss(same_TV, same_TV + 7).abs().max() < 1e-6


def test_words_that_are_ruled_out_add_nothing() -> None:
    teacher_TV, student_TV = logits(0), logits(1).requires_grad_()
    teacher_TV[:, 3] = -math.inf
    found_T = forward_kl(teacher_TV, student_TV)
    kept = [word for word in range(11) if word != 3]
    p_TV = teacher_TV[:, kept].softmax(-1)
    wanted_T = (p_TV * (p_TV.log() - student_TV.log_softmax(-1)[:, kept])).sum(-1)
    assert_close(found_T, wanted_T)
    found_T.sum().backward()
    assert student_TV.grad is not None
    assert torch.isfinite(student_TV.grad).all()


def test_low_precision_logits_are_computed_in_fp32() -> None:
    teacher_TV, student_TV = logits(0).bfloat16(), logits(1).bfloat16()
    for loss in (forward_kl, reverse_kl):
        assert_close(loss(teacher_TV, student_TV), loss(teacher_TV.float(), student_TV.float()))


def test_cross_entropy_is_minus_the_log_of_the_next_words_share() -> None:
    student_TV, next_T = logits(1), torch.tensor([0, 10, 3, 3, 7])
    wanted = [-student_TV[t].softmax(-1)[word].log() for t, word in enumerate(next_T.tolist())]
    assert_close(cross_entropy(student_TV, next_T), torch.stack(wanted))


def test_hidden_distance_is_relative_to_the_teachers_power() -> None:
    teacher_TD, student_TD = logits(3), logits(4)
    wanted = [
        sum((t - s) ** 2 for t, s in zip(t_D, s_D, strict=True)) / 11
        for t_D, s_D in zip(teacher_TD, student_TD, strict=True)
    ]
    power = teacher_TD.square().mean()
    assert_close(hidden_distance(teacher_TD, student_TD), torch.stack(wanted) / power)
    scaled = hidden_distance(1000 * teacher_TD, 1000 * student_TD)
    assert_close(scaled, hidden_distance(teacher_TD, student_TD))
    assert hidden_distance(torch.zeros(2, 3), torch.zeros(2, 3)).sum() == 0
