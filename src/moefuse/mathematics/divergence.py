"""How far one set of predictions is from another: the losses of healing, token by token.

All take logits of any floating dtype and compute in fp32; none keeps anything. What is differentiated
is the student's side alone.

Shape suffixes: T tokens, V vocabulary, D hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(teacher_TV: Tensor, student_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``KL(p || q) = sum_v p_v (log p_v - log q_v)`` for every token: (T,) fp32, nats.

    p and q are the softmax of the teacher's and of the student's logits, both divided by
    ``temperature``; the result is multiplied by its square, so that gradients keep their size
    (Hinton, Vinyals and Dean, 2015, section 2.1).
    """
    log_p_TV = F.log_softmax(teacher_TV.float() / temperature, dim=-1)
    log_q_TV = F.log_softmax(student_TV.float() / temperature, dim=-1)
    return _divergence(log_p_TV, log_q_TV) * temperature**2


def reverse_kl(teacher_TV: Tensor, student_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``KL(q || p)`` for every token: (T,) fp32, nats; otherwise as ``forward_kl``.

    It keeps the student from what the teacher never says, where the forward one makes it cover all
    that the teacher may say (Gu et al., "MiniLLM", 2024).
    """
    log_p_TV = F.log_softmax(teacher_TV.float() / temperature, dim=-1)
    log_q_TV = F.log_softmax(student_TV.float() / temperature, dim=-1)
    return _divergence(log_q_TV, log_p_TV) * temperature**2


def cross_entropy(student_TV: Tensor, next_T: Tensor) -> Tensor:
    """Return ``-log q(next token)`` for every token: (T,) fp32, nats; ``next_T`` is int64."""
    return F.cross_entropy(student_TV.float(), next_T, reduction="none")


def hidden_distance(teacher_TD: Tensor, student_TD: Tensor) -> Tensor:
    """Return ``|t - s|^2 / mean |t|^2`` for every token: (T,) fp32.

    The mean is over the tokens given, so that layers of any size of hidden states count alike and
    a token of tiny states cannot outweigh all others.
    """
    power = teacher_TD.float().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (teacher_TD.float() - student_TD.float()).square().mean(-1) / power


def _divergence(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    p_TV = log_p_TV.exp()
    # A word that is ruled out (logit -inf) adds nothing, rather than 0 * inf.
    terms_TV = torch.where(p_TV > 0, p_TV * (log_p_TV - log_q_TV), torch.zeros_like(p_TV))
    return terms_TV.sum(-1)
