"""True sizes of fused experts: counted on the modules themselves, built without memory."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moefuse.families import MoeShape
from moefuse.mathematics.experts import Experts, Gating
from moefuse.modeling.modeling_moefuse import (
    MULTIPLEXED,
    FusedExperts,
    MultiplexedExperts,
    NeuronExperts,
    PlainGating,
)

StoredBytes = Callable[[int, int], int]
"""How many bytes a linear layer of (O, I) numbers takes as a quantiser stores it."""


@dataclass(frozen=True)
class Storing:
    """How ``moefuse quantize`` will store what is planned: what ``base_bytes`` tells of a base's
    matrix, and deltas in the form that ``delta_kind`` names for a layer."""

    base_bytes: StoredBytes
    delta_kind: Callable[["LayerPlan"], str]


@dataclass(frozen=True)
class LayerPlan:
    """What the routed experts of one layer become; the entry of ``config.json``'s moefuse block.

    Either ``groups`` bases and deltas of ``rank``, or, where ``neurons`` is given, ``neurons`` own
    neurons by their bits and ``shared`` shared ones. Where ``delta`` is a kind in ``MULTIPLEXED``,
    deltas are adapters that are mixed before the non-linearity.
    """

    groups: int = 0
    rank: int = 0
    delta: str = "low_rank"
    scale: bool = False
    bias: bool = False
    neurons: dict[str, int] | None = None
    shared: int = 0
    shared_bits: str = "16"
    gain_bits: str = "16"
    widest: int | None = None
    """Own neurons that as many experts as a token chooses have together at most, where known."""

    @property
    def is_multiplexed(self) -> bool:
        """Whether experts are mixed before the non-linearity, as in the checkpoints of 2025."""
        return self.delta in MULTIPLEXED


@dataclass(frozen=True)
class Plan:
    """What the student will be: its layers and its true sizes, in numbers and in bytes.

    Of own neurons it also says what they cost in quality: ``energy_lost`` is the share of the
    routed experts' output energy that is lost (see ``allocate.predicted_loss``; before calibration
    a forecast), ``neurons_kept`` the share of the neurons that is kept, both 0 to 1, ``mean_bits``
    the bits of a number of these, and ``advice`` what all that amounts to. They are None for shared
    bases and deltas, whose loss nothing foretells.
    """

    layers: dict[int, LayerPlan]
    parameters: int
    active_parameters: int
    bytes: int
    expert_parameters: int
    expert_bytes: int
    teacher_parameters: int
    teacher_bytes: int
    energy_lost: float | None = None
    neurons_kept: float | None = None
    mean_bits: float | None = None
    advice: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def maximum_rank(shape: MoeShape, *, multiplexed: bool = False) -> int:
    """Return the rank at which deltas of the stacked gate and up can be anything.

    Gate and up of ``multiplexed`` experts have adapters of their own.
    """
    return min(shape.hidden, (1 if multiplexed else 2) * shape.intermediate)


def make_experts(
    shape: MoeShape,
    plan: LayerPlan,
    device: str | torch.device,
    gating: Gating | None = None,
) -> FusedExperts | NeuronExperts:
    """Build one layer's fused module with weights that mean nothing yet.

    Without the teacher's ``gating`` it is good for nothing but counting.
    """
    gating = gating or PlainGating(torch.nn.functional.silu)
    if plan.neurons is not None:
        with torch.device(device):
            return make_neuron_experts(
                shape.hidden, shape.experts, plan, gating, biased=shape.biased
            )
    with torch.device(device):
        return _make_fused(
            shape.hidden, shape.intermediate, shape.experts, plan, gating, biased=shape.biased
        )


def _make_fused(
    hidden: int, intermediate: int, experts: int, plan: LayerPlan, gating: Gating, *, biased: bool
) -> FusedExperts:
    sizes = hidden, intermediate, experts, plan.groups, plan.rank
    if plan.is_multiplexed:
        return MultiplexedExperts(*sizes, gating, kind=plan.delta)
    return FusedExperts(
        *sizes,
        gating,
        delta=plan.delta,
        scale=plan.scale,
        bias=plan.bias or biased,
        down_bias=biased,
    )


def make_neuron_experts(
    hidden: int, experts: int, plan: LayerPlan, gating: Gating, *, biased: bool
) -> NeuronExperts:
    """Build one layer's neuron experts with weights that mean nothing yet."""
    return NeuronExperts(
        hidden,
        experts,
        gating,
        neurons=plan.neurons or {},
        shared=plan.shared,
        shared_bits=plan.shared_bits,
        gain_bits=plan.gain_bits,
        biased=biased,
    )


def load_experts(state: dict[str, Tensor], experts: Experts, plan: LayerPlan) -> FusedExperts:
    """Make the fused module that takes the place of ``experts``, with the weights of ``state``."""
    count, double_intermediate, hidden = experts.gate_up_EFD.shape
    with torch.device("meta"):
        module = _make_fused(
            hidden,
            double_intermediate // 2,
            count,
            plan,
            experts.gating,
            biased=experts.biases is not None,
        )
    module.load_state_dict(state, assign=True)
    return module


def neuron_numbers(shape: MoeShape) -> int:
    """Count the numbers of one neuron: rows of gate, up and down, and two biases, if any."""
    return 3 * shape.hidden + (2 if shape.biased else 0)


def layer_parameters(shape: MoeShape, plan: LayerPlan) -> int:
    """Count the numbers that one layer's fused experts hold, those that codes stand for too."""
    if plan.neurons is not None:
        kept = sum(plan.neurons.values()) + plan.shared
        biases = shape.experts * shape.hidden if shape.biased else 0
        return neuron_numbers(shape) * kept + shape.experts * plan.shared + biases
    module = make_experts(shape, plan, "meta")
    return sum(parameter.numel() for parameter in module.parameters())


def layer_bytes(
    shape: MoeShape, plan: LayerPlan, itemsize: int, storing: Storing | None = None
) -> int:
    """Count the bytes that one layer's fused experts take on disk, the group map included.

    ``itemsize`` is the bytes of one number in the checkpoint's dtype; ``storing`` tells those of
    bases and deltas where a quantiser stores them otherwise.
    """
    if storing is not None:
        plan = replace(plan, delta=storing.delta_kind(plan))
    module = make_experts(shape, plan, "meta")
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    plain = sum(parameter.numel() for parameter in module.parameters()) * itemsize + buffers
    if storing is None or not isinstance(module, FusedExperts):
        return plain
    linears = [part for part in module.bases.modules() if isinstance(part, torch.nn.Linear)]
    stored = sum(storing.base_bytes(part.out_features, part.in_features) for part in linears)
    return plain + stored - sum(part.weight.numel() for part in linears) * itemsize


def active_parameters(shape: MoeShape, plan: LayerPlan) -> int:
    """Count the numbers of one layer that a token uses at most: its groups' bases, its deltas."""
    if plan.neurons is not None:
        # No expert has more neurons than the teacher's, and none more than there are.
        neuron = neuron_numbers(shape)
        biases = shape.top_k * shape.hidden if shape.biased else 0
        most = min(shape.top_k * shape.intermediate, sum(plan.neurons.values()))
        most = most if plan.widest is None else plan.widest
        return neuron * (most + plan.shared) + shape.top_k * plan.shared + biases
    base = 3 * shape.hidden * shape.intermediate
    if plan.delta == "multiplexed_lora":
        base += 3 * plan.rank * (shape.hidden + shape.intermediate)
    per_expert = (layer_parameters(shape, plan) - plan.groups * base) // shape.experts
    return min(shape.top_k, plan.groups) * base + shape.top_k * per_expert
