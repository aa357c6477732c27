"""The settings of every stage: one frozen dataclass each, from which flags and YAML are derived.

A field's name is its flag (``batch_tokens`` is ``--batch-tokens``) and its key in a YAML file; its
metadata holds the help text. Values are checked where they are made, before any work starts.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from moefuse.errors import UserError

GROUPINGS = ("coactivation", "output", "weight", "hierarchical", "dominant", "state", "topk")
MULTIPLEXED_GROUPINGS = ("coactivation", "state", "topk")
"""Those that the release of 2025 has words for, which ``--form multiplexed`` is made by."""
MERGES = ("slerp", "sce", "mean", "greedy")
MIXTURES = ("mixture", "lora")
BASES = ("auto", "mean", "neurons")
DELTA_KINDS = ("low_rank",)
DTYPES = ("auto", "float32", "bfloat16", "float16")
ENGINES = ("transformers", "vllm")
LARGEST_SEED = 2**32 - 1
DELTA_BITS = ("16", "8", "4")

Stage = TypeVar("Stage")


def setting(
    default: Any,
    help_text: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Declare a field with its help text and the values that make sense.

    ``at_least`` and ``at_most`` bound a number, ``choices`` lists the words that a text may be.
    """
    allowed = {"at_least": at_least, "at_most": at_most, "choices": choices}
    return field(default=default, metadata={"help": help_text, **allowed})


@dataclass(frozen=True)
class ComputeConfig:
    """Where and how to compute."""

    device: str = setting("auto", "Device to compute on: auto, cpu, cuda, cuda:1, ...")
    dtype: str = setting(
        "auto", f"Working dtype: {', '.join(DTYPES)} (auto: the checkpoint's).", choices=DTYPES
    )
    seed: int = setting(0, "Seed of everything random.", at_least=0, at_most=LARGEST_SEED)


@dataclass(frozen=True)
class CalibrateConfig:
    """What text the teacher is calibrated on, and how much of it."""

    data: str | None = setting(
        None, "Calibration text: a file, a folder, JSONL with text or messages, or a hub data set."
    )
    tokens: int = setting(131_072, "Calibration tokens.", at_least=2)
    sequence_length: int = setting(512, "Tokens in one calibration sequence.", at_least=2)
    batch_size: int = setting(8, "Sequences in one batch.", at_least=1)
    sensitivity_tokens: int = setting(
        8192,
        "Calibration tokens whose gradients tell how much the logits feel of each layer's errors; "
        "0 takes all layers' errors as they are.",
        at_least=0,
    )


LOSSES = ("auto", "output", "logits")
INPUTS = ("auto", "teacher", "student")
PRECISIONS = ("float32", "bfloat16")
BITS = ("auto", "1", "2", "4", "16")
SPREADS = ("model", "layer")
MULTIPLEXED = "multiplexed"
FORMS = ("auto", "low-rank", "neurons", MULTIPLEXED)
BUDGETS = ("params", "bytes", "expert_bits")
"""Settings that each say how large the student may be; at most one is given."""


@dataclass(frozen=True)
class SizeConfig:
    """How large the student is to be; the planner chooses what is not given."""

    groups: int | None = setting(None, "Fused experts in a layer (G).", at_least=1)
    rank: int | None = setting(None, "Rank of every expert's delta (R).", at_least=0)
    params: str | None = setting(None, "Parameters of the whole student, such as 4B.")
    bytes: str | None = setting(None, "Bytes of the whole student on disk, such as 6GB.")
    expert_bits: float | None = setting(
        None,
        "Bits stored per number of the teacher's routed experts (16: unfused bf16).",
        at_least=0,
    )
    bits: str = setting(
        "auto",
        "Bits that own neurons may have under a budget: auto (1, 2, 3, 4, 8 or 16, as each is "
        "worth), or 1, 2, 4 or 16 alone; --params always takes 16.",
        choices=BITS,
    )
    shared: int | None = setting(
        None,
        "Neurons of a layer that all its experts share; the planner's choice without.",
        at_least=0,
    )
    spread: str = setting(
        "model",
        "Over what a budget is spread by what neurons are worth: model, all layers; layer, each "
        "layer has its own share.",
        choices=SPREADS,
    )
    form: str = setting(
        "auto",
        "What experts become: low-rank, shared bases and low-rank deltas; neurons, own neurons at "
        "unequal bits and a few shared ones; multiplexed, the recipe of the checkpoints published "
        "in 2025, for comparison; auto, neurons where a budget is given without --groups or "
        "--rank.",
        choices=FORMS,
    )
    mixture: str | None = setting(
        None,
        "Adapters of --form multiplexed: mixture, one for every member of a group, which is taken "
        "without; lora, one for a group, which members mask.",
        choices=MIXTURES,
    )

    def __post_init__(self) -> None:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            first, second = (flag_of(name) for name in budgets[:2])
            raise UserError(f"{first} and {second} both set the budget; give one of them.")
        of_bases = [name for name in ("groups", "rank") if getattr(self, name) is not None]
        if self.form == "neurons" and of_bases:
            raise UserError(
                f"{flag_of(of_bases[0])} is for shared bases and deltas; leave it out with "
                "--form neurons."
            )
        if self.mixture is not None and self.form != MULTIPLEXED:
            raise UserError("--mixture is for adapters of --form multiplexed; add that form.")
        if self.form not in ("low-rank", MULTIPLEXED) and not of_bases:
            return
        of_neurons = [
            declared.name
            for declared in dataclasses.fields(self)
            if declared.name in ("expert_bits", "bits", "shared", "spread")
            and getattr(self, declared.name) != declared.default
        ]
        if of_neurons:
            other = flag_of(of_bases[0]) if of_bases else f"--form {self.form}"
            raise UserError(
                f"{flag_of(of_neurons[0])} is for own neurons; leave out either it or {other}."
            )


