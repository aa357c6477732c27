"""What ``moefuse eval`` does: a checkpoint and its teacher, from their folders to rows."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefuse import demo
from moefuse.artifacts import fingerprint
from moefuse.corpus import load_documents, tokenize_by_document
from moefuse.errors import UserError
from moefuse.evaluation.loading import (
    count_active_parameters,
    count_parameters,
    expert_bytes,
    load_model,
    load_tokenizer,
    pad_id,
    read_sizes,
)
from moefuse.evaluation.machine import machine_meta
from moefuse.evaluation.quality import Quality, evaluate
from moefuse.evaluation.report import report_json
from moefuse.evaluation.rows import TEACHER, Row, TaskScores
from moefuse.evaluation.tables import rich_table

__all__ = [
    "NO_TASKS",
    "EvaluationReport",
    "Quality",
    "Scored",
    "TaskRunner",
    "evaluate",
    "evaluate_command",
    "load_model",
    "task_runner",
]

Scored = tuple[TaskScores | None, dict[str, Any] | None]
"""A model's scores and what they depend on (versions, items, examples); None without tasks."""


@dataclass(frozen=True)
class EvaluationReport:
    """What ``moefuse eval`` found."""

    meta: dict[str, Any]
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Return ``{"meta", "rows"}``, plain values for ``json.dumps``."""
        return report_json(self.meta, self.rows)

    def table(self) -> Table:
        """Return the figures as a table for the terminal, a column for every model."""
        return rich_table(self.rows)


def evaluate_command(
    model: str,
    teacher: str | None = None,
    data: str | None = None,
    *,
    tokens: int | None = 65_536,
    sequence_length: int = 512,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    command: str = "moefuse eval",
) -> EvaluationReport:
    """Measure the checkpoint ``model`` and, beside it, its ``teacher``.

    ``data`` is what ``load_documents`` takes; without it the text bundled for the bundled teacher
    serves models that share its tokenizer. ``tokens`` limits how much of it is read (None: all),
    ``sequence_length`` is in tokens, ``command`` is the command line to keep in the report.
    ``tasks``, ``limit`` and ``num_fewshot`` are what ``prepare_tasks`` takes; every model is
    measured on them, and on text only where there are no tasks or ``data`` or ``teacher`` is given.

    Raises ``UserError`` for checkpoints, text, tasks and devices that cannot be used, and for a
    teacher with another tokenizer.
    """
    paths = {"teacher": teacher, "model": model} if teacher else {"model": model}
    tokenizer = _shared_tokenizer(list(paths.values()), trust_remote_code)
    runner = task_runner(
        tasks, tokenizer, batch_size=batch_size, limit=limit, num_fewshot=num_fewshot
    )
    text = None
    if not tasks or data or teacher:
        source = data or str(_bundled_text(model, tokenizer))
        text = _read_text(source, tokenizer, tokens, sequence_length)
    options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    models = {name: load_model(path, **options)[0] for name, path in paths.items()}
    start = time.monotonic()
    qualities = {} if text is None else text.measure(models, tokenizer, batch_size, device)
    scores = {name: runner.run(loaded) for name, loaded in models.items()}
    meta = machine_meta(
        command,
        device=device,
        data=None if text is None else text.facts,
        tasks=next(facts for _, facts in scores.values()),
        dtype=dtype or "as stored",
        seconds=round(time.monotonic() - start, 2),
    )
    rows = [
        _measured_row(name, paths[name], models[name], qualities.get(name), scores[name][0])
        for name in paths
    ]
    return EvaluationReport(meta, rows)


@dataclass(frozen=True)
class _Text:
    """Held-out text as token ids: 1-D int64 sequences, and the number of each one's document."""

    sequences: list[Tensor]
    documents: list[int]
    facts: dict[str, Any]

    def measure(
        self,
        models: Mapping[str, PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        device: str,
    ) -> dict[str, Quality]:
        return evaluate(
            models,
            self.sequences,
            teacher=models.get("teacher"),
            documents=self.documents,
            batch_size=batch_size,
            pad_id=pad_id(tokenizer),
            device=device,
        )


def _read_text(
    source: str, tokenizer: PreTrainedTokenizerBase, tokens: int | None, sequence_length: int
) -> _Text:
    windows = tokenize_by_document(
        load_documents(source), tokenizer, sequence_length, limit_tokens=tokens
    )
    sequences = [window for document in windows for window in document]
    facts = {
        "name": Path(source).name if Path(source).exists() else source,
        "documents": len(windows),
        "sequence_length": sequence_length,
        "fingerprint": fingerprint([sequence.tolist() for sequence in sequences]),
    }
    documents = [number for number, document in enumerate(windows) for _ in document]
    return _Text(sequences, documents, facts)


@dataclass(frozen=True)
class TaskRunner:
    """Tasks that are ready for models of one tokenizer.

    ``asked`` holds what was asked for (``names``, ``limit``, ``num_fewshot``) as plain JSON values;
    None where no tasks were. ``run`` measures a model on them.
    """

    asked: dict[str, Any] | None
    run: Callable[[PreTrainedModel], Scored]


NO_TASKS = TaskRunner(None, lambda _: (None, None))


def task_runner(
    tasks: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    limit: int | None,
    num_fewshot: int | None,
) -> TaskRunner:
    """Prepare ``tasks`` for models of ``tokenizer``; see ``prepare_tasks`` for the arguments.

    ``batch_size`` is in sequences. Raises ``UserError`` for tasks that cannot be run, where the
    extra is not installed, and for a limit or examples of no tasks.
    """
    if not tasks:
        if limit is not None or num_fewshot is not None:
            raise UserError("--limit and --num-fewshot are about tasks; name some with --tasks.")
        return NO_TASKS
    from moefuse.evaluation.tasks import prepare_tasks, run_tasks  # noqa: PLC0415  an extra

    prepared = prepare_tasks(tasks, tokenizer, limit=limit, num_fewshot=num_fewshot)
    asked = {"names": prepared.names, "limit": limit, "num_fewshot": num_fewshot}
    return TaskRunner(
        asked, lambda model: run_tasks(prepared, model, tokenizer, batch_size=batch_size)
    )


def _shared_tokenizer(paths: Sequence[str], trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the last checkpoint, which all others must share."""
    loaded = [load_tokenizer(path, trust_remote_code=trust_remote_code) for path in paths]
    if any(tokenizer.get_vocab() != loaded[-1].get_vocab() for tokenizer in loaded):
        raise UserError(
            f"{paths[-1]} and {paths[0]} have different tokenizers, so their predictions cannot "
            "be compared; give the teacher that the model was made from."
        )
    return loaded[-1]


def _bundled_text(model: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    bundled = demo.teacher_path()
    if bundled.is_dir() and load_tokenizer(bundled).get_vocab() == tokenizer.get_vocab():
        return demo.heldout_path()
    raise UserError(
        f"Only models of the bundled teacher have a text of their own to be measured on; give "
        f"{model} some with --data: a text file, a folder, JSONL or a data set on the hub."
    )


def _measured_row(
    name: str,
    path: str,
    model: PreTrainedModel,
    quality: Quality | None,
    tasks: TaskScores | None,
) -> Row:
    headers = read_sizes(path)
    measured = Row(
        **_origin(name, path, headers.config),
        parameters=count_parameters(model),
        active_parameters=count_active_parameters(model, headers),
        expert_bytes=expert_bytes(headers),
        total_bytes=headers.total_bytes,
        tasks=tasks,
    )
    return measured if quality is None else _with_quality(measured, quality)


def _with_quality(row: Row, quality: Quality) -> Row:
    return replace(
        row,
        tokens=quality.tokens,
        kl=quality.kl,
        cross_entropy=quality.cross_entropy,
        perplexity=quality.perplexity,
        agreement=quality.agreement,
        intervals=quality.intervals or None,
    )


def _origin(name: str, path: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the row says about how the model was made."""
    made = config.get("moefuse")
    if made is None:
        return {"method": TEACHER if name == TEACHER else Path(path).name}
    layers = list(made.get("layers", {}).values())
    return {
        "method": made.get("method", "fused"),
        "stage": made.get("stage"),
        "seed": made.get("seed"),
        **{key: _common(layer.get(key) for layer in layers) for key in ("groups", "rank", "bits")},
    }


def _common(values: Iterable[Any]) -> Any:
    """Return the value that all layers have, or None where they differ."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
