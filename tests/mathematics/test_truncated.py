"""The divergence from a part of the teacher's logits is, on average, the exact one."""

import math

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close
from torch import Tensor

from moefuse.mathematics.truncated import TopLogits, truncate, truncated_kl

VOCABULARY = 40


def logits(tokens: int, seed: int, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(tokens, vocabulary, generator=generator)


def draws(tokens: int, count: int = 8, seed: int = 9) -> Tensor:
    return torch.rand(tokens, count, generator=torch.Generator().manual_seed(seed))


def exact_kl(teacher_TV: Tensor, student_TV: Tensor) -> Tensor:
    log_p_TV = teacher_TV.log_softmax(-1)
    return (log_p_TV.exp() * (log_p_TV - student_TV.log_softmax(-1))).sum(-1)


def many(teacher_V: Tensor, top: int, times: int = 20_000) -> TopLogits:
    """One token's distribution, drawn from many times."""
    return truncate(teacher_V.expand(times, -1), top, draws(times))


def test_what_is_kept() -> None:
    teacher_TV = logits(7, 0)
    p_TV = teacher_TV.softmax(-1)

    kept = truncate(teacher_TV, 5, draws(7))

    likeliest_TK = p_TV.topk(5).indices
    assert torch.equal(kept.index_TK, likeliest_TK.sort(-1).values)
    assert_close(kept.log_p_TK, p_TV.log().gather(-1, kept.index_TK))
    rest_T = p_TV.scatter(-1, likeliest_TK, 0.0).sum(-1)
    assert_close(kept.log_rest_T.exp(), rest_T)
    assert kept.tail_index_TM.shape == (7, 8)
    assert not (kept.tail_index_TM[:, :, None] == kept.index_TK[:, None]).any()
    assert_close(kept.tail_log_p_TM, p_TV.log().gather(-1, kept.tail_index_TM))
    assert (kept.tail_index_TM.diff(dim=-1) >= 0).all()


def test_words_are_drawn_as_often_as_they_are_likely() -> None:
    teacher_V = logits(1, 1)[0]
    kept = many(teacher_V, 5)

    share_V = torch.bincount(kept.tail_index_TM.flatten(), minlength=VOCABULARY) / (20_000 * 8)

    tail_V = teacher_V.softmax(-1).scatter(-1, kept.index_TK[0], 0.0)
    assert_close(share_V, tail_V / tail_V.sum(), tolerance=0.01)


@pytest.mark.parametrize("top", [1, 5, 30])
def test_value_and_gradient_are_exact_on_average(top: int) -> None:
    teacher_V = logits(1, 2)[0]
    student_V = logits(1, 3)[0].requires_grad_()
    kept = many(teacher_V, top)

    mean = truncated_kl(kept, student_V.expand(len(kept), -1)).mean()
    (gradient_V,) = torch.autograd.grad(mean, student_V)

    exact = exact_kl(teacher_V[None], student_V[None]).sum()
    assert float(mean.detach()) == pytest.approx(float(exact.detach()), rel=0.01)
    assert_close(gradient_V, (student_V.softmax(-1) - teacher_V.softmax(-1)).detach(), 0.01)


def test_with_all_words_kept_it_is_exact() -> None:
    teacher_TV, student_TV = logits(6, 4), logits(6, 5)

    kept = truncate(teacher_TV, VOCABULARY, draws(6))

    assert (kept.log_rest_T == -math.inf).all()
    assert_close(truncated_kl(kept, student_TV), exact_kl(teacher_TV, student_TV))


def test_the_teacher_itself_has_none() -> None:
    teacher_TV = logits(6, 4)
    kept = truncate(teacher_TV, 5, draws(6))

    assert truncated_kl(kept, teacher_TV).abs().max() < 1e-5


def test_words_ruled_out_add_nothing() -> None:
    teacher_TV = logits(6, 4)
    teacher_TV[:, 4:] = -math.inf
    student_TV = logits(6, 5).requires_grad_()

    kept = truncate(teacher_TV, 10, draws(6))
    kl_T = truncated_kl(kept, student_TV)
    kl_T.sum().backward()

    wanted_T = F.kl_div(student_TV.log_softmax(-1), teacher_TV.softmax(-1), reduction="none").sum(
        -1
    )
    assert_close(kl_T.detach(), wanted_T.detach())
    assert student_TV.grad is not None
    assert student_TV.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_any_dtype(dtype: torch.dtype) -> None:
    teacher_TV, student_TV = logits(6, 4).to(dtype), logits(6, 5).to(dtype)

    found_T = truncated_kl(truncate(teacher_TV, 5, draws(6)), student_TV)

    wanted_T = truncated_kl(truncate(teacher_TV.float(), 5, draws(6)), student_TV.float())
    assert found_T.dtype == torch.float32
    assert_close(found_T, wanted_T)


def test_tokens_are_taken_and_joined() -> None:
    teacher_TV, student_TV = logits(6, 4), logits(6, 5)
    kept = truncate(teacher_TV, 5, draws(6))

    again = TopLogits.joined([kept.rows(slice(0, 2)), kept.rows(torch.arange(2, 6))]).to("cpu")

    assert len(again) == 6
    assert torch.equal(truncated_kl(again, student_TV), truncated_kl(kept, student_TV))