@dataclass(frozen=True)
class MemoryConfig:
    """What the student is to run in, and how it is run there."""

    vram: str | None = setting(
        None, "Memory of the device that the student is to run on, such as 24GB; needs --context."
    )
    context: int | None = setting(
        None, "Tokens that a sequence may have, prompt and answer together.", at_least=1
    )
    batch: int = setting(1, "Sequences held at the same time.", at_least=1)
    engine: str = setting(
        "transformers", f"What runs the student: {' or '.join(ENGINES)}.", choices=ENGINES
    )


@dataclass(frozen=True)
class GroupConfig:
    """How experts are put into groups."""

    grouping: str = setting(
        "auto",
        f"How experts are grouped: {', '.join(GROUPINGS)}; auto, dominant, or with --form "
        "multiplexed coactivation.",
        choices=(*GROUPINGS, "auto"),
    )
    progressive: bool = setting(
        False,
        "Halve the groups of --form multiplexed again and again, and train in between; each "
        "halving pairs by outputs.",
    )


@dataclass(frozen=True)
class FactorConfig:
    """How a layer is split into bases and deltas before training."""

    base: str = setting(
        "auto",
        "What bases are made of: mean, the members' aligned mean; neurons, their most important "
        "neurons fitted to real inputs; auto, whichever errs less.",
        choices=BASES,
    )
    fit_tokens: int = setting(16_384, "Calibration tokens that bases are fitted to.", at_least=1)
    alternations: int = setting(1, "Rounds of refitting base and deltas in turn.", at_least=0)
    align: bool = setting(True, "Match neurons before averaging.")
    routed_mass: bool = setting(True, "Weigh the members of a mean by their routed mass.")
    damping: float = setting(
        1.0, "Damping of the inputs' second moment: 0 whitens, 1 ignores it.", at_least=0, at_most=1
    )
    scale: bool = setting(True, "Give every expert a scale per neuron.")
    bias: bool = setting(False, "Give every expert a bias per neuron.")
    merge: str | None = setting(
        None,
        "What bases of --form multiplexed are of their members, neurons not matched: slerp, their "
        "mean on the sphere around the first; sce, select, calculate, erase; mean; greedy, the "
        "mean of those only that lower the error. Without, slerp, or sce with --progressive.",
        choices=MERGES,
    )

    def __post_init__(self) -> None:
        if self.base == "neurons" and not self.scale:
            raise UserError(
                "--base neurons needs scales; leave out --no-scale or choose --base mean."
            )


def merge_of(group: GroupConfig, factor: FactorConfig) -> str:
    """Return the merge of ``--form multiplexed``: the one asked for, or its default."""
    return factor.merge or ("sce" if group.progressive else "slerp")


def settled_grouping(size: SizeConfig, group: GroupConfig) -> GroupConfig:
    """Return the settings with the way of grouping that ``auto`` means for a form."""
    if group.grouping != "auto":
        return group
    usual = "coactivation" if size.form == MULTIPLEXED else "dominant"
    return dataclasses.replace(group, grouping=usual)


