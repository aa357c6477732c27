"""Make a layer of neuron experts: own neurons at their bits, and shared ones with fitted gains.

Shape suffixes: T tokens, N rows of one expert, E experts, F neurons of an expert, D hidden width,
S shared neurons, O neurons of one number of bits, P parts (gate, up, down).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moefuse.fusion.neurons import fit_gains, neurons, rows_of_expert
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.modeling.modeling_moefuse import CodedRows, NeuronExperts, by_bits
from moefuse.modeling.training import TrainedNeuronExperts, encode
from moefuse.sizes import LayerPlan, make_neuron_experts


def layer_neurons(experts: Experts) -> Tensor:
    """Return all neurons of a layer as rows of gate, up and down: (P, E * F, D)."""
    gate_EFD, up_EFD = experts.gate_up_EFD.chunk(2, dim=1)
    parts = (gate_EFD, up_EFD, experts.down_EDF.transpose(1, 2))
    return torch.stack([part.flatten(0, 1) for part in parts])


def shared_neurons(energy_EF: Tensor, owned_EF: Tensor, count: int) -> Tensor:
    """Return the ``count`` neurons of greatest energy that no expert keeps, (S,) numbers e F + f.

    Where fewer are left over, those that experts keep follow.
    """
    left_N = torch.where(owned_EF.flatten(), -1.0, energy_EF.flatten())
    return left_N.sort(descending=True, stable=True).indices[:count]


@dataclass(frozen=True)
class Kept:
    """One layer's neuron experts: the stored ``module``, the rows that its coded rows stand for."""

    module: NeuronExperts
    latents: dict[str, Tensor]

    def trained(self) -> TrainedNeuronExperts:
        """Return the trainable twin, which starts at the teacher's own numbers."""
        return TrainedNeuronExperts(self.module, self.latents)


def keep(
    experts: Experts,
    call: ExpertsCall,
    energy_EF: Tensor,
    bits_EF: Tensor,
    choices: tuple[str, ...],
    plan: LayerPlan,
) -> Kept:
    """Make one layer's neuron experts.

    ``experts`` and ``call`` in fp32 on one device; ``energy_EF`` (E, F); ``bits_EF`` (E, F) the
    numbers of a choice in ``choices``; ``plan`` says what the module looks like.
    """
    hidden = experts.gate_up_EFD.shape[2]
    module = make_neuron_experts(hidden, len(bits_EF), plan, experts.activation)
    module = module.to(energy_EF.device)
    rows_PND = layer_neurons(experts)
    latents: dict[str, Tensor] = {}
    for number, bits in enumerate(by_bits(plan.neurons or {})):
        mine_EF = bits_EF == choices.index(bits)
        module.widths[number] = mine_EF.sum(1)
        values_POD = rows_PND[:, mine_EF.flatten().nonzero().flatten()]
        _put(module.own[f"bits{bits}"], f"own.bits{bits}", values_POD, latents)
    if plan.shared:
        shared_S = shared_neurons(energy_EF, bits_EF > 0, plan.shared)
        values_PSD = rows_PND[:, shared_S]
        gain_ES = fit_shared_gains(experts, call, bits_EF > 0, values_PSD)
        _put(module.shared, "shared", values_PSD, latents)
        _put(module.gain, "gain", gain_ES.unsqueeze(0), latents)
    return Kept(module.requires_grad_(True), latents)


@torch.no_grad()
def _put(rows: nn.Module | None, name: str, values: Tensor, latents: dict[str, Tensor]) -> None:
    if isinstance(rows, CodedRows):
        encode(rows, values)
        latents[name] = values
    else:
        rows.weight.copy_(values)  # type: ignore[union-attr, operator]


def fit_shared_gains(
    experts: Experts, call: ExpertsCall, owned_EF: Tensor, shared_PSD: Tensor
) -> Tensor:
    """Return how much of each shared neuron every expert uses, (E, S), by least squares.

    What an expert's neurons that it does not keep would have added is approached by the shared
    ones; an expert that no token of ``call`` chose takes the mean gains of the others.
    """
    gate_up_SD, down_DS = torch.cat([shared_PSD[0], shared_PSD[1]]), shared_PSD[2].T
    gains: dict[int, Tensor] = {}
    for expert in range(len(owned_EF)):
        token_N, weight_N1 = rows_of_expert(call, expert)
        if len(token_N):
            x_ND = call.x_TD[token_N]
            own_NF = neurons(experts, experts.gate_up_EFD[expert], x_ND)
            left_NF = own_NF * ~owned_EF[expert] * weight_N1
            z_NS = neurons(experts, gate_up_SD, x_ND) * weight_N1
            gains[expert] = fit_gains(z_NS, left_NF @ experts.down_EDF[expert].T, down_DS)
    mean_S = (
        torch.stack(list(gains.values())).mean(0) if gains else down_DS.new_zeros(down_DS.shape[1])
    )
    return torch.stack([gains.get(expert, mean_S) for expert in range(len(owned_EF))])
