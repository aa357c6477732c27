"""``moefuse plan``: what a size costs, from headers alone, and how plans and results are shown."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from moefuse.checkpoint.formats import check_known
from moefuse.checkpoint.headers import CheckpointHeaders, read_headers
from moefuse.checkpoint.promises import check_experts
from moefuse.config import (
    BUDGETS,
    CalibrateConfig,
    ComputeConfig,
    DistillConfig,
    FactorConfig,
    GroupConfig,
    MemoryConfig,
    SizeConfig,
    StoreConfig,
    build,
    check_form,
    flag_of,
    parse_bytes,
)
from moefuse.devices import choose_device, choose_dtype, stored_dtype
from moefuse.errors import UserError
from moefuse.evaluation.forecast import Expected, Forecast, read_experience
from moefuse.export.quantized.deltas import DEFAULT_BITS, stored_kind
from moefuse.export.quantized.schemes import bytes_of_bases
from moefuse.families import Family, family_of
from moefuse.families.base import optional
from moefuse.fusion.advice import percent_kept
from moefuse.fusion.memory import (
    Memory,
    Needs,
    Serving,
    fit_to_memory,
    memory_of,
    running_needs,
    smallest_bytes,
)
from moefuse.fusion.plan import (
    Estimate,
    Teacher,
    describe_teacher,
    estimate,
    make_plan,
    matrix_rate,
)
from moefuse.sizes import LayerPlan, Plan, Storing

COMMON_VRAM = (8, 12, 16, 24, 48, 80)
"""Sizes of common graphics cards, in GB."""
COMMON_COLUMNS = ("memory", "runs", "energy\nlost", "parameters", "weights", "free")


@dataclass(frozen=True)
class Planned:
    """A plan with what carrying it out and running the student take.

    ``plan`` and ``estimate`` are None where the unfused teacher fits the memory that was asked
    for; ``serving`` and ``memory`` are None where no context was given, ``quality`` where no
    measured grid was; ``store`` tells by what scheme the student will be quantised, if by any.
    """

    source: str
    plan: Plan | None
    estimate: Estimate | None
    serving: Serving | None = None
    memory: Memory | None = None
    quality: Forecast | None = None
    store: StoreConfig = field(default_factory=StoreConfig)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; ``teacher_fits`` tells that nothing has to be fused."""
        return {
            "source": self.source,
            "teacher_fits": self.plan is None,
            **(self.plan.to_json() if self.plan else {}),
            "scheme": self.store.scheme,
            "delta_bits": self.store.delta_bits,
            "estimate": asdict(self.estimate) if self.estimate else None,
            "serving": asdict(self.serving) if self.serving else None,
            "memory": self.memory.to_json() if self.memory else None,
            **({"quality": self.quality.to_json()} if self.quality else {}),
        }


@dataclass(frozen=True)
class Fit:
    """What runs on a device of ``vram`` bytes: a student, the ``teacher`` itself, or nothing.

    ``memory`` is what it takes, or, with a negative ``free``, what the smallest student would.
    """

    runs: str
    plan: Plan | None
    memory: Memory


