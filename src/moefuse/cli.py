"""The command line: one command a stage, each importing what it needs when it runs.

Flags are derived from the settings' dataclasses (see ``config``), so that a YAML file and the flags
can never disagree. A mistake of the user's ends in one sentence and exit status 2.
"""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from moefuse.artifacts import disk_full
from moefuse.config import (
    AssembleConfig,
    CalibrateConfig,
    CollapseConfig,
    ComputeConfig,
    DistillConfig,
    FactorConfig,
    GroupConfig,
    HealConfig,
    LaunchConfig,
    MeasureConfig,
    MemoryConfig,
    QuantizeConfig,
    SizeConfig,
    StoreConfig,
    TeachConfig,
    build,
    fields_of,
    parse_bytes,
    parse_count,
    read_yaml,
)
from moefuse.console import errors
from moefuse.errors import UserError


class _InterruptedError(Exception):
    """Ctrl-C, under a name that typer does not end the program for without a word."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _InterruptedError from None


app = typer.Typer(
    name="moefuse",
    cls=_Commands,
    help="Shrink Mixture-of-Experts language models by fusing their experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"moefuse {installed_version('moefuse')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version"),
    ] = False,
) -> None:
    pass


UP_TO_CALIBRATE = (ComputeConfig, CalibrateConfig)
UP_TO_GROUP = (*UP_TO_CALIBRATE, SizeConfig, GroupConfig)
UP_TO_FACTOR = (*UP_TO_GROUP, FactorConfig)
UP_TO_DISTILL = (*UP_TO_FACTOR, DistillConfig)
ALL_STAGES = (*UP_TO_DISTILL, AssembleConfig, MeasureConfig)

Checkpoint = Annotated[str, typer.Argument(help="A checkpoint directory or a hub id.")]
Work = Annotated[Path, typer.Argument(help="Directory for the artifacts of the stages.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub checkpoint.")]
HealData = Annotated[
    str | None, typer.Option(help="Text to heal on. [default: the calibration text]")
]
HealingFile = Annotated[
    Path | None,
    typer.Option(help="Settings of healing from a YAML file, as 'moefuse heal' takes them."),
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow the checkpoint's own Python code.")
]
Limit = Annotated[int | None, typer.Option(help="Most items of a task. [default: all]")]
FewShot = Annotated[
    int | None, typer.Option(help="Examples before each item. [default: the task's]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]


def with_settings(
    *stages: type, renamed: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of ``stages`` and ``--config``; it receives them as ``values``.

    ``renamed`` are settings whose usual flag means something else in this command, with the flag
    that they have instead.
    """
    flag_names = renamed or {}
    declared = fields_of(stages)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: Any, config: Path | None = None, **given: Any) -> None:
            flags = {name: given.pop(flag_names.get(name, name)) for name in declared}
            values = read_yaml(config, stages, flag_names) if config else {}
            values |= {name: value for name, value in flags.items() if value is not None}
            for stage in stages:
                build(stage, values)
            command(*args, values=values, **given)

        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [parameter for parameter in own if parameter.name != "values"]
        added = [
            _parameter(
                flag_names.get(name, name), field.type, field.metadata["help"], field.default
            )
            for name, field in declared.items()
        ]
        added.append(_parameter("config", Path, "Settings from a YAML file; flags win.", None))
        run.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(name: str, kind: Any, help_text: str, default: Any) -> inspect.Parameter:
    shown = help_text if default is None else f"{help_text} [default: {default}]"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, typer.Option(help=shown, show_default=False)],
    )


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _show(renderable: Any) -> None:
    Console().print(renderable)


@app.command("inspect")
def inspect_command(checkpoint: Checkpoint, revision: Revision = None, json_: Json = False) -> None:
    """Show what a checkpoint is made of, and what each size of student would cost."""
    from moefuse.checkpoint.inspection import inspect_checkpoint, render_inspection

    inspection = inspect_checkpoint(checkpoint, revision=revision)
    _print_json(inspection.to_json()) if json_ else _show(render_inspection(inspection))


