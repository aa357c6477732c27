"""Make a layer of neuron experts: own neurons at their bits, and shared ones with fitted gains.

Shape suffixes: T tokens, N rows of one expert, E experts, F neurons of an expert, D hidden width,
S shared neurons, C candidates for them, O neurons of one number of bits, P parts (gate, up, down).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moefuse.fusion.neurons import RIDGE, fit_gains, neurons, rows_of_expert
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.selection import forward_selection
from moefuse.modeling.modeling_moefuse import CodedRows, NeuronExperts, by_bits, own_name
from moefuse.modeling.training import TrainedNeuronExperts, encode
from moefuse.sizes import LayerPlan, make_neuron_experts

CANDIDATES = 4096
"""Neurons at least, the strongest, out of which those that stand for a whole layer are chosen."""

BASIS_SHARE = 0.5
"""Share of the neurons that a token passes in the teacher below which shared neurons, where there
are no others, are chosen together; with more of them gains of every expert's own do better."""


def layer_neurons(experts: Experts, number_N: Tensor) -> Tensor:
    """Return some neurons of a layer as rows of gate, up and down, in fp32: (P, N, D).

    ``number_N`` are numbers e F + f. Only they are converted, not the layer.
    """
    width = experts.down_EDF.shape[2]
    expert_N, neuron_N = number_N // width, number_N % width
    gate_ND = experts.gate_up_EFD[expert_N, neuron_N].float()
    up_ND = experts.gate_up_EFD[expert_N, width + neuron_N].float()
    return torch.stack([gate_ND, up_ND, experts.down_EDF[expert_N, :, neuron_N].float()])


def neuron_biases(experts: Experts, number_N: Tensor) -> Tensor:
    """Return the biases of some neurons' gate and up rows, in fp32: (2, N, 1).

    ``number_N`` are numbers e F + f; the experts must have biases.
    """
    assert experts.biases is not None
    gate_EF, up_EF = experts.biases.gate_up_EF.chunk(2, dim=1)
    bias_PN = torch.stack([gate_EF.flatten()[number_N], up_EF.flatten()[number_N]])
    return bias_PN.unsqueeze(-1).float()


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
    metric_root_DD: Tensor | None = None,
) -> Kept:
    """Make one layer's neuron experts.

    ``experts`` in any float dtype and ``call`` in fp32 on one device; ``energy_EF`` (E, F);
    ``bits_EF`` (E, F) the numbers of a choice in ``choices``; ``plan`` says what the module looks
    like. Where no expert keeps a neuron of its own, few shared ones in 16 bits stand for the whole
    layer (see ``basis_neurons``, which takes ``metric_root_DD``); otherwise for what experts do not
    keep.
    """
    hidden = experts.gate_up_EFD.shape[2]
    biased = experts.biases is not None
    module = make_neuron_experts(hidden, len(bits_EF), plan, experts.gating, biased=biased)
    module = module.to(energy_EF.device)
    latents: dict[str, Tensor] = {}
    for number, bits in enumerate(by_bits(plan.neurons or {})):
        mine_EF = bits_EF == choices.index(bits)
        module.widths[number] = mine_EF.sum(1)
        number_O = mine_EF.flatten().nonzero().flatten()
        values_POD = layer_neurons(experts, number_O)
        _put(module.own[own_name(bits)], f"own.{own_name(bits)}", values_POD, latents)
        if module.own_bias is not None:
            _put(module.own_bias[own_name(bits)], "", neuron_biases(experts, number_O), latents)
    if plan.shared:
        passed = call.index_TK.shape[1] * bits_EF.shape[1]
        if not plan.neurons and plan.shared_bits == "16" and plan.shared < BASIS_SHARE * passed:
            shared_S, down_SD = basis_neurons(experts, call, energy_EF, plan.shared, metric_root_DD)
            values_PSD = layer_neurons(experts, shared_S)
            values_PSD[2] = down_SD
            gain_ES = values_PSD.new_ones(len(bits_EF), plan.shared)
        else:
            shared_S = shared_neurons(energy_EF, bits_EF > 0, plan.shared)
            values_PSD = layer_neurons(experts, shared_S)
            gain_ES = fit_shared_gains(experts, call, bits_EF > 0, shared_S, values_PSD)
        if module.shared_bias is not None:
            _put(module.shared_bias, "", neuron_biases(experts, shared_S), latents)
        _put(module.shared, "shared", values_PSD, latents)
        _put(module.gain, "gain", gain_ES.unsqueeze(0), latents)
    if experts.biases is not None and module.down_bias is not None:
        module.down_bias.data.copy_(experts.biases.down_ED)
    return Kept(module.requires_grad_(True), latents)