@dataclass(frozen=True)
class CommonSizes:
    """What runs on devices of common sizes."""

    source: str
    serving: Serving
    fits: tuple[Fit, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a row's ``plan`` is null where no student is needed or fits."""
        rows = [
            {
                "runs": fit.runs,
                "plan": fit.plan.to_json() if fit.plan else None,
                "memory": fit.memory.to_json(),
            }
            for fit in self.fits
        ]
        return {"source": self.source, "serving": asdict(self.serving), "rows": rows}


def plan_checkpoint(
    checkpoint: str | Path, values: Mapping[str, Any], *, revision: str | None = None
) -> Planned:
    """Plan a student of ``checkpoint``, a directory or hub id, reading only its headers.

    ``values`` are settings by name (``groups``, ``rank``, ``params``, ``bytes``, ``vram``,
    ``context``, ``tokens``, ...). Raises ``UserError`` for a size that cannot be had.
    """
    headers, family, teacher = _headers_of(checkpoint, revision)
    size, factor = _wishes(values)
    store = build(StoreConfig, values)
    teacher, size = _stored_by(store, teacher, size)
    serving = _serving(headers, family, values)
    if serving is None:
        plan = make_plan(teacher, size, factor)
        expected = _expected(headers, family, teacher, plan, values)
        return Planned(str(checkpoint), plan, expected, store=store)
    needs = running_needs(headers.config, family, serving)
    vram = _vram(build(MemoryConfig, values), size)
    if vram is None:
        plan = make_plan(teacher, size, factor)
    else:
        plan = fit_to_memory(teacher, vram, needs, size, factor)
    return Planned(
        str(checkpoint),
        plan,
        _expected(headers, family, teacher, plan, values) if plan else None,
        serving,
        memory_of(plan.bytes if plan else teacher.bytes, needs, vram),
        store=store,
    )


def with_quality(
    planned: Planned,
    checkpoint: str | Path,
    scaling: str | Path,
    *,
    tokens: int | None = None,
    revision: str | None = None,
) -> Planned:
    """Add what the grid in ``scaling`` (see ``read_experience``) foretells of a plan's quality.

    ``tokens`` are those to heal on, None for the most that were measured. Raises ``UserError`` for
    a student of own neurons or a multiplexed one, which no grid measures; where the teacher fits
    nothing is foretold.
    """
    experience = read_experience(scaling)
    if planned.plan is None:
        return planned
    layer = next(iter(planned.plan.layers.values()))
    if layer.is_multiplexed:
        raise UserError(
            "--scaling foretells students of shared bases and deltas; leave it out with --form "
            "multiplexed."
        )
    if layer.neurons is not None:
        raise UserError(
            "--scaling foretells students of shared bases and deltas, and a budget alone chooses "
            "own neurons; add --form low-rank, --groups or --rank."
        )
    config = read_headers(checkpoint, revision=revision).config
    quality = experience.forecast(config, layer.groups, layer.rank, tokens)
    return replace(planned, quality=quality)


def asks_for_common_sizes(values: Mapping[str, Any]) -> bool:
    """Tell whether settings by name give a context, but neither a size nor a device."""
    sized = ("groups", "rank", *BUDGETS, "vram")
    return values.get("context") is not None and all(values.get(name) is None for name in sized)


def plan_common_sizes(
    checkpoint: str | Path, values: Mapping[str, Any], *, revision: str | None = None
) -> CommonSizes:
    """Plan a student of ``checkpoint`` for every size in ``COMMON_VRAM``, from its headers alone.

    ``values`` are settings by name and must hold ``context``. Raises ``UserError`` for a context
    that the model does not take.
    """
    headers, family, teacher = _headers_of(checkpoint, revision)
    serving = _serving(headers, family, values)
    assert serving is not None
    needs = running_needs(headers.config, family, serving)
    size, factor = _wishes(values)
    teacher, size = _stored_by(build(StoreConfig, values), teacher, size)
    fits = (_fit(teacher, vram * 10**9, needs, size, factor) for vram in COMMON_VRAM)
    return CommonSizes(str(checkpoint), serving, tuple(fits))


def _wishes(values: Mapping[str, Any]) -> tuple[SizeConfig, FactorConfig]:
    """Return what is asked of the student; raises ``UserError`` for settings of another form."""
    size, factor = build(SizeConfig, values), build(FactorConfig, values)
    check_form(size, build(GroupConfig, values), factor)
    return size, factor


def _stored_by(
    store: StoreConfig, teacher: Teacher, size: SizeConfig
) -> tuple[Teacher, SizeConfig]:
    """Let the planner count bases and deltas as a quantiser's scheme stores them, if one is named.

    Own neurons have no bases, so a budget alone then chooses bases and deltas. Raises ``UserError``
    for a scheme or group size that cannot be had.
    """
    if store.scheme is None:
        for name in ("group_size", "delta_bits"):
            if getattr(store, name) is not None:
                flag = flag_of(name)
                raise UserError(f"{flag} is for a --scheme that bases are stored by; add one.")
        return teacher, size
    if size.form not in ("auto", "low-rank"):
        raise UserError(
            f"--scheme is for shared bases, and --form {size.form} has none that 'moefuse "
            "quantize' takes; leave out one of the two."
        )
    widths = {teacher.shape.hidden, teacher.shape.intermediate}
    stored = bytes_of_bases(store.scheme, widths, store.group_size, teacher.itemsize)
    storing = Storing(stored, partial(stored_kind, bits=store.delta_bits or DEFAULT_BITS))
    return replace(teacher, storing=storing), replace(size, form="low-rank")


def _headers_of(
    checkpoint: str | Path, revision: str | None
) -> tuple[CheckpointHeaders, Family, Teacher]:
    """Read the headers of a teacher; raises ``UserError`` for one that cannot be read."""
    headers = read_headers(checkpoint, revision=revision)
    family = family_of(headers.config)
    check_known(headers.source, headers.config)
    check_experts(headers, family, family.shape(headers.config))
    return headers, family, describe_teacher(headers.config, headers.tensors, family)


def _fit(teacher: Teacher, vram: int, needs: Needs, size: SizeConfig, factor: FactorConfig) -> Fit:
    least = min(smallest_bytes(teacher, size, factor), teacher.bytes)
    if least + needs.total > vram:
        return Fit("nothing", None, memory_of(least, needs, vram))
    plan = fit_to_memory(teacher, vram, needs, size, factor)
    if plan is None:
        return Fit("teacher", None, memory_of(teacher.bytes, needs, vram))
    return Fit("student", plan, memory_of(plan.bytes, needs, vram))


def _serving(
    headers: CheckpointHeaders, family: Family, values: Mapping[str, Any]
) -> Serving | None:
    """Say how the model is to be run; None where no context is given."""
    wish = build(MemoryConfig, values)
    if wish.context is None:
        for name in ("vram", "batch", "engine"):
            if values.get(name) is not None:
                raise UserError(
                    f"--{name} needs --context, the tokens that a sequence may have, prompt and "
                    "answer together."
                )
        return None
    longest = optional(headers.config, "max_position_embeddings", 0)
    if longest and wish.context > longest:
        raise UserError(
            f"--context is {wish.context}, but this model takes at most {longest} tokens "
            "('max_position_embeddings' in config.json)."
        )
    stored = stored_dtype(headers.tensors, family, headers.config)
    return Serving(wish.context, wish.batch, wish.engine, stored.itemsize)


def _vram(wish: MemoryConfig, size: SizeConfig) -> int | None:
    """Return the device's bytes, or None; raises ``UserError`` beside another wish for a size."""
    if wish.vram is None:
        return None
    for name in BUDGETS:
        if getattr(size, name) is not None:
            raise UserError(f"--vram and {flag_of(name)} both set the budget; give one of them.")
    if size.groups is not None and size.rank is not None:
        raise UserError(
            "--groups and --rank together fix the size and leave --vram nothing to choose; leave "
            "one of the three out (without --vram the plan still tells the memory it takes)."
        )
    return parse_bytes(wish.vram, "--vram")


def _expected(
    headers: CheckpointHeaders,
    family: Family,
    teacher: Teacher,
    plan: Plan,
    values: Mapping[str, Any],
) -> Estimate:
    """Estimate what making the student takes, measuring the device's matrix rate."""
    compute = build(ComputeConfig, values)
    device = choose_device(compute.device)
    stored = stored_dtype(headers.tensors, family, headers.config)
    dtype = choose_dtype(compute.dtype, stored, device)
    return estimate(
        teacher,
        plan,
        build(CalibrateConfig, values),
        build(DistillConfig, values),
        build(FactorConfig, values),
        working_itemsize=dtype.itemsize,
        rate=matrix_rate(device, dtype),
        halves=build(GroupConfig, values).progressive,
    )


def render_plan(planned: Planned) -> Table:
    """Return a table of what the student will be and what making and running it take."""
    table = _table(f"Plan for {planned.source}")
    if planned.plan is None:
        table.add_row("student", "none needed: the teacher fits as it is")
    else:
        _add_layers(table, planned.plan, "energy of the experts lost, forecast")
        if planned.store.scheme is not None:
            table.add_row("bases and deltas stored by", _quantize_told(planned.store))
    if planned.quality is not None:
        _add_quality(table, planned.quality)
    if planned.estimate is not None:
        table.add_row("time, estimated", _duration(planned.estimate.seconds))
        table.add_row("disk, student and artifacts", _bytes(planned.estimate.disk_bytes))
        table.add_row("peak memory, estimated", _bytes(planned.estimate.memory_bytes))
    if planned.serving is not None and planned.memory is not None:
        _add_memory(table, planned.serving, planned.memory)
    return table


def _quantize_told(store: StoreConfig) -> str:
    given = {flag_of(name): value for name, value in asdict(store).items() if value is not None}
    return " ".join(["moefuse quantize", *(f"{flag} {value}" for flag, value in given.items())])


def _add_quality(table: Table, quality: Forecast) -> None:
    for expected in quality.expected:
        stage = f"healed on {expected.tokens:,} tokens" if expected.tokens else "not healed"
        table.add_row(f"KL to the teacher, {stage}", _expected_words(expected))
    teacher = quality.teacher if quality.is_same_teacher else f"another teacher, {quality.teacher}"
    table.add_row("  foretold by a grid of", teacher)


def _expected_words(expected: Expected) -> str:
    low, high = expected.interval
    beyond = ", ".join(expected.beyond)
    told = f"{expected.kl:.3g}, 95% of the time {low:.3g} to {high:.3g}"
    return told + (f"; extrapolated beyond the {beyond} measured" if beyond else "")


def render_common_sizes(sizes: CommonSizes) -> Table:
    """Return a table with one row for every common size of device."""
    first = sizes.fits[0].memory
    table = Table(
        title=f"{sizes.source}: what runs with {_served(sizes.serving)}",
        caption="Energy lost: share of the experts' output energy, forecast. Besides weights: "
        f"key-value cache {_bytes(first.cache)}, activations {_bytes(first.activations)}, "
        f"runtime {_bytes(first.runtime)}.",
        title_justify="left",
        caption_justify="left",
    )
    for name in COMMON_COLUMNS:
        table.add_column(name, justify="left" if name == "runs" else "right")
    for fit in sizes.fits:
        table.add_row(*_fit_cells(fit))
    return table


def _fit_cells(fit: Fit) -> tuple[str, ...]:
    memory = fit.memory
    assert memory.vram is not None and memory.free is not None
    device = f"{memory.vram // 10**9} GB"
    if fit.runs == "nothing":
        return device, f"nothing; {_bytes(memory.total)} are needed at least"
    taken = _bytes(memory.weights), _bytes(memory.free)
    if fit.plan is None:
        return device, "the teacher as it is", "", "", *taken
    lost = "" if fit.plan.energy_lost is None else percent_lost(fit.plan.energy_lost)
    return device, _common_words(fit.plan), lost, _count(fit.plan.parameters), *taken


def _common_words(plan: Plan) -> str:
    """Say in few words what every layer of a forecast becomes; a table has no room for more."""
    if plan.neurons_kept is None or plan.mean_bits is None:
        (runs,) = _runs(plan)
        return runs
    kept = plan.neurons_kept
    shared = max(layer.shared for layer in plan.layers.values())
    if shared and not kept:
        return f"{shared:,} neurons a layer, all shared"
    some = "every neuron" if kept == 1 else f"{percent_kept(kept)} of neurons"
    return f"{some} at {plan.mean_bits:.1f} bits" + f", {shared:,} shared" * (shared > 0)


def _served(serving: Serving) -> str:
    sequences = "" if serving.batch == 1 else f"{serving.batch} sequences of "
    engine = {"transformers": "Transformers", "vllm": "vLLM"}[serving.engine]
    return f"{sequences}{serving.context:,} tokens in {engine}"


def _add_memory(table: Table, serving: Serving, memory: Memory) -> None:
    of = "" if memory.vram is None else f" of {_bytes(memory.vram)}"
    table.add_row(f"memory, {_served(serving)}", f"{_bytes(memory.total)}{of}")
    table.add_row("  weights", _bytes(memory.weights))
    table.add_row("  key-value cache", _bytes(memory.cache))
    table.add_row("  activations", _bytes(memory.activations))
    table.add_row("  runtime, assumed", _bytes(memory.runtime))
    if memory.free is not None:
        table.add_row("  free", _bytes(memory.free))


def render_result(result: Any) -> Table:
    """Return a table of what ``fuse`` made."""
    table = _table(f"Fused: {result.out}")
    _add_layers(table, result.plan, "energy lost, from measured energies")
    for layer, error in result.errors.items():
        values = f"{error['before']:.4f} one-shot, {error['after']:.4f} distilled"
        table.add_row(f"relative error, layer {layer}", values)
    table.add_row("time", _duration(result.seconds))
    table.add_row("peak resident memory", _bytes(result.peak_bytes))
    return table


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    return table


def _add_layers(table: Table, plan: Plan, lost: str) -> None:
    """Add what a plan is; ``lost`` names the row of the energy lost, if that is known."""
    if plan.advice is not None:
        table.add_row("in plain words", plan.advice)
    if plan.energy_lost is not None:
        table.add_row(lost, percent_lost(plan.energy_lost))
    for told, layers in _runs(plan).items():
        table.add_row(f"layers {layers}", told)
    table.add_row("parameters", f"{_count(plan.parameters)} of {_count(plan.teacher_parameters)}")
    table.add_row("active per token, at most", _count(plan.active_parameters))
    table.add_row("bytes", f"{_bytes(plan.bytes)} of {_bytes(plan.teacher_bytes)}")
    table.add_row("bytes of the fused experts", _bytes(plan.expert_bytes))


def _runs(plan: Plan) -> dict[str, str]:
    """Say which layers become what, the layers as ranges: ``1-26``."""
    found: dict[str, list[int]] = {}
    for layer, chosen in plan.layers.items():
        found.setdefault(_layer_words(chosen), []).append(layer)
    return {told: _ranges(layers) for told, layers in found.items()}


def _layer_words(layer: LayerPlan) -> str:
    if layer.is_multiplexed:
        kind = layer.delta.removeprefix("multiplexed_")
        return f"{layer.groups} multiplexed experts, adapters ({kind}) of rank {layer.rank}"
    if layer.neurons is None:
        return f"{layer.groups} fused experts, deltas of rank {layer.rank}"
    own = ", ".join(
        f"{count:,} at {bits} bit{'' if bits == '1' else 's'}"
        for bits, count in layer.neurons.items()
    )
    return f"own neurons: {own or 'none'}" + (f"; {layer.shared:,} shared" * (layer.shared > 0))


def _ranges(layers: list[int]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _count(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e8 else f"{number / 1e6:.3f} M"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.3f} GB" if number >= 1e8 else f"{number / 1e6:.3f} MB"


def percent_lost(share: float) -> str:
    """Write a share of energy as a percentage; only nothing is 0%."""
    if 0 < share < 1e-4:
        return "<0.01%"
    return f"{share:.1%}" if share >= 0.01 else f"{share:.2%}" if share else "0%"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
