"""Which neurons of a model are kept, and at how many bits: the most output energy for the bytes.

Every MoE layer adds its output to the residual stream, so a neuron counts by the energy that it
adds there, ``sum over its tokens of (w z)^2 |d|^2``, compared over all layers of the model and not
within one. Storing a neuron at b bits loses a share ``LOSS[b]`` of its energy; the choice that
loses least in all for the bytes is, for some price of a bit, every neuron's own best choice
(Lagrange multipliers; Shoham and Gersho, "Efficient bit allocation for an arbitrary set of
quantizers", 1988).

Shape suffixes: E experts, F neurons of an expert, N neurons of the whole model, C choices.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

LOSS = {"0": 1.0, "1": 0.43, "2": 0.13, "3": 0.06, "4": 0.03, "8": 0.001, "16": 0.0}
"""Share of a neuron's energy that is lost by number of bits, after distillation; measured on the
bundled teacher (docs/research.md)."""
LOW_BITS = ("0", "1", "2", "3", "4", "8", "16")
FULL = ("0", "16")
SCALE_BITS = 16
STEPS = 100


def bits_per_neuron(hidden: int, bits: str) -> float:
    """Return what a neuron (gate, up and down, ``hidden`` numbers each) takes, its scales too."""
    if bits == "0":
        return 0.0
    return 3 * hidden * float(bits) + (0 if bits == "16" else 3 * SCALE_BITS)


def allocate(
    energies: Mapping[int, Tensor], hidden: int, budget_bits: float, choices: tuple[str, ...]
) -> dict[int, Tensor]:
    """Choose every neuron's bits: (E, F) numbers of a choice in ``choices``, by layer.

    ``energies`` holds each layer's (E, F) energies, comparable over layers; all neurons together
    take at most ``budget_bits``. Neurons of equal worth are taken in their order, so that the
    budget is used to the last neuron that fits.
    """
    energy_N = torch.cat([energy.flatten() for energy in energies.values()]).double().cpu()
    cost_C = torch.tensor([bits_per_neuron(hidden, bits) for bits in choices], dtype=torch.float64)
    loss_C = torch.tensor([LOSS[bits] for bits in choices], dtype=torch.float64)
    low, high = 0.0, float(energy_N.max()) / float(cost_C[cost_C > 0].min()) + 1e-300
    for _ in range(STEPS):
        price = (low + high) / 2
        spent = float(cost_C[_best(energy_N, cost_C, loss_C, price)].sum())
        low, high = (price, high) if spent > budget_bits else (low, price)
    choice_N = _best(energy_N, cost_C, loss_C, high)
    _fill(choice_N, _best(energy_N, cost_C, loss_C, low), cost_C, budget_bits)
    parts = choice_N.split([energy.numel() for energy in energies.values()])
    return {
        layer: part.view_as(energy).to(energy.device)
        for (layer, energy), part in zip(energies.items(), parts, strict=True)
    }


def _best(energy_N: Tensor, cost_C: Tensor, loss_C: Tensor, price: float) -> Tensor:
    """Return every neuron's best choice at a price of a bit, (N,); the cheapest of equals."""
    best_N = energy_N * loss_C[0] + price * cost_C[0]
    choice_N = torch.zeros(len(energy_N), dtype=torch.long)
    for choice in range(1, len(cost_C)):
        value_N = energy_N * loss_C[choice] + price * cost_C[choice]
        better_N = value_N < best_N
        choice_N[better_N], best_N = choice, torch.where(better_N, value_N, best_N)
    return choice_N


def _fill(choice_N: Tensor, richer_N: Tensor, cost_C: Tensor, budget_bits: float) -> None:
    """Spend what is left on neurons that a slightly lower price would give more, in their order."""
    differing_M = (choice_N != richer_N).nonzero().flatten()
    extra_M = (cost_C[richer_N[differing_M]] - cost_C[choice_N[differing_M]]).cumsum(0)
    room = budget_bits - float(cost_C[choice_N].sum())
    taken_M = differing_M[extra_M <= room]
    choice_N[taken_M] = richer_N[taken_M]


def predicted_loss(
    energies: Mapping[int, Tensor], chosen: Mapping[int, Tensor], choices: tuple[str, ...]
) -> float:
    """Return the share of the routed experts' energy that is lost, 0 to 1."""
    loss_C = torch.tensor([LOSS[bits] for bits in choices], dtype=torch.float64)
    lost = sum(
        float((loss_C[chosen[layer].cpu()] * energy.double().cpu()).sum())
        for layer, energy in energies.items()
    )
    return lost / max(sum(float(energy.double().sum()) for energy in energies.values()), 1e-300)
