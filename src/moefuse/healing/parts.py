"""Which parameters of a student heal, and how fast.

Experts that were fused anew have far to go and take a larger rate than attention and embeddings,
which came from the teacher whole; the router, which decides which experts see what, has its own.
"""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from moefuse.config import HealConfig
from moefuse.errors import UserError
from moefuse.families import Family

CODES = re.compile(r"(latent|codebook)$|(own\..*|shared|gain)\.scale$")
"""Ends of the names of what low-bit rows are trained as."""
OF_ONE_EXPERT = re.compile(r"(delta\.[\w.]+|scale|bias)$")
"""What of a fused module every expert has for itself."""


def part_of(name: str, family: Family) -> str:
    """Return what a parameter belongs to: ``codes``, ``experts``, ``router`` or ``other``."""
    inside = re.search(rf"(?:^|\.){re.escape(family.moe_name)}\.(.*)$", name)
    if family.layer_of(name) is None or inside is None:
        return "other"
    path = inside[1]
    if path.startswith(f"{family.experts_name}."):
        return "codes" if CODES.search(path) else "experts"
    return "router" if path.startswith(f"{family.router_name}.") else "other"


def is_trained(name: str, family: Family, options: HealConfig) -> bool:
    """Say whether a parameter is trained."""
    part = part_of(name, family)
    if part == "router":
        return options.trains_router
    if options.train == "all":
        return True
    if options.train == "experts":
        return part != "other"
    return part == "experts" and OF_ONE_EXPERT.search(name) is not None


def check_trains(names: Iterable[str], family: Family, options: HealConfig) -> None:
    """Raise ``UserError`` where none of the parameters called ``names`` is trained."""
    if not any(is_trained(name, family, options) for name in names):
        raise UserError(
            f"--train {options.train} leaves nothing to train in this student, which has no "
            "deltas, scales or biases; choose --train experts or --train all."
        )


def freeze(model: nn.Module, family: Family, options: HealConfig) -> None:
    """Leave ``requires_grad`` on what is trained alone; raises ``UserError`` where nothing is."""
    named = dict(model.named_parameters())
    check_trains(named, family, options)
    for name, parameter in named.items():
        parameter.requires_grad_(is_trained(name, family, options))


def parameter_groups(
    model: nn.Module, family: Family, options: HealConfig
) -> Iterator[dict[str, object]]:
    """Yield the optimiser's groups: what is trained, by part, each at its rate.

    What is not trained is in none of them, so that no state is ever made for it.
    """
    rates = {
        "experts": options.expert_rate,
        "codes": options.code_rate,
        "router": options.router_rate,
        "other": options.rate,
    }
    for part, rate in rates.items():
        found: list[torch.nn.Parameter] = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and part_of(name, family) == part
        ]
        if found:
            yield {"params": found, "lr": rate, "weight_decay": options.weight_decay}


def route_as_when_used(model: nn.Module, family: Family) -> None:
    """Let all that routes tokens do so in training as it does in use.

    Some routers draw experts at random while they train, or jitter what they receive: they were
    balanced that way, and a student is to be healed on the routes that it will take.
    """
    for module in model.modules():
        block = getattr(module, family.moe_name, None)
        if isinstance(block, nn.Module) and hasattr(block, family.experts_name):
            for part in (block, block.get_submodule(family.router_name)):
                part.register_forward_pre_hook(_leave_training)


def _leave_training(module: nn.Module, _: object) -> None:
    module.training = False
