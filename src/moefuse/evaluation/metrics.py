"""What two sets of logits tell about two models, token by token.

Logits may come in any floating dtype. They are turned into fp32 a few tokens at a time: with a
vocabulary of 100,000 the fp32 copy of one batch would otherwise dwarf the model.

T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_NUMBERS = 1 << 24
"""How many logits are held in fp32 at once (64 MiB of them)."""


def token_losses(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Return ``-log softmax(logits_t)[label_t]`` for every token: T, fp32, nats.

    ``labels_T`` (int64) is the token that each row of ``logits_TV`` should predict.
    """

    def losses(chunk: slice) -> Tensor:
        return F.cross_entropy(logits_TV[chunk].float(), labels_T[chunk], reduction="none")

    return _in_chunks(losses, logits_TV)


def kl_per_token(teacher_TV: Tensor, student_TV: Tensor) -> Tensor:
    """Return ``KL(p || q) = sum_v p_v (log p_v - log q_v)`` for every token: T, fp32, nats.

    p is the softmax of the teacher's logits and q that of the student's.
    """

    def divergence(chunk: slice) -> Tensor:
        log_p_TV = F.log_softmax(teacher_TV[chunk].float(), dim=-1)
        log_q_TV = F.log_softmax(student_TV[chunk].float(), dim=-1)
        p_TV = log_p_TV.exp()
        # A word that the teacher rules out (logit -inf) adds nothing, rather than 0 * inf.
        terms_TV = (p_TV * (log_p_TV - log_q_TV)).masked_fill(p_TV == 0, 0.0)
        return terms_TV.sum(dim=-1).clamp_min(0.0)

    return _in_chunks(divergence, teacher_TV)


def agreement_per_token(teacher_TV: Tensor, student_TV: Tensor) -> Tensor:
    """Return whether both models would choose the same next token: T, bool."""
    return teacher_TV.argmax(dim=-1) == student_TV.argmax(dim=-1)


def _in_chunks(compute: Callable[[slice], Tensor], logits_TV: Tensor) -> Tensor:
    chunks = [compute(chunk) for chunk in _chunks(*logits_TV.shape)]
    return torch.cat(chunks) if chunks else logits_TV.new_zeros(0, dtype=torch.float32)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, CHUNK_NUMBERS // vocabulary)
    return (slice(start, start + step) for start in range(0, tokens, step))


def bootstrap_interval(
    sum_per_document: Sequence[float],
    tokens_per_document: Sequence[int],
    seed: int,
    level: float = 0.95,
    resamples: int = 1000,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a token-weighted mean.

    The mean is ``sum(sum_per_document) / sum(tokens_per_document)``. Whole documents are drawn
    with replacement, because tokens of one document resemble each other and would make the
    interval too narrow. The same seed gives the same interval.
    """
    sums_N = np.asarray(sum_per_document, dtype=np.float64)
    tokens_N = np.asarray(tokens_per_document, dtype=np.float64)
    generator = np.random.default_rng(seed)
    even_N = np.full(len(sums_N), 1.0 / len(sums_N))
    means = []
    for _ in range(resamples):
        drawn_N = generator.multinomial(len(sums_N), even_N)
        means.append((drawn_N @ sums_N) / (drawn_N @ tokens_N))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
