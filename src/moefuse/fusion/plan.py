"""Plan: from a wish (a number of groups, of parameters, of bytes) to G and R of every layer.

Sizes are counted on the modules themselves. Times are estimated from the operations that must be
done and the matrix rate that the device shows in a fifth of a second.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefuse.checkpoint.headers import TensorInfo
from moefuse.config import (
    BUDGETS,
    MULTIPLEXED,
    CalibrateConfig,
    DistillConfig,
    FactorConfig,
    SizeConfig,
    flag_of,
    parse_bytes,
    parse_count,
)
from moefuse.errors import UserError
from moefuse.families import Family, MoeShape
from moefuse.fusion.advice import advise, kept_share, mean_bits
from moefuse.fusion.allocate import predicted_loss
from moefuse.fusion.plan_neurons import (
    choices_of,
    forecast,
    least_bytes,
    most_bytes,
    settle,
    uses_neurons,
)
from moefuse.sizes import (
    LayerPlan,
    Plan,
    Storing,
    active_parameters,
    layer_bytes,
    layer_parameters,
    maximum_rank,
)

BASE_SHARE = 0.5
"""Share of the experts' budget that goes to bases when only a budget is given."""
REACHED_SHARE = 0.2
GROUP_COPIES = 4
"""Copies in fp32 of a group's experts that making it holds: members, differences, factors."""
READ_BYTES_PER_SECOND = 1e9
READ_BUFFER_BYTES = 256_000_000
RUNTIME_BYTES = 600_000_000
"""What Python, torch and transformers take before any weight is read."""

Choice = tuple[int, int]


@dataclass(frozen=True)
class Teacher:
    """What the planner has to know of a checkpoint; all counts are of the whole model.

    ``outside`` counts parameters outside the routed experts, ``itemsize`` is the bytes of one
    number once it is plain, ``stored_bytes`` are those on the disk where these are others.
    ``storing`` tells what a student's bases and deltas take where a quantiser is to store them.
    """

    shape: MoeShape
    outside: int
    outside_bytes: int
    largest_outside_layer: int
    embedding: int
    itemsize: int
    stored_bytes: int | None = None
    storing: Storing | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the whole teacher on the disk."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        return self.outside_bytes + self.expert_parameters * self.itemsize

    @property
    def expert_parameters(self) -> int:
        """Parameters of all routed experts."""
        shape = self.shape
        return len(shape.layers) * shape.layer_numbers

    @property
    def parameters(self) -> int:
        """Parameters of the whole teacher."""
        return self.outside + self.expert_parameters


@dataclass(frozen=True)
class Estimate:
    """What making the student takes: ``seconds``, ``disk_bytes`` in all, peak ``memory_bytes``."""

    seconds: float
    disk_bytes: int
    memory_bytes: int


def describe_teacher(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], family: Family
) -> Teacher:
    """Count a checkpoint's parts from its headers; layers that are not loaded do not count."""
    shape = family.shape(config)
    layers = family.layer_count(config)
    routed = tuple(prefix for layer in shape.layers for prefix in family.routed_prefixes(layer))
    outside: dict[int | None, list[TensorInfo]] = {}
    for name, tensor in tensors.items():
        layer = family.layer_of(name)
        if (layer is None or layer < layers) and not name.startswith(routed):
            outside.setdefault(layer, []).append(tensor)
    counted = [tensor for part in outside.values() for tensor in part]
    in_layers = [sum(t.numel for t in part) for layer, part in outside.items() if layer is not None]
    experts = [tensor for name, tensor in tensors.items() if name.startswith(routed)]
    sample = tensors[next(iter(family.expert_tensors(shape.layers[0], shape)))]
    return Teacher(
        shape=shape,
        outside=sum(tensor.numel for tensor in counted),
        outside_bytes=sum(tensor.nbytes for tensor in counted),
        largest_outside_layer=max(in_layers),
        embedding=max(tensor.numel for tensor in outside[None]),
        itemsize=sample.nbytes // sample.numel,
        stored_bytes=sum(tensor.stored_bytes for tensor in (*counted, *experts)),
    )


