"""Which neurons of a model are kept, and at how many bits: the most output energy for the bytes.

Every MoE layer adds its output to the residual stream, so a neuron counts by the energy that it
adds there, ``sum over its tokens of (w z)^2 |d|^2``, compared over all layers of the model and not
within one. Storing a neuron at b bits loses a share ``LOSS[b]`` of its energy. Of every neuron the
next bits are worth ``energy times the loss they spare, per byte``; taking the most worthy first,
until the bytes are spent, loses least in all (Shoham and Gersho, "Efficient bit allocation for an
arbitrary set of quantizers", 1988), because what more bits spare only ever becomes less.

Shape suffixes: E experts, F neurons of an expert, N neurons of the whole model, C choices, U
upgrades from one choice to the next.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moefuse.modeling.modeling_moefuse import CODED

LOSS = {
    "0": 1.0,
    "1": 0.5,
    "1.14": 0.41,
    "1.33": 0.32,
    "1.6": 0.22,
    "2": 0.13,
    "3": 0.07,
    "4": 0.04,
    "8": 0.001,
    "16": 0.0,
}
"""Share of a neuron's energy that counts as lost by number of bits: set by the KL that students of
the bundled teacher reached (docs/research.md)."""
LOW_BITS = tuple(LOSS)
"""Bits that a neuron may have where low bits are allowed, none first."""
FULL = ("0", "16")


def neuron_bytes(hidden: int, bits: str, itemsize: int, biased: bool = False) -> int:
    """Return what a neuron takes: rows of gate, up and down, ``hidden`` numbers each, and scales.

    ``itemsize`` is the bytes of one number in the checkpoint's dtype, which "16" stands for, and in
    which gate and up have a bias each where the neuron is ``biased``.
    """
    if bits == "0":
        return 0
    biases = 2 * itemsize if biased else 0
    if bits == "16":
        return 3 * hidden * itemsize + biases
    vector, code_bits = CODED[bits]
    codes = -(-hidden // vector)
    return 3 * (-(-codes * code_bits // 8) + itemsize) + biases


def allocate(
    energies: Mapping[int, Tensor],
    hidden: int,
    budget: int,
    choices: tuple[str, ...],
    itemsize: int,
    *,
    biased: bool = False,
) -> dict[int, Tensor]:
    """Choose every neuron's bits: (E, F) numbers of a choice in ``choices``, by layer.

    ``energies`` holds each layer's (E, F) energies, comparable over layers; all neurons together
    take at most ``budget`` bytes, or what the first choice takes for all of them: no neuron has
    less than that. Of equal worth the first neurons come first. Neurons of no energy
    (those of experts that no token chose) come last, all to the same bits as far as bytes reach.
    """
    energy_N = torch.cat([energy.flatten() for energy in energies.values()]).double().cpu()
    cost_C = torch.tensor([neuron_bytes(hidden, bits, itemsize, biased) for bits in choices])
    stairs_U = _stairs(cost_C.tolist(), [LOSS[bits] for bits in choices])
    step_U = cost_C[stairs_U].diff()
    budget -= len(energy_N) * int(cost_C[stairs_U[0]])
    loss_C = torch.tensor([LOSS[bits] for bits in choices], dtype=torch.float64)
    worth_UN = (-loss_C[stairs_U].diff() / step_U).unsqueeze(-1) * energy_N
    order = worth_UN.flatten().sort(descending=True, stable=True).indices
    spent = step_U.repeat_interleave(len(energy_N))[order].cumsum(0)
    taken = order[: int((spent <= budget).sum())]
    choice_N = stairs_U[torch.bincount(taken % len(energy_N), minlength=len(energy_N))]
    parts = choice_N.split([energy.numel() for energy in energies.values()])
    return {
        layer: part.view_as(energy).to(energy.device)
        for (layer, energy), part in zip(energies.items(), parts, strict=True)
    }


def _stairs(cost: list[int], loss: list[float]) -> Tensor:
    """Return the choices on the lower convex hull of cost and loss, from the first to the best.

    A choice above the line between two others is never worth its bytes.
    """
    stairs = [0]
    for choice in sorted(range(1, len(cost)), key=cost.__getitem__):
        if loss[choice] >= loss[stairs[-1]]:
            continue
        while len(stairs) > 1 and _slope(cost, loss, *stairs[-2:]) <= _slope(
            cost, loss, stairs[-1], choice
        ):
            stairs.pop()
        stairs.append(choice)
    return torch.tensor(stairs)


def _slope(cost: list[int], loss: list[float], low: int, high: int) -> float:
    if cost[high] == cost[low]:
        return float("inf")
    return (loss[low] - loss[high]) / (cost[high] - cost[low])


def predicted_loss(
    energies: Mapping[int, Tensor], chosen: Mapping[int, Tensor], choices: tuple[str, ...]
) -> float:
    """Return the share of the routed experts' energy that is lost, 0 to 1.

    What shared neurons give back of dropped ones does not count, nor what distillation mends.
    Where there is no energy, the share of neurons counts, as if all were of the same energy.
    """
    loss_C = torch.tensor([LOSS[bits] for bits in choices], dtype=torch.float64)
    total = sum(float(energy.double().sum()) for energy in energies.values())
    lost, power = 0.0, 0.0
    for layer, energy_EF in energies.items():
        weight_EF = (energy_EF if total else torch.ones_like(energy_EF)).double().cpu()
        lost += float((loss_C[chosen[layer].cpu()] * weight_EF).sum())
        power += float(weight_EF.sum())
    return lost / power