@torch.no_grad()
def _put(rows: nn.Module | None, name: str, values: Tensor, latents: dict[str, Tensor]) -> None:
    if isinstance(rows, CodedRows):
        encode(rows, values)
        latents[name] = values
    else:
        rows.weight.copy_(values.flatten(0, 1))  # type: ignore[union-attr, operator]


def _passed(experts: Experts, number_C: Tensor, rows_PCD: Tensor, x_ND: Tensor) -> Tensor:
    """Return the values, (N, C), of neurons with numbers ``number_C`` (e F + f) and these rows."""
    bias_P = None if experts.biases is None else neuron_biases(experts, number_C).flatten()
    return neurons(experts, torch.cat([rows_PCD[0], rows_PCD[1]]), x_ND, bias_P)


def basis_neurons(
    experts: Experts,
    call: ExpertsCall,
    energy_EF: Tensor,
    count: int,
    metric_root_DD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return neurons that all experts share alike and that stand for the whole layer.

    They are chosen so that together they explain most of what the layer returns (see
    ``forward_selection``), where the strongest would say the same things over and over. Returns
    their numbers e F + f, (S,), and the down rows that fit best, (S, D), errors compared as
    ``metric_root_DD`` (D, D, lower triangular) has it, or as they are.
    """
    candidate_C = energy_EF.flatten().sort(descending=True, stable=True).indices
    candidate_C = candidate_C[: max(CANDIDATES, 2 * count)]
    rows_PCD = layer_neurons(experts, candidate_C)
    passed_TC = _passed(experts, candidate_C, rows_PCD, call.x_TD)
    passed_TC = passed_TC * call.weight_TK.sum(1, keepdim=True)
    added_TD = experts.down_bias_added(call.index_TK, call.weight_TK)
    target_TD = call.y_TD if added_TD is None else call.y_TD - added_TD
    root_DD = metric_root_DD
    target_TD = target_TD if root_DD is None else target_TD @ root_DD
    chosen_S, down_SD = forward_selection(passed_TC, target_TD, count, ridge=RIDGE)
    if root_DD is not None:
        down_SD = torch.linalg.solve_triangular(root_DD, down_SD, upper=False, left=False)
    return candidate_C[chosen_S], down_SD


def fit_shared_gains(
    experts: Experts,
    call: ExpertsCall,
    owned_EF: Tensor,
    shared_S: Tensor,
    values_PSD: Tensor,
) -> Tensor:
    """Return how much of each shared neuron every expert uses, (E, S), by least squares.

    ``shared_S`` are the shared neurons' numbers e F + f and ``values_PSD`` their rows. What an
    expert's neurons that it does not keep would have added is approached by the shared ones; an
    expert that no token of ``call`` chose takes the mean gains of the others.
    """
    down_DS = values_PSD[2].T
    gains: dict[int, Tensor] = {}
    for expert in range(len(owned_EF)):
        token_N, weight_N1 = rows_of_expert(call, expert)
        if len(token_N):
            x_ND = call.x_TD[token_N]
            left_NF = experts.neurons(expert, x_ND) * ~owned_EF[expert] * weight_N1
            z_NS = _passed(experts, shared_S, values_PSD, x_ND) * weight_N1
            gains[expert] = fit_gains(z_NS, left_NF @ experts.down(expert).T, down_DS)
    mean_S = (
        torch.stack(list(gains.values())).mean(0) if gains else down_DS.new_zeros(down_DS.shape[1])
    )
    return torch.stack([gains.get(expert, mean_S) for expert in range(len(owned_EF))])
