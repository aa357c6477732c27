"""A student with rounded bases learns to predict what it predicted before they were rounded.

Layer by layer what learns makes up for a part of what rounding loses; asked for the model's
predictions instead, the same numbers make up for more than half (docs/research.md, section 17). The
whole model is in memory, twice.

Shape suffixes: N sequences at once, S positions of one, V words.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moefuse.config import DistillConfig
from moefuse.distillation.loop import learning_rate_factor
from moefuse.mathematics.divergence import forward_kl

SEQUENCES = 16
"""How many sequences a step sees. Roundings, which are many, learn chance from fewer."""
TOKENS_AT_ONCE = 2048
"""About how many tokens pass through both models at once."""


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
    evaluation mode; ``sequences`` are token ids (S,) each, all of one length. Returns the
    parameters as they were learnt. The loss is the mean over tokens of KL(before || after).
    """
    after.requires_grad_(False)
    learning = {name: after.get_parameter(name).requires_grad_(True) for name in rates}
    groups = [{"params": [parameter], "lr": rates[name]} for name, parameter in learning.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, options.steps, options.warmup)
    )
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, TOKENS_AT_ONCE // len(sequences[0]))
    for _ in progress(range(options.steps)):
        chosen = torch.randint(len(sequences), (SEQUENCES,), generator=generator)
        tokens = SEQUENCES * len(sequences[0])
        for part in chosen.split(at_once):
            ids_NS = torch.stack([sequences[number] for number in part.tolist()])
            with torch.no_grad():
                before_NSV = before(ids_NS, use_cache=False).logits
            after_NSV = after(ids_NS, use_cache=False).logits
            lost = forward_kl(before_NSV.flatten(0, 1), after_NSV.flatten(0, 1)).sum()
            (lost / tokens).backward()
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
