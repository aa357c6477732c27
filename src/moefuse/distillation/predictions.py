"""A student with rounded bases learns to predict what it predicted before they were rounded.

Layer by layer a delta makes up for little of what rounding loses: it has few numbers, and errors
are as many as a base has. Asked for the model's predictions instead, the same few numbers, and the
scales of the codes, make up for more than half (docs/research.md, section 17). The whole model is
in memory, twice.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moefuse.config import DistillConfig
from moefuse.distillation.loop import learning_rate_factor
from moefuse.mathematics.divergence import forward_kl

SEQUENCES = 4
"""How many sequences a step sees, one after another."""


def learn_predictions(
    before: Any,
    after: Any,
    rates: Mapping[str, float],
    sequences: Sequence[Tensor],
    options: DistillConfig,
    *,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, Tensor]:
    """Train parameters of the model ``after`` to predict what ``before`` predicts.

    ``rates`` are the learning rates of those that learn, by name. Both models in fp32 and in
    evaluation mode; ``sequences`` are token ids (S,) each. Returns the parameters as they were
    learnt. The loss is the mean over tokens of KL(before || after).
    """
    after.requires_grad_(False)
    learning = {name: after.get_parameter(name).requires_grad_(True) for name in rates}
    groups = [{"params": [parameter], "lr": rates[name]} for name, parameter in learning.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, options.steps, options.warmup)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in progress(range(options.steps)):
        chosen = torch.randint(len(sequences), (SEQUENCES,), generator=generator).tolist()
        tokens = sum(len(sequences[number]) for number in chosen)
        for number in chosen:
            ids_1S = sequences[number][None]
            with torch.no_grad():
                before_SV = before(ids_1S, use_cache=False).logits[0]
            after_SV = after(ids_1S, use_cache=False).logits[0]
            (forward_kl(before_SV, after_SV).sum() / tokens).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: parameter.detach() for name, parameter in learning.items()}


@torch.no_grad()
def divergence(before: Any, after: Any, sequences: Sequence[Tensor]) -> float:
    """Return the mean over tokens of KL(before || after), nats, on token ids (S,) each."""
    total, tokens = 0.0, 0
    for ids_S in sequences:
        logits = [model(ids_S[None], use_cache=False).logits[0] for model in (before, after)]
        total += float(forward_kl(*logits).sum())
        tokens += len(ids_S)
    return total / tokens