def make_plan(teacher: Teacher, size: SizeConfig, factor: FactorConfig) -> Plan:
    """Choose what every layer becomes; raises ``UserError`` for a wish that cannot be met.

    Where own neurons are chosen (see ``plan_neurons``) the plan is a forecast: which neurons are
    kept, and at how many bits, is known after calibration; the budget is not exceeded.
    """
    if uses_neurons(size):
        budget = expert_budget(teacher, size)
        layers, lost = forecast(teacher.shape, budget, size, teacher.itemsize)
        return counted(teacher, layers, lost)
    groups, rank = _choose(teacher, size, factor)
    return _counted(teacher, _layer_of(groups, rank, size, factor))


def _layer_of(groups: int, rank: int, size: SizeConfig, factor: FactorConfig) -> LayerPlan:
    """Return what a layer with so many bases becomes in the form that is asked for."""
    if size.form == MULTIPLEXED:
        return LayerPlan(groups, rank, delta=f"multiplexed_{size.mixture or 'mixture'}")
    return LayerPlan(groups, rank, scale=factor.scale, bias=factor.bias)


def expert_budget(teacher: Teacher, size: SizeConfig) -> int:
    """Return the bytes that all routed experts may take; raises ``UserError``."""
    given = [name for name in BUDGETS if getattr(size, name) is not None]
    if not given:
        raise UserError("--form neurons needs a budget: give --params, --bytes or --expert-bits.")
    if size.params is not None:
        budget = (parse_count(size.params, "--params") - teacher.outside) * teacher.itemsize
    elif size.bytes is not None:
        budget = parse_bytes(size.bytes, "--bytes") - teacher.outside_bytes
    else:
        budget = int(teacher.expert_parameters * (size.expert_bits or 0) / 8)
    least = least_bytes(teacher.shape, size, teacher.itemsize)
    if budget < least:
        raise UserError(
            f"{flag_of(given[0])} {getattr(size, given[0])} is too small: "
            f"{teacher.outside / 1e9:.3f} B parameters ({teacher.outside_bytes / 1e9:.3f} GB) are "
            "outside the routed experts and cannot shrink, and the experts need "
            f"{least / 1e9:.3f} GB at least."
        )
    return min(budget, most_bytes(teacher.shape, teacher.itemsize))


def settled_plan(
    teacher: Teacher, energies: Mapping[int, Tensor], size: SizeConfig
) -> tuple[dict[int, Tensor], Plan]:
    """Choose own neurons by measured ``energies``, each layer's (E, F), and count what they are.

    Returns each layer's (E, F) numbers of a choice in ``choices_of(size)``, and the true plan.
    Raises ``UserError`` for a budget that cannot be met.
    """
    budget = expert_budget(teacher, size)
    chosen, layers = settle(teacher.shape, energies, budget, size, teacher.itemsize)
    lost = predicted_loss(energies, chosen, choices_of(size))
    return chosen, counted(teacher, layers, lost)


def counted(
    teacher: Teacher, layers: dict[int, LayerPlan], energy_lost: float | None = None
) -> Plan:
    """Return the plan of a student whose layers are ``layers``, its sizes counted.

    ``energy_lost`` is the share of the experts' energy that it loses, 0 to 1, where known.
    """
    shape = teacher.shape
    experts = sum(layer_parameters(shape, layer) for layer in layers.values())
    active = sum(active_parameters(shape, layer) for layer in layers.values())
    expert_bytes = sum(
        layer_bytes(shape, layer, teacher.itemsize, teacher.storing) for layer in layers.values()
    )
    return Plan(
        layers=layers,
        parameters=teacher.outside + experts,
        active_parameters=teacher.outside + active,
        bytes=teacher.outside_bytes + expert_bytes,
        expert_parameters=experts,
        expert_bytes=expert_bytes,
        teacher_parameters=teacher.parameters,
        teacher_bytes=teacher.bytes,
        energy_lost=energy_lost,
        neurons_kept=kept_share(shape, layers),
        mean_bits=mean_bits(layers, teacher.itemsize),
        advice=advise(shape, layers, teacher.itemsize),
    )


def _counted(teacher: Teacher, layer: LayerPlan) -> Plan:
    return counted(teacher, dict.fromkeys(teacher.shape.layers, layer))


