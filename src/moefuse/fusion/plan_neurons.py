"""Plan neuron experts: from bytes to how many neurons of every layer have how many bits.

Before calibration the plan is a forecast with typical energies; after it, ``settle`` chooses for
the energies that were measured, over all layers at once, and counts true bytes on the modules.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor

from moefuse.config import SizeConfig
from moefuse.families import MoeShape
from moefuse.fusion.allocate import FULL, LOW_BITS, allocate
from moefuse.sizes import LayerPlan, layer_bytes

LEAST_BITS = 0.05
"""Bits per number of the teacher's experts below which a budget is refused."""
SHARED_BELOW_BITS = 0.75
"""Budget, in bits per number, below which low-bit students have shared neurons: they won there."""
SHARED_BITS, GAIN_BITS = "2", "4"
ENERGY_SPREAD = 1.6
"""Standard deviation of the logarithm of neurons' energies; about what trained teachers show."""
TYPICAL_NEURONS = 4096


def uses_neurons(size: SizeConfig) -> bool:
    """Say whether experts become own neurons; see ``SizeConfig.form``."""
    if size.form != "auto":
        return size.form == "neurons"
    budget = size.params or size.bytes or size.expert_bits
    return bool(budget) and size.groups is None and size.rank is None


def choices_of(size: SizeConfig) -> tuple[str, ...]:
    """Return the bits that a neuron may have, none ("0") first."""
    return FULL if size.bits == "16" or size.params is not None else LOW_BITS


def forecast(shape: MoeShape, budget: int, size: SizeConfig, itemsize: int) -> dict[int, LayerPlan]:
    """Plan every layer for ``budget`` bytes of routed experts as if all layers were typical."""
    choices = choices_of(size)
    layers = len(shape.layers)
    neurons = shape.experts * shape.intermediate
    normal = NormalDist(sigma=ENERGY_SPREAD)
    count = min(TYPICAL_NEURONS, neurons)
    energy_1N = torch.tensor(
        [[math.exp(normal.inv_cdf((place + 0.5) / count)) for place in range(count)]]
    )
    empty = _layer_plan(shape, dict.fromkeys(choices[1:], 0), budget, size)
    fixed = layer_bytes(shape, empty, itemsize)
    room = max(0, budget // layers - fixed) * 8 * count / neurons
    choice_N = allocate({0: energy_1N}, shape.hidden, room, choices)[0]
    share = {bits: float((choice_N == n).float().mean()) for n, bits in enumerate(choices)}
    kept = {bits: int(share[bits] * neurons) for bits in choices[1:] if share[bits]}
    return dict.fromkeys(shape.layers, _layer_plan(shape, kept, budget, size))


def settle(
    shape: MoeShape,
    energies: Mapping[int, Tensor],
    budget: int,
    size: SizeConfig,
    itemsize: int,
) -> tuple[dict[int, Tensor], dict[int, LayerPlan]]:
    """Choose every neuron's bits by what was measured, and plan every layer.

    ``energies`` holds each layer's (E, F); all layers together take at most ``budget`` bytes,
    codebooks, scales and widths counted. Returns each layer's (E, F) numbers of a choice in
    ``choices_of(size)``, and the plans.
    """
    if size.spread == "layer" and len(energies) > 1:
        return _settle_apart(shape, energies, budget, size, itemsize)
    choices = choices_of(size)
    empty = _layer_plan(shape, {}, budget, size)
    room = budget - len(energies) * layer_bytes(shape, empty, itemsize)
    while True:
        chosen = allocate(energies, shape.hidden, max(room, 0) * 8, choices)
        plans = {
            layer: _layer_plan(shape, _counts(chosen_EF, choices), budget, size)
            for layer, chosen_EF in chosen.items()
        }
        excess = sum(layer_bytes(shape, plan, itemsize) for plan in plans.values()) - budget
        if excess <= 0 or room <= 0:
            return chosen, plans
        room -= excess


def _settle_apart(
    shape: MoeShape,
    energies: Mapping[int, Tensor],
    budget: int,
    size: SizeConfig,
    itemsize: int,
) -> tuple[dict[int, Tensor], dict[int, LayerPlan]]:
    """Settle every layer by itself, each with an equal share of the budget."""
    chosen: dict[int, Tensor] = {}
    plans: dict[int, LayerPlan] = {}
    for layer, energy_EF in energies.items():
        alone = replace(shape, layers=(layer,))
        share = budget // len(energies)
        of_one, plan = settle(alone, {layer: energy_EF}, share, size, itemsize)
        chosen, plans = chosen | of_one, plans | plan
    return chosen, plans


def _counts(chosen_EF: Tensor, choices: tuple[str, ...]) -> dict[str, int]:
    counts = torch.bincount(chosen_EF.flatten(), minlength=len(choices)).tolist()
    return {
        bits: counts[number] for number, bits in enumerate(choices) if number and counts[number]
    }


def _layer_plan(
    shape: MoeShape, neurons: dict[str, int], budget: int, size: SizeConfig
) -> LayerPlan:
    numbers = len(shape.layers) * shape.experts * 3 * shape.hidden * shape.intermediate
    bits = 8 * budget / numbers
    left_over = shape.experts * shape.intermediate - sum(neurons.values())
    whole = choices_of(size) == FULL
    has_shared = bits < 16 if whole else bits <= SHARED_BELOW_BITS
    wanted = size.shared if size.shared is not None else shape.intermediate * has_shared
    shared = min(wanted, left_over)
    if whole:
        return LayerPlan(neurons=neurons, shared=shared)
    return LayerPlan(neurons=neurons, shared=shared, shared_bits=SHARED_BITS, gain_bits=GAIN_BITS)


def shape_overhead(shape: MoeShape) -> int:
    """Return the bytes that may come on top when every neuron is kept whole: widths."""
    return len(shape.layers) * shape.experts * 4