def check_form(size: SizeConfig, group: GroupConfig, factor: FactorConfig) -> None:
    """Raise ``UserError`` for settings of one form that are given with another."""
    if size.form != MULTIPLEXED:
        for flag, given in (("--merge", factor.merge), ("--progressive", group.progressive)):
            if given:
                raise UserError(f"{flag} is for --form multiplexed; add that form.")
        return
    for declared in dataclasses.fields(factor):
        kept = declared.name in ("fit_tokens", "merge")
        if not kept and getattr(factor, declared.name) != declared.default:
            raise UserError(
                f"{flag_of(declared.name)} is for shared bases and low-rank deltas; leave it out "
                "with --form multiplexed."
            )
    if group.grouping not in ("auto", *MULTIPLEXED_GROUPINGS):
        raise UserError(
            f"--grouping {group.grouping} is not of the recipe of --form multiplexed; choose from "
            f"{', '.join(MULTIPLEXED_GROUPINGS)}."
        )
    if group.progressive and group.grouping not in ("auto", "state"):
        raise UserError(
            f"--progressive pairs bases by their outputs and not by {group.grouping}; leave "
            "--grouping out."
        )
    if group.progressive and factor.merge == "greedy":
        raise UserError(
            "--merge greedy would drop members that --progressive is to pair; choose slerp, sce or "
            "mean."
        )


@dataclass(frozen=True)
class DistillConfig:
    """How a layer is distilled."""

    steps: int = setting(
        400, "Optimiser steps per layer; 0 leaves the student one-shot.", at_least=0
    )
    batch_tokens: int = setting(1024, "Tokens in one distillation step.", at_least=1)
    learning_rate: float = setting(
        2e-3, "Peak learning rate of bases and shared neurons.", at_least=0, at_most=1
    )
    delta_learning_rate: float = setting(
        2e-3, "Peak learning rate of the deltas.", at_least=0, at_most=1
    )
    neuron_learning_rate: float = setting(
        1e-3, "Peak learning rate of own neurons in 16 bits.", at_least=0, at_most=1
    )
    code_learning_rate: float = setting(
        3e-3, "Peak learning rate of low-bit own rows and codebooks.", at_least=0, at_most=1
    )
    shared_code_learning_rate: float = setting(
        1.5e-2, "Peak learning rate of low-bit shared rows and gains.", at_least=0, at_most=1
    )
    scale_learning_rate: float = setting(
        1e-2, "Peak learning rate of scales and biases.", at_least=0, at_most=1
    )
    warmup: float = setting(0.05, "Share of the steps spent warming up.", at_least=0, at_most=1)
    loss: str = setting(
        "auto",
        "What distillation lessens: output, the layer's squared error; logits, the same weighed by "
        "what the logits feel; auto, logits for own neurons.",
        choices=LOSSES,
    )
    inputs: str = setting(
        "auto",
        "What a layer is distilled on: teacher, what the teacher's layer receives; student, what "
        "it receives above the students of lower layers, so that it can mend their errors; auto, "
        "student for own neurons.",
        choices=INPUTS,
    )
    precision: str = setting(
        "float32",
        "What distillation's matrix products compute in: float32 or bfloat16, which GPUs are far "
        "faster at. Weights and optimiser stay in float32.",
        choices=PRECISIONS,
    )
    held_back: float = setting(
        0.05, "Share of the tokens that only measure.", at_least=0, at_most=0.5
    )