@app.command()
@with_settings(*UP_TO_DISTILL, MemoryConfig, StoreConfig)
def plan(
    checkpoint: Checkpoint,
    values: dict[str, Any],
    scaling: Annotated[
        Path | None,
        typer.Option(help="A scaling.json of 'moefuse scaling': tell what quality it foretells."),
    ] = None,
    heal_tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens that the student is to be healed on, such as 4M, for --scaling. "
            "[default: the most that were measured]"
        ),
    ] = None,
    revision: Revision = None,
    json_: Json = False,
) -> None:
    """Choose what experts become for a size or a device's memory; tell what it loses and takes.

    With --context alone, show what runs on devices of common sizes.
    """
    from moefuse import planning

    if heal_tokens is not None and scaling is None:
        raise UserError("--heal-tokens needs --scaling, the grid that foretells what healing does.")
    if planning.asks_for_common_sizes(values):
        if scaling is not None:
            raise UserError("--scaling needs a size; give --groups, --rank, a budget or --vram.")
        sizes = planning.plan_common_sizes(checkpoint, values, revision=revision)
        _print_json(sizes.to_json()) if json_ else _show(planning.render_common_sizes(sizes))
        return
    planned = planning.plan_checkpoint(checkpoint, values, revision=revision)
    if scaling is not None:
        tokens = None if heal_tokens is None else parse_count(heal_tokens, "--heal-tokens")
        planned = planning.with_quality(
            planned, checkpoint, scaling, tokens=tokens, revision=revision
        )
    _print_json(planned.to_json()) if json_ else _show(planning.render_plan(planned))