def _choose(teacher: Teacher, size: SizeConfig, factor: FactorConfig) -> Choice:
    _check_choice(teacher.shape, size)
    limit = _limit(size)
    if limit is None:
        if size.groups is None:
            raise UserError(
                "Say how small the model should be: --groups, --params, --bytes or --expert-bits."
            )
        rank = default_rank(teacher.shape) if size.rank is None else size.rank
        return size.groups, rank
    return _fit(teacher, size, factor, limit)


def _check_choice(shape: MoeShape, size: SizeConfig) -> None:
    """Raise ``UserError`` where no student of bases can be what is asked for."""
    multiplexed = size.form == MULTIPLEXED
    if size.groups is not None and size.groups > shape.experts:
        raise UserError(
            f"--groups is {size.groups}, but a layer has only {shape.experts} experts; "
            "fused experts cannot be more than the experts they are made from."
        )
    if multiplexed and shape.biased:
        raise UserError(
            "This model's experts have biases, which --form multiplexed has no place for; choose "
            "another form."
        )
    most = maximum_rank(shape, multiplexed=multiplexed)
    if size.rank is not None and size.rank > most:
        width = "the expert width" if multiplexed else "twice the expert width"
        raise UserError(
            f"--rank is {size.rank}, but no delta of this model can have a rank above {most} (the "
            f"lesser of the hidden width and {width})."
        )


