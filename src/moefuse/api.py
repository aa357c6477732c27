"""The library's ten functions: the command line's, for a notebook.

Settings are keyword arguments with the names of the flags (``groups=8``, ``data="text.jsonl"``);
see ``moefuse.config``. Everything a user can get wrong raises ``moefuse.UserError``, a
``ValueError`` of one sentence, before any expensive work starts.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moefuse.checkpoint.inspection import Inspection, inspect_checkpoint
from moefuse.evaluation.loading import load_model
from moefuse.evaluation.run import EvaluationReport, evaluate_command
from moefuse.launch.fuse import fuse as run_fuse
from moefuse.pipeline import FuseResult, Job
from moefuse.places import check_output
from moefuse.planning import Planned, plan_checkpoint


def inspect(checkpoint: str | Path, *, revision: str | None = None) -> Inspection:
    """Tell what a checkpoint (a directory or hub id) is made of, from its headers alone."""
    return inspect_checkpoint(checkpoint, revision=revision)


def plan(checkpoint: str | Path, *, revision: str | None = None, **settings: Any) -> Planned:
    """Choose groups and rank for ``groups``, ``rank``, ``params`` or ``bytes``, and estimate the
    time in seconds, the disk and the memory in bytes that making the student takes."""
    return plan_checkpoint(checkpoint, settings, revision=revision)


def fuse(checkpoint: str | Path, out: str | Path, **settings: Any) -> FuseResult:
    """Do the whole job and write the student to the directory ``out``.

    Besides settings of the stages and of ``LaunchConfig`` takes ``work``, ``resume``,
    ``overwrite``, ``revision`` and ``trust_remote_code`` (see ``moefuse.pipeline.fuse``).
    """
    names = ("work", "resume", "overwrite", "revision", "trust_remote_code")
    options = {name: settings.pop(name) for name in names if name in settings}
    return run_fuse(checkpoint, out, settings, **options)


def calibrate(checkpoint: str | Path, work: str | Path, **settings: Any) -> None:
    """Stream the teacher over ``data`` and keep in ``work`` what its MoE layers receive, choose
    and return. Serves students of every size."""
    Job(checkpoint, work, settings).calibrate()


def group(checkpoint: str | Path, work: str | Path, **settings: Any) -> None:
    """Choose which experts of each layer share a base; needs ``calibrate``'s artifacts."""
    Job(checkpoint, work, settings).group()


def factor(checkpoint: str | Path, work: str | Path, **settings: Any) -> None:
    """Make bases and deltas of each layer in closed form; needs ``group``'s artifacts."""
    Job(checkpoint, work, settings).factor()


def distill(checkpoint: str | Path, work: str | Path, **settings: Any) -> None:
    """Train each layer's student against the teacher's layer; needs ``factor``'s artifacts."""
    Job(checkpoint, work, settings).distill()


def assemble(
    checkpoint: str | Path,
    work: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> None:
    """Write the student's checkpoint to ``out``; needs ``distill``'s artifacts."""
    check_output(Path(out), overwrite=overwrite)
    job = Job(checkpoint, work, settings)
    job.check_apart(Path(out))
    job.assemble(Path(out))


def evaluate(
    model: str | Path,
    teacher: str | Path | None = None,
    data: str | Path | None = None,
    **options: Any,
) -> EvaluationReport:
    """Measure a model on held-out text: cross-entropy (nats per token), perplexity, and with a
    ``teacher`` the KL divergence to it (nats per token) and top-1 agreement, each with a 95%
    interval over documents. For options see ``moefuse.evaluation.run.evaluate_command``."""
    return evaluate_command(
        str(model),
        None if teacher is None else str(teacher),
        None if data is None else str(data),
        **options,
    )


def load(
    path: str | Path, *, dtype: str | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a checkpoint, fused or not, as a Transformers model in eval mode, running no code of
    the checkpoint's; ``dtype`` None keeps the stored one."""
    model, _ = load_model(path, dtype=dtype, device=str(device))
    return model