@app.command()
@with_settings(*ALL_STAGES, LaunchConfig)
def fuse(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Directory of the fused checkpoint.")],
    values: dict[str, Any],
    work: Annotated[
        Path | None,
        typer.Option(help="Directory for artifacts, kept for other sizes. [default: OUT.work]"),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from what an interrupted run of the same job left.")
    ] = True,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    json_: Json = False,
) -> None:
    """Do the whole job: calibrate, group, factor, distil and write the student."""
    from moefuse.launch.fuse import fuse as run
    from moefuse.planning import render_result

    result = run(
        checkpoint,
        out,
        values,
        work=work,
        resume=resume,
        overwrite=overwrite,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    _print_json(result.to_json()) if json_ else _show(render_result(result))


def _stage_command(name: str, stages: tuple[type, ...], help_text: str) -> None:
    """Add a command that runs one stage alone."""

    @with_settings(*stages)
    def command(
        checkpoint: Checkpoint,
        work: Work,
        values: dict[str, Any],
        revision: Revision = None,
        trust_remote_code: RemoteCode = False,
    ) -> None:
        from moefuse.pipeline import Job

        job = Job(checkpoint, work, values, revision=revision, trust_remote_code=trust_remote_code)
        getattr(job, name)()

    app.command(name, help=help_text)(command)


# What is asked of the size and the loss decides whether gradients are needed.
CALIBRATES_FOR = (*UP_TO_CALIBRATE, SizeConfig, DistillConfig)
_stage_command("calibrate", CALIBRATES_FOR, "Keep what every MoE layer receives and returns.")
_stage_command("group", UP_TO_GROUP, "Choose which experts share a base.")
_stage_command("factor", UP_TO_FACTOR, "Split experts into bases and deltas in closed form.")
_stage_command("distill", UP_TO_DISTILL, "Train every layer's student against the teacher's.")


@app.command("assemble")
@with_settings(*ALL_STAGES)
def assemble_command(
    checkpoint: Checkpoint,
    work: Work,
    out: Annotated[Path, typer.Argument(help="Directory of the fused checkpoint.")],
    values: dict[str, Any],
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write the student's checkpoint from the artifacts of the stages before."""
    from moefuse.pipeline import Job, check_output

    check_output(out, overwrite=overwrite)
    job = Job(checkpoint, work, values, revision=revision, trust_remote_code=trust_remote_code)
    job.check_apart(out)
    job.assemble(out)


@app.command("teach")
@with_settings(ComputeConfig, TeachConfig)
def teach_command(
    checkpoint: Checkpoint,
    cache: Annotated[Path, typer.Argument(help="Directory of the teacher cache.")],
    values: dict[str, Any],
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    json_: Json = False,
) -> None:
    """Keep a teacher's likeliest words on a text, so that students heal without the teacher."""
    from moefuse.healing.teach import teach

    made = teach(
        checkpoint,
        cache,
        values,
        overwrite=overwrite,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if json_:
        _print_json(made.to_json())
        return
    kept = made.manifest
    typer.echo(
        f"Kept {kept.top} + {kept.tail} words of each of {kept.tokens} tokens in {cache}: "
        f"{kept.bytes_per_token:.0f} bytes a token, {made.seconds:.0f} s."
    )


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or hub id, fused or not.")],
    teacher: Annotated[str | None, typer.Option(help="The checkpoint it was made from.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Held-out text: a file, a folder, JSONL or a hub data set."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to measure on.")] = 65_536,
    sequence_length: Annotated[int, typer.Option(help="Tokens in one sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in one batch.")] = 8,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, YAML files or folders of them, with commas "
            "between or given again; text is then measured only with --data or --teacher."
        ),
    ] = None,
    limit: Limit = None,
    num_fewshot: FewShot = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype to compute in. [default: stored]")
    ] = None,
    trust_remote_code: RemoteCode = False,
    json_: Json = False,
) -> None:
    """Measure a model on held-out text or on tasks, and how close it stays to its teacher."""
    from moefuse.devices import choose_device
    from moefuse.evaluation.run import evaluate_command

    report = evaluate_command(
        model,
        teacher,
        data,
        tokens=tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        tasks=tasks or (),
        limit=limit,
        num_fewshot=num_fewshot,
        device=choose_device(device),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    _print_json(report.to_json()) if json_ else _show(report.table())


@app.command("heal")
@with_settings(ComputeConfig, HealConfig)
def heal_command(
    student: Annotated[str, typer.Argument(help="A checkpoint that moefuse wrote.")],
    out: Annotated[Path, typer.Argument(help="Directory of the healed checkpoint.")],
    values: dict[str, Any],
    teacher: Annotated[
        str | None, typer.Option(help="The checkpoint that the student was made from.")
    ] = None,
    teacher_cache: Annotated[
        Path | None, typer.Option(help="What 'moefuse teach' kept of it, in the teacher's place.")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Text that nothing learns from, measured now and then.")
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    json_: Json = False,
) -> None:
    """Train a whole student until it predicts what its teacher does."""
    from accelerate import PartialState

    from moefuse.heal import heal, render_healed

    result = heal(
        student,
        out,
        values,
        teacher=teacher,
        teacher_cache=teacher_cache,
        held_out=held_out,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    if PartialState().is_main_process:
        _print_json(result.to_json()) if json_ else _show(render_healed(result))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or hub id, fused or not.")],
    prompt: Annotated[str | None, typer.Option(help="Text to complete.")] = None,
    infill: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Text before and text after what is to be inserted.", metavar="P S"),
    ] = None,
    chat: Annotated[
        str | None,
        typer.Option(help="A message to answer; an empty one starts a conversation."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of likely tokens to draw from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype to compute in. [default: stored]")
    ] = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Complete, insert or chat with a model, printing tokens as they come."""
    from moefuse.devices import choose_device
    from moefuse.evaluation.generate import Decoding, generate_command

    generate_command(
        model,
        prompt=prompt,
        infill_around=infill,
        chat_message=chat,
        decoding=Decoding(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        ),
        device=choose_device(device),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


@app.command("compare")
@with_settings(*UP_TO_CALIBRATE, GroupConfig, FactorConfig, DistillConfig)
def compare_command(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Directory for cells, artifacts and the report.")],
    values: dict[str, Any],
    methods: Annotated[
        str, typer.Option(help="Methods with commas between, or all of them.")
    ] = "all",
    fractions: Annotated[
        str, typer.Option(help="Budgets: shares of the bytes of the teacher's routed experts.")
    ] = "0.5,0.25,0.125,0.0625,0.03125",
    seeds: Annotated[int, typer.Option(help="How many seeds, from --seed on.")] = 3,
    bits: Annotated[
        str, typer.Option(help="Bits at which structural rivals store their numbers.")
    ] = "16,4,2",
    quantise: Annotated[
        str, typer.Option(help="Round structural rivals inside distillation or after it.")
    ] = "inside",
    heal_tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens to heal every student on after its layers were distilled, such as 1M. "
            "[default: none is healed]"
        ),
    ] = None,
    heal_data: HealData = None,
    healing: HealingFile = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="Text to measure on: a file, a folder, JSONL or a hub data set."),
    ] = None,
    held_out_tokens: Annotated[int, typer.Option(help="Most tokens to measure on.")] = 12_288,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, YAML files or folders of them, with commas "
            "between or given again; only the last stage's students are measured on them, and the "
            "teacher once."
        ),
    ] = None,
    limit: Limit = None,
    num_fewshot: FewShot = None,
    part: Annotated[
        str | None,
        typer.Option(help="Do only part I of N, as I/N from 0/N on, to run several at once."),
    ] = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    json_: Json = False,
) -> None:
    """Compare this design with rivals at the same bytes, text and steps."""
    from moefuse.arena.cells import read_wishes
    from moefuse.arena.report import summary
    from moefuse.arena.run import compare

    first = build(ComputeConfig, values).seed
    found = compare(
        checkpoint,
        out,
        values,
        read_wishes(methods, fractions, bits, seeds, first_seed=first, quantise=quantise),
        healing=_compared_healing(heal_tokens, heal_data, healing),
        held_out=held_out,
        held_out_tokens=held_out_tokens,
        part=part,
        tasks=tasks or (),
        limit=limit,
        num_fewshot=num_fewshot,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if json_:
        _print_json(found.to_json())
    elif found.missing:
        typer.echo(f"{found.missing} cells are still to be done by other parts.")
    else:
        typer.echo(summary(found.rows))
        typer.echo(f"Report and plots are in {out}.")


def _compared_healing(
    tokens: str | None, data: str | None, file: Path | None
) -> dict[str, Any] | None:
    """Return how students are healed; None where there is nothing to heal them on."""
    if tokens is None:
        if data is not None or file is not None:
            raise UserError("--heal-data and --healing need --heal-tokens: how many to heal on.")
        return None
    parse_count(tokens, "--heal-tokens")
    return {**_healing_settings(file, data, "--heal-tokens"), "tokens": tokens}


def _healing_settings(file: Path | None, data: str | None, flag: str) -> dict[str, Any]:
    """Read settings of healing, all but the tokens, which ``flag`` gives."""
    settings = read_yaml(file, [HealConfig]) if file else {}
    if "tokens" in settings:
        raise UserError(f"{file} has tokens; those to heal on are given by {flag} here.")
    return settings if data is None else {**settings, "data": data}


@app.command("push")
def push_command(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a written checkpoint.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub: organisation/model.")],
    dry_run: Annotated[
        bool, typer.Option(help="Only check, and show what would be uploaded.")
    ] = True,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository a private one.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to. [default: main]")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
) -> None:
    """Upload a checkpoint with its card to the hub; only shown, unless with --no-dry-run."""
    from moefuse.export.push import describe, prepare, push

    upload = prepare(checkpoint, repo, private=private, revision=revision, message=message)
    if dry_run:
        typer.echo(describe(upload))
    else:
        typer.echo(push(upload))


@app.command("serve")
def serve_command(
    checkpoint: Checkpoint,
    flags: Annotated[
        list[str] | None, typer.Argument(help="After --, further flags of 'vllm serve'.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
) -> None:
    """Serve a checkpoint as OpenAI's API does, by vLLM or else by Transformers."""
    from moefuse.serve import serve

    serve(checkpoint, host=host, port=port, flags=flags or ())


@app.command("import")
def import_command(
    old: Annotated[Path, typer.Argument(help="A checkpoint of the fused releases of 2025.")],
    out: Annotated[Path, typer.Argument(help="Directory of the imported checkpoint.")],
    overwrite: Overwrite = False,
) -> None:
    """Read a fused checkpoint of the layout published in 2025, and write it in moefuse's own."""
    from moefuse.export.published import import_published

    typer.echo(f"Imported to {import_published(old, out, overwrite=overwrite)}.")


export_app = typer.Typer(
    help="Write a plain checkpoint in the form of another engine.", no_args_is_help=True
)
app.add_typer(export_app, name="export")


@export_app.command("gguf")
def gguf_command(
    checkpoint: Annotated[str, typer.Argument(help="A directory or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The file to write; its name ends in .gguf.")],
    quant: Annotated[
        str,
        typer.Option(
            help="auto (as stored), F32, F16, BF16, Q8_0; with llama-cpp-python also Q4_K_M, ..."
        ),
    ] = "auto",
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(help="llama.cpp's name for how text is cut. [default: told by the tokenizer]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that exists.")
    ] = False,
    trust_remote_code: RemoteCode = False,
    json_: Json = False,
) -> None:
    """Write a GGUF file for llama.cpp, of a teacher, a student or what collapse and expand made.

    A fused student's needs llama.cpp with moefuse's patch, which 'make llama-cpp' builds.
    """
    from moefuse.export.gguf.write import export_gguf, render_gguf

    result = export_gguf(
        checkpoint,
        out,
        quant=quant,
        pre_tokenizer=pre_tokenizer,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    _print_json(result.to_json()) if json_ else typer.echo(render_gguf(result))


@app.command("collapse")
@with_settings(ComputeConfig, CollapseConfig)
def collapse_command(
    student: Annotated[Path, typer.Argument(help="A checkpoint that moefuse wrote.")],
    out: Annotated[Path, typer.Argument(help="Directory of the plain checkpoint.")],
    values: dict[str, Any],
    heal_tokens: Annotated[
        str | None,
        typer.Option(help="Tokens to heal the whole on, such as 4M. [default: it is not healed]"),
    ] = None,
    heal_data: HealData = None,
    healing: HealingFile = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Make a plain model with one expert for each group; tell what it loses against the student."""
    from moefuse.collapse import collapse, render_collapsed

    result = collapse(
        student,
        out,
        values,
        healing=_compared_healing(heal_tokens, heal_data, healing),
        overwrite=overwrite,
    )
    _print_json(result.to_json()) if json_ else typer.echo(render_collapsed(result))


@app.command("expand")
def expand_command(
    student: Annotated[Path, typer.Argument(help="A checkpoint that moefuse wrote.")],
    out: Annotated[Path, typer.Argument(help="Directory of the plain checkpoint.")],
    dtype: Annotated[
        str, typer.Option(help="What experts are stored in: auto (the student's), float32, ...")
    ] = "auto",
    drop_biases: Annotated[
        bool,
        typer.Option("--drop-biases", help="Leave out biases, which ordinary experts cannot have."),
    ] = False,
    max_shard: Annotated[str, typer.Option(help="Largest size of one weight file.")] = "4GB",
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Write all experts of a student out, for engines of its teacher's family; saves no memory."""
    from moefuse.export.expand import expand, render_expanded

    result = expand(
        student,
        out,
        dtype=dtype,
        drop_biases=drop_biases,
        overwrite=overwrite,
        max_shard_bytes=parse_bytes(max_shard, "--max-shard"),
    )
    _print_json(result.to_json()) if json_ else typer.echo(render_expanded(result))


@app.command("quantize")
@with_settings(QuantizeConfig)
def quantize_command(
    student: Annotated[Path, typer.Argument(help="A checkpoint that moefuse wrote.")],
    out: Annotated[Path, typer.Argument(help="Directory of the quantised checkpoint.")],
    values: dict[str, Any],
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Store a student's linear layers in a quantiser's format."""
    from moefuse.export.quantized.result import render_quantized
    from moefuse.quantize import quantize

    result = quantize(student, out, values, overwrite=overwrite)
    _print_json(result.to_json()) if json_ else typer.echo(render_quantized(result))


@app.command("scaling")
@with_settings(
    *UP_TO_CALIBRATE,
    GroupConfig,
    FactorConfig,
    DistillConfig,
    renamed={"tokens": "calibration_tokens"},
)
def scaling_command(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Directory for students, artifacts and the report.")],
    values: dict[str, Any],
    groups: Annotated[
        str, typer.Option(help="Fused experts in a layer, with commas between.")
    ] = "1,2,4,8,16,32",
    ranks: Annotated[
        str, typer.Option(help="Ranks of every expert's delta, with commas between.")
    ] = "0,2,4,8,16,32",
    tokens: Annotated[
        str,
        typer.Option(
            help="Tokens to heal on, each by a schedule of its own, with commas between; students "
            "that are not healed are measured besides."
        ),
    ] = "0.5M,1M,2M,4M,8M",
    seeds: Annotated[int, typer.Option(help="How many seeds, from --seed on.")] = 1,
    cross: Annotated[
        bool, typer.Option("--cross", help="Measure only the axes through --middle.")
    ] = False,
    middle: Annotated[
        str | None,
        typer.Option(
            help="Groups, rank and tokens through which the laws are read, such as 8,8,4M. "
            "[default: the largest of each]"
        ),
    ] = None,
    heal_data: HealData = None,
    healing: HealingFile = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="Text to measure on: a file, a folder, JSONL or a hub data set."),
    ] = None,
    held_out_tokens: Annotated[int, typer.Option(help="Most tokens to measure on.")] = 12_288,
    part: Annotated[
        str | None,
        typer.Option(help="Do only part I of N, as I/N from 0/N on, to run several at once."),
    ] = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    json_: Json = False,
) -> None:
    """Measure how KL follows groups, rank and healing tokens, and judge the three scaling laws."""
    from moefuse.evaluation.scaling_report import summary
    from moefuse.scaling.grid import read_grid
    from moefuse.scaling.run import scaling

    first = build(ComputeConfig, values).seed
    found = scaling(
        checkpoint,
        out,
        values,
        read_grid(groups, ranks, tokens, seeds, first_seed=first, cross=cross, middle=middle),
        healing=_healing_settings(healing, heal_data, "--tokens"),
        held_out=held_out,
        held_out_tokens=held_out_tokens,
        part=part,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if json_:
        _print_json(found.to_json())
    elif found.report is None:
        typer.echo(f"{found.missing} students are still to be done by other parts.")
    else:
        typer.echo(summary(found.report))
        typer.echo(f"Report and plots are in {out}.")


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Argument(help="Directory for checkpoints and report.")],
    overwrite: Overwrite = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Fuse the bundled teacher to four sizes, heal each and compare with two rivals."""
    from moefuse.demo.run import run_demo
    from moefuse.evaluation.report import markdown_table

    result = run_demo(out, overwrite=overwrite, device=device)
    typer.echo(markdown_table(result.rows))
    typer.echo(f"Report, plot and checkpoints are in {out} ({result.seconds:.0f} s).")


def main() -> None:
    """Run the command line; exit status 2 for a mistake of the user's."""
    # Readers of a checkpoint's progress have our own bars; the libraries' would interleave. An
    # upload has no others.
    if sys.argv[1:2] != ["push"]:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except UserError as error:
        errors.print(f"moefuse: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
    except (KeyboardInterrupt, _InterruptedError):
        errors.print("moefuse: interrupted; the same command goes on from here.", markup=False)
        sys.exit(130)
    except Exception as error:
        full = disk_full(error)
        if full is None:
            raise
        errors.print(f"moefuse: {full}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