def default_rank(shape: MoeShape) -> int:
    """Return the rank that is taken when only the groups are given."""
    return max(1, min(shape.hidden, shape.intermediate) // 16)


def _limit(size: SizeConfig) -> "_Budget | None":
    if size.params is not None:
        amount = parse_count(size.params, "--params")
        return _Budget("--params", size.params, amount, lambda plan: plan.parameters)
    if size.bytes is not None:
        amount = parse_bytes(size.bytes, "--bytes")
        return _Budget("--bytes", size.bytes, amount, lambda plan: plan.bytes)
    return None


@dataclass(frozen=True)
class _Budget:
    flag: str
    wish: str
    amount: int
    measure: Callable[[Plan], int]


def _fit(teacher: Teacher, size: SizeConfig, factor: FactorConfig, budget: _Budget) -> Choice:
    """Fill the budget: first the groups, then the highest rank that still fits."""

    def counted(groups: int, rank: int) -> Plan:
        return _counted(teacher, _layer_of(groups, rank, size, factor))

    def fits(groups: int, rank: int) -> bool:
        return budget.measure(counted(groups, rank)) <= budget.amount

    experts = teacher.shape.experts
    least_rank = size.rank or 0
    if not fits(size.groups or 1, least_rank):
        smallest = counted(size.groups or 1, least_rank)
        raise UserError(
            f"{budget.flag} {budget.wish} is too small: with {size.groups or 1} group(s) at rank "
            f"{least_rank} the model still has {smallest.parameters / 1e9:.3f} B parameters in "
            f"{smallest.bytes / 1e9:.3f} GB, of which {teacher.outside / 1e9:.3f} B "
            f"({teacher.outside_bytes / 1e9:.3f} GB) are outside the routed experts and cannot "
            "shrink."
        )
    if size.rank is not None:
        groups = size.groups or _largest(lambda g: fits(g, size.rank or 0), 1, experts)
        return groups, size.rank
    groups = size.groups or _balanced_groups(fits, teacher)
    most = maximum_rank(teacher.shape, multiplexed=size.form == MULTIPLEXED)
    return groups, _largest(lambda rank: fits(groups, rank), 0, most)


def _balanced_groups(fits: Callable[[int, int], bool], teacher: Teacher) -> int:
    """Choose the groups when only a budget is given: bases take ``BASE_SHARE`` of the experts'."""
    room = _largest(lambda groups: fits(groups, 0), 1, teacher.shape.experts)
    return max(1, round(BASE_SHARE * room))


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number from ``low`` (which fits) to ``high`` that fits, by bisection."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Measure the device's matrix rate in operations per second, in about a fifth of a second."""
    size = 4096 if device.startswith("cuda") else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + 0.2
    while time.perf_counter() < end:
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def estimate(
    teacher: Teacher,
    plan: Plan,
    calibrate: CalibrateConfig,
    distill: DistillConfig,
    factor: FactorConfig,
    *,
    working_itemsize: int,
    rate: float,
    halves: bool = False,
) -> Estimate:
    """Estimate time, disk and memory of making the student.

    ``working_itemsize`` is the bytes of one number while computing, ``rate`` the device's matrix
    rate in operations per second; ``halves`` says whether groups are halved again and again. Small
    matrices do not reach that rate: a fifth of it is assumed.
    """
    shape, tokens = teacher.shape, calibrate.tokens
    layers = len(shape.layers)
    per_layer = plan.expert_parameters / layers
    used = (teacher.outside - teacher.embedding) + layers * shape.top_k * 3 * (
        shape.hidden * shape.intermediate
    )
    student = plan.active_parameters - teacher.outside
    seen = distill.steps * distill.batch_tokens
    own = _follows_own_inputs(plan, distill)
    # Calibration passes the text once, gradients pass some of it forth and back, and own inputs
    # pass it on two paths.
    passed = tokens * (1 + 2 * own) + 3 * _felt_tokens(plan, calibrate, distill)
    operations = 2 * used * passed + 6 * student * seen
    read = (2 + own) * plan.teacher_bytes / READ_BYTES_PER_SECOND
    call = tokens * (2 * shape.hidden * working_itemsize + shape.top_k * 8)
    hidden = (2 + 3 * own) * tokens * shape.hidden * working_itemsize
    factors = 2 * plan.expert_parameters * 4
    layer = shape.layer_numbers + teacher.largest_outside_layer
    streaming = (layer + teacher.embedding) * working_itemsize + READ_BUFFER_BYTES
    distilling = call + int(per_layer) * 4 * 5
    fitting = fitting_bytes(teacher, plan, factor, halves=halves)
    return Estimate(
        seconds=operations / (rate * REACHED_SHARE) + read,
        disk_bytes=plan.bytes + factors + layers * call + hidden,
        memory_bytes=RUNTIME_BYTES + max(streaming, distilling, fitting),
    )


def _has_neurons(plan: Plan) -> bool:
    return any(layer.neurons is not None for layer in plan.layers.values())


def _follows_own_inputs(plan: Plan, distill: DistillConfig) -> bool:
    """Say whether layers will be distilled above the students of lower ones."""
    wished = distill.inputs == "student" or (distill.inputs == "auto" and _has_neurons(plan))
    return wished and distill.steps > 0


def _felt_tokens(plan: Plan, calibrate: CalibrateConfig, distill: DistillConfig) -> int:
    """Return how many tokens gradients will be taken of."""
    felt = _has_neurons(plan) or distill.loss == "logits"
    return calibrate.sensitivity_tokens if felt else 0


def fitting_bytes(
    teacher: Teacher, plan: Plan, factor: FactorConfig, *, halves: bool = False
) -> int:
    """Estimate what fitting a layer's bases holds: its experts as they are stored, the bases, their
    features on the tokens fitted to and the square matrix of these, and the down projections that
    are solved for, before and after. Of multiplexed experts: the student, what is made of one of
    its groups, the calibration tokens; halving trains half of the experts."""
    shape = teacher.shape
    experts = shape.layer_numbers
    if any(layer.is_multiplexed for layer in plan.layers.values()):
        student = plan.expert_parameters // len(plan.layers)
        members = -(-shape.experts // max(min(x.groups for x in plan.layers.values()), 1))
        making = student + GROUP_COPIES * members * experts // shape.experts
        making += 2 * factor.fit_tokens * (shape.hidden + shape.experts)
        halving = 3 * experts if halves else 0
        return experts * teacher.itemsize + 4 * max(making, student + halving)
    widest = max(max(layer.groups, 1) for layer in plan.layers.values()) * shape.intermediate
    bases = 3 * widest * shape.hidden
    fitting = 2 * factor.fit_tokens * widest + widest**2 + 3 * widest * shape.hidden
    return experts * teacher.itemsize + 4 * (bases + fitting)