@dataclass(frozen=True)
class TeachConfig:
    """What of a teacher's logits is kept for healing without it, and on what text."""

    data: str | None = setting(
        None, "Text to heal on: a file, a folder, JSONL with text or messages, or a hub data set."
    )
    tokens: str = setting("10M", "Tokens to take from the text, such as 10M.")
    top: int = setting(64, "Likeliest words whose logits are kept of every token.", at_least=1)
    tail: int = setting(
        8, "Words drawn from the rest of every token's distribution, so that it counts.", at_least=1
    )
    sequence_length: int = setting(512, "Tokens in one packed row.", at_least=2)
    batch_size: int = setting(8, "Rows in one batch.", at_least=1)
    wave_tokens: str = setting(
        "1M", "Tokens that pass through the teacher together; the disk holds their hidden states."
    )

    @property
    def token_count(self) -> int:
        """``tokens`` as a number; raises ``UserError``."""
        return parse_count(self.tokens, "--tokens", of="tokens")

    @property
    def wave_rows(self) -> int:
        """How many rows pass through the teacher together, whole batches; raises ``UserError``."""
        rows = parse_count(self.wave_tokens, "--wave-tokens", of="tokens") // self.sequence_length
        return max(rows // self.batch_size, 1) * self.batch_size


@dataclass(frozen=True)
class AssembleConfig:
    """How the student is written."""

    max_shard: str = setting("4GB", "Largest size of one weight file.")


@dataclass(frozen=True)
class MeasureConfig:
    """On what text a student is measured for its model card."""

    held_out: str | None = setting(
        None,
        "Text to measure the student on, for its model card; without, the bundled teacher's own, "
        "or the documents of --data that calibration left over.",
    )
    held_out_tokens: int = setting(
        12_288, "Most tokens to measure on; 0 leaves the student unmeasured.", at_least=0
    )


@dataclass(frozen=True)
class CollapseConfig:
    """How a student becomes a plain model with as many experts as it has groups."""

    data: str | None = setting(
        None, "Text to distil on: a file, a folder, JSONL with text or messages, or a hub data set."
    )
    tokens: int = setting(131_072, "Tokens to distil on.", at_least=2)
    sequence_length: int = setting(512, "Tokens in one sequence.", at_least=2)
    batch_size: int = setting(8, "Sequences in one batch.", at_least=1)
    router_steps: int = setting(
        200, "Optimiser steps in which a router alone learns what its groups weigh.", at_least=0
    )
    steps: int = setting(400, "Optimiser steps per layer of router and experts.", at_least=0)
    batch_tokens: int = setting(1024, "Tokens in one step.", at_least=1)
    learning_rate: float = setting(
        2e-3, "Peak learning rate of router and experts.", at_least=0, at_most=1
    )
    held_out: str | None = setting(
        None, "Text that nothing learns from, to measure on what is lost against the student."
    )
    held_out_tokens: int = setting(12_288, "Most tokens to measure on.", at_least=2)
    max_shard: str = setting("4GB", "Largest size of one weight file.")


@dataclass(frozen=True)
class QuantizeConfig:
    """How a student is stored in the format of a quantiser."""

    scheme: str = setting(
        "w4a16",
        "w4a16, gptq, awq, w8a16, w8a8, fp8 (compressed-tensors); nf4 (bitsandbytes); "
        "int4-torchao, hqq4 (torchao).",
    )
    what: str = setting(
        "bases", "What is rounded, with commas between: bases, shared, attention, dense."
    )
    delta_bits: str | None = setting(
        None,
        "Bits of a number of deltas: 8 or 4 in moefuse's own packed form, 16 as they are. "
        "[default: 8]",
        choices=DELTA_BITS,
    )
    refit: bool | None = setting(
        None,
        "Let every layer learn from the text to make up for its rounding. [default: with --data, "
        "in schemes of 4 bits]",
    )
    steps: int = setting(120, "Optimiser steps of a layer when refitting.", at_least=1)
    prediction_steps: int = setting(
        0,
        "Optimiser steps in which deltas, scales and bases' codes then learn what the student "
        "predicted before its bases were rounded; the whole model in memory, twice, in fp32.",
        at_least=0,
    )
    device: str = setting(
        "auto",
        "Device that text passes through and that layers and predictions learn on: auto, cpu, "
        "cuda, cuda:1, ...",
    )
    seed: int = setting(
        0, "Seed of which tokens a step of refitting sees.", at_least=0, at_most=LARGEST_SEED
    )
    scales: str = setting(
        "search",
        "How scales are chosen: search, by least error; widest, to reach the greatest number.",
        choices=("search", "widest"),
    )
    group_size: int | None = setting(
        None,
        "Numbers that share a scale, in schemes of 4 bits but nf4. [default: 128, 64 or 32, as "
        "they fit]",
        at_least=1,
    )
    data: str | None = setting(
        None, "Text that errors are weighed by: a file, a folder, JSONL or a hub data set."
    )
    tokens: int = setting(65_536, "Tokens of that text.", at_least=2)
    sequence_length: int = setting(512, "Tokens in one sequence.", at_least=2)
    batch_size: int = setting(8, "Sequences in one batch.", at_least=1)
    max_shard: str = setting("4GB", "Largest size of one weight file.")


@dataclass(frozen=True)
class StoreConfig:
    """How a student that is planned will be stored."""

    scheme: str | None = setting(
        None,
        "Count the bytes that 'moefuse quantize' will leave of the student by this scheme: w4a16, "
        "gptq, w8a16, ...",
    )
    group_size: int | None = setting(
        None,
        "Numbers that share a scale in that scheme. [default: 128, 64 or 32, as they fit]",
        at_least=1,
    )
    delta_bits: str | None = setting(
        None, "Bits of a number of deltas beside that scheme. [default: 8]", choices=DELTA_BITS
    )


LAUNCHES = ("here", "ray")


@dataclass(frozen=True)
class LaunchConfig:
    """Where layers that need nothing of each other are made."""

    launch: str = setting(
        "here",
        "Where layers are made: here, one after another in this process; ray, as tasks of a Ray "
        "cluster, whose machines must all see the checkpoint and --work under the same path.",
        choices=LAUNCHES,
    )
    ray_address: str | None = setting(
        None,
        "Address of the Ray cluster, such as 10.0.0.1:6379; without, the one that RAY_ADDRESS or "
        "'ray start' on this machine names, else one of this machine alone.",
    )
    ray_cpus: int | None = setting(
        None,
        "CPUs and threads of a task; without, the threads that this process would compute on.",
        at_least=1,
    )
    ray_memory: str | None = setting(
        None, "Memory of a task, such as 20GB; without, the plan's estimate."
    )
    ray_retries: int = setting(
        3, "How often a layer is begun again after its process or machine died.", at_least=0
    )

    def __post_init__(self) -> None:
        if self.ray_memory is not None:
            parse_bytes(self.ray_memory, "--ray-memory")
        for declared in dataclasses.fields(self):
            given = getattr(self, declared.name) != declared.default
            if given and self.launch != "ray":
                raise UserError(f"{flag_of(declared.name)} is for Ray; add --launch ray.")


TRAINED = ("all", "experts", "deltas")


@dataclass(frozen=True)
class HealConfig:
    """How a whole student is healed: end to end, against the teacher's predictions."""

    data: str | None = setting(
        None, "Text to heal on: a file, a folder, JSONL with text or messages, or a hub data set."
    )
    tokens: str = setting("10M", "Tokens to train on; text that holds fewer is used again.")
    sequence_length: int = setting(512, "Tokens in one row of packed text.", at_least=2)
    batch_size: int = setting(16, "Rows in one batch of one process.", at_least=1)
    accumulate: int = setting(1, "Batches of a process in one optimiser step.", at_least=1)
    train: str = setting(
        "all",
        "What is trained: all; experts, the routed ones; deltas, only what every expert has of its "
        "own beside its base (deltas, scales, biases), which takes the least memory.",
        choices=TRAINED,
    )
    router: bool | None = setting(None, "Train the router as well. [default: with --train all]")
    expert_rate: float = setting(
        5e-4, "Peak learning rate of the routed experts.", at_least=0, at_most=1
    )
    code_rate: float = setting(
        1e-3, "Peak learning rate of low-bit rows and codebooks.", at_least=0, at_most=1
    )
    rate: float = setting(
        2.5e-4, "Peak learning rate of all else: attention, embeddings, ...", at_least=0, at_most=1
    )
    router_rate: float = setting(2.5e-4, "Peak learning rate of the router.", at_least=0, at_most=1)
    warmup: float = setting(0.05, "Share of the steps spent warming up.", at_least=0, at_most=1)
    final_rate: float = setting(
        0.05, "Share of the peak learning rate left at the end.", at_least=0, at_most=1
    )
    weight_decay: float = setting(0.0, "Weight decay.", at_least=0, at_most=1)
    forward_kl: float = setting(
        1.0, "Weight of KL(teacher || student) of the predictions.", at_least=0
    )
    reverse_kl: float = setting(
        0.0, "Weight of KL(student || teacher) of the predictions.", at_least=0
    )
    cross_entropy: float = setting(0.0, "Weight of the text's own cross-entropy.", at_least=0)
    hidden: float = setting(
        0.0, "Weight of the distance of all layers' hidden states from the teacher's.", at_least=0
    )
    temperature: float = setting(
        1.0, "Temperature of both models' predictions in the losses.", at_least=0.01, at_most=100
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute layers on the way back, for less memory and a third more time."
    )
    save_steps: int = setting(200, "Optimiser steps between checkpoints.", at_least=1)
    logging_steps: int = setting(10, "Optimiser steps between lines of the log.", at_least=1)
    eval_steps: int = setting(
        100, "Optimiser steps between measurements on --held-out.", at_least=1
    )
    report_to: str = setting(
        "none", "Where Hugging Face Trainer reports to besides: none, tensorboard, wandb, ..."
    )

    def __post_init__(self) -> None:
        parse_count(self.tokens, "--tokens")
        if not (self.forward_kl or self.reverse_kl or self.cross_entropy or self.hidden):
            raise UserError(
                "All losses have the weight 0; give one of --forward-kl, --reverse-kl, "
                "--cross-entropy and --hidden a weight."
            )

    @property
    def trains_router(self) -> bool:
        """Whether the router is trained."""
        return self.train == "all" if self.router is None else self.router


def flag_of(name: str) -> str:
    """Return the flag of a setting: ``--expert-bits`` of ``expert_bits``."""
    return "--" + name.replace("_", "-")


def fields_of(stages: Sequence[type]) -> dict[str, dataclasses.Field]:
    """Return the fields of several stages by name; no two stages share a name."""
    found: dict[str, dataclasses.Field] = {}
    for stage in stages:
        for declared in dataclasses.fields(stage):
            assert declared.name not in found, declared.name
            found[declared.name] = declared
    return found


def build(stage: type[Stage], values: Mapping[str, Any]) -> Stage:
    """Make one stage's settings from whatever of ``values`` belongs to it; None means default.

    Raises ``UserError`` for a value of the wrong kind or beyond what makes sense.
    """
    given: dict[str, Any] = {}
    for declared in dataclasses.fields(stage):  # type: ignore[arg-type]
        value = values.get(declared.name)
        if value is not None:
            given[declared.name] = _checked(declared, value)
    return stage(**given)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _checked(declared: dataclasses.Field, value: Any) -> Any:
    """Return the value as the kind it is declared to be; raises ``UserError``."""
    flag = flag_of(declared.name)
    kind = next(kind for kind in _KINDS if kind in (declared.type, *get_args(declared.type)))
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{flag} is {value!r}; it must be {_KINDS[kind]}.")
    if kind in (int, float):
        _check_bounds(flag, value, declared.metadata)
    choices = declared.metadata["choices"]
    if choices is not None and value not in choices:
        raise UserError(f"{flag} is {value!r}; choose from {', '.join(choices)}.")
    # A file's 1 and a flag's 1.0 are one setting and must have one fingerprint.
    return kind(value)


def _check_bounds(flag: str, value: float, allowed: Mapping[str, Any]) -> None:
    smallest, largest = allowed["at_least"], allowed["at_most"]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag} is {value}; it must be a finite number.")
    if smallest is not None and value < smallest:
        raise UserError(f"{flag} is {value}; it must be at least {smallest}.")
    if largest is not None and value > largest:
        raise UserError(f"{flag} is {value}; it must be at most {largest}.")


def read_yaml(
    path: Path, stages: Sequence[type], renamed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Read settings from a YAML file whose keys are field names (dashes count as underscores).

    ``renamed`` are the fields that have another name in this command, with that name. Raises
    ``UserError`` for a file that cannot be read and for a key that no stage knows.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The configuration {path} cannot be read: {reason}.") from error
    if not isinstance(loaded, dict):
        raise UserError(f"The configuration {path} must be a mapping of settings to values.")
    values = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    named = {(renamed or {}).get(name, name): name for name in fields_of(stages)}
    for key in values:
        if key not in named:
            raise UserError(
                f"The configuration {path} has the key {key!r}, which is no setting of this "
                f"command; it knows {', '.join(named)}."
            )
    return {named[key]: value for key, value in values.items()}


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def parse_count(text: str, flag: str, of: str = "parameters") -> int:
    """Read ``4B``, ``350M`` or ``1.5e9`` as a number of what ``of`` says; raises ``UserError``."""
    return _parse(text, flag, f"a number of {of} such as 4B or 350M", text.strip().upper())


def parse_bytes(text: str, flag: str) -> int:
    """Read ``6GB``, ``500 MB`` or ``6e9`` as bytes (decimal units); raises ``UserError``."""
    trimmed = text.strip().upper().removesuffix("B").strip()
    return _parse(text, flag, "a size such as 6GB or 500MB", trimmed)


def _parse(text: str, flag: str, wanted: str, trimmed: str) -> int:
    unit = trimmed[-1:] if trimmed[-1:].isalpha() else ""
    try:
        value = float(trimmed.removesuffix(unit)) * _UNITS[unit]
    except (ValueError, KeyError):
        raise UserError(f"{flag} is {text!r}, which is not {wanted}.") from None
    if not 1 <= value < 1e18:
        raise UserError(f"{flag} is {text!r}, which is not {wanted}.")
    return round(value)
