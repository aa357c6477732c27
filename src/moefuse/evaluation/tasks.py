"""Tasks of EleutherAI's lm-evaluation-harness on a model that moefuse has loaded.

The harness brings prompts, data and scores of thousands of tasks; moefuse brings the model, so
that a fused checkpoint is measured without any of its own code. Tasks are looked up and prepared
before a model is loaded: a wrong name or missing data costs seconds, not the loading.

This is the only module that imports the harness, which is an extra.
"""

import difflib
import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefuse.errors import UserError
from moefuse.evaluation.loading import pad_id
from moefuse.evaluation.rows import TaskScores

try:
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(
        'Tasks are run by lm-evaluation-harness, which is an extra: pip install "moefuse[tasks]".'
    ) from error

OWN_TASKS = Path(__file__).resolve().with_name("local_tasks")
# The harness's own seeds, so that examples and shuffled answers are those of its command line.
PYTHON_SEED, OTHER_SEED = 0, 1234
# The consent that the harness's metrics ask for too.
CONSENT_TO_RUN_CODE = "HF_ALLOW_CODE_EVAL"


@dataclass(frozen=True)
class PreparedTasks:
    """Tasks with their data, ready for a model of the tokenizer they were prepared for."""

    loaded: dict[str, Any]
    """What the harness calls a task dictionary."""
    names: list[str]
    """What was asked for, each once."""
    limit: int | None


def prepare_tasks(
    wanted: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> PreparedTasks:
    """Look up the tasks ``wanted`` and load their data.

    Each text of ``wanted`` is one task or several with commas between: the path of a YAML file or
    of a directory (every task below it), or the name of a task, group or tag of the harness or of
    moefuse's own tasks. ``limit`` is the most items of a task, ``num_fewshot`` the examples before
    each; a task that fixes zero examples keeps to that. Raises ``UserError`` for what is no task
    and for tasks that cannot be run here.
    """
    _check_counts(limit, num_fewshot)
    names = _split(wanted)
    with _quiet(), _seeded():
        manager = _manager(names, tokenizer)
        parts = [_load(manager, spec) for name in names for spec in _specs(manager, name)]
    loaded = {
        kind: {name: item for part in parts for name, item in part[kind].items()}
        for kind in ("tasks", "groups", "group_map")
    }
    for name, task in loaded["tasks"].items():
        _check_runnable(name, task)
        _set_examples(task, num_fewshot)
    return PreparedTasks(loaded, names, limit)


def run_tasks(
    prepared: PreparedTasks,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
) -> tuple[TaskScores, dict[str, Any]]:
    """Return the scores of ``model`` and what they depend on (versions, items, examples).

    Scores are ``{task: {metric: value, metric_stderr: value}}``; a metric of a task with several
    ways to read an answer has the way's name behind a comma, as in the harness, and a standard
    error that the harness does not know is None. Groups stand beside their tasks.
    """
    with _quiet(), _seeded():
        wrapped = cast(Any, HFLM)(
            pretrained=model,
            tokenizer=_padding(tokenizer),
            backend="causal",
            batch_size=batch_size,
        )
        found = cast(Any, evaluate)(
            lm=wrapped,
            task_dict=prepared.loaded,
            limit=prepared.limit,
            log_samples=False,
            confirm_run_unsafe_code=_consents(),
        )
    return _scores(found["results"]), _facts(found)


def _check_counts(limit: int | None, num_fewshot: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"A limit of {limit} items leaves nothing of a task; give 1 or more.")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"{num_fewshot} examples cannot be shown; give 0 or more.")


def _split(wanted: Sequence[str]) -> list[str]:
    names = [part.strip() for text in wanted for part in text.split(",")]
    distinct = list(dict.fromkeys(name for name in names if name))
    if not distinct:
        raise UserError("--tasks names no task; give names or paths with commas between.")
    return distinct


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _is_group_file(name: str) -> bool:
    if not _is_file(name):
        return False
    lines = Path(name).read_text("utf-8", errors="replace").splitlines()
    return any(line.startswith("group:") for line in lines)


def _manager(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> TaskManager:
    """Return the index of all tasks that ``names`` can mean.

    The harness's own collection takes seconds to list, so it is listed only where it is needed.
    """
    groups = [name for name in names if _is_group_file(name)]
    folders = [Path(name) for name in names if Path(name).is_dir()]
    options: dict[str, Any] = {
        "include_path": [OWN_TASKS, *folders, *(Path(name).resolve().parent for name in groups)],
        "metadata": {"infill_tokenizer": tokenizer},
    }
    near = TaskManager(include_defaults=False, **options)
    others = [name for name in names if not _is_file(name) and not Path(name).is_dir()]
    looked_up = [*others, *(_group_name(near, name) for name in groups)]
    if all(_is_complete(near, name) for name in looked_up):
        return near
    return TaskManager(**options)


def _is_complete(manager: TaskManager, name: str) -> bool:
    """Say whether a name is known and, for a group, all of its tasks are."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task")
    return not isinstance(members, list) or all(str(x) in manager.task_index for x in members)


def _group_name(manager: TaskManager, file: str) -> str:
    """Return the name that a group's file gives it; the harness takes no path for a group."""
    path = Path(file).resolve()
    entries = manager.task_index.values()
    return next((entry.name for entry in entries if entry.yaml_path == path), file)


def _specs(manager: TaskManager, name: str) -> list[str]:
    """Return what the harness knows the tasks of ``name`` by."""
    if _is_file(name):
        return [_group_name(manager, name) if _is_group_file(name) else name]
    if Path(name).is_dir():
        return _tasks_below(name)
    if name in manager.task_index:
        return [name]
    close = difflib.get_close_matches(name, manager.all_tasks, n=5)
    hint = f"did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists all names."
    raise UserError(
        f"{name} is neither a task that lm-evaluation-harness knows nor a YAML file or directory "
        f"of tasks; {hint}"
    )


def _tasks_below(folder: str) -> list[str]:
    found = TaskManager(include_path=folder, include_defaults=False).all_subtasks
    if not found:
        raise UserError(f"{folder} holds no task; give a directory with YAML files of tasks.")
    return found


def _load(manager: TaskManager, spec: str) -> dict[str, Any]:
    try:
        return dict(manager.load([spec]))
    except UserError:
        raise
    except Exception as error:  # task files, their functions and data sets raise what they like
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else repr(error)
        raise UserError(
            f"The task {spec} cannot be prepared ({reason}); check its file, and that its data "
            "can be reached."
        ) from error


def _check_runnable(name: str, task: Any) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise UserError(
            f"{name} shows pictures or sounds, which no model here takes; leave it out."
        )
    if getattr(task, "UNSAFE_CODE", False) and not _consents():
        raise UserError(
            f"{name} runs the code that the model writes, with your rights; set "
            f"{CONSENT_TO_RUN_CODE}=1, in a sandbox, if you accept that."
        )


def _consents() -> bool:
    return os.environ.get(CONSENT_TO_RUN_CODE) == "1"


def _set_examples(task: Any, wanted: int | None) -> None:
    configured = task.get_config("num_fewshot")
    if configured is None or (wanted is not None and configured != 0):
        task.set_config(key="num_fewshot", value=wanted or 0)
    task.set_fewshot_seed(seed=OTHER_SEED)


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return ``tokenizer`` with a padding token, lest the harness adds one the model lacks."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = pad_id(tokenizer)
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's remarks about being called from Python to itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed what tasks may draw from, and leave the caller's generators as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        random.seed(PYTHON_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _scores(results: dict[str, dict[str, Any]]) -> TaskScores:
    """Return the metrics of every task, whose keys are ``metric,way`` in the harness."""
    scores = {
        task: {key.removesuffix(",none"): _number(x) for key, x in found.items() if "," in key}
        for task, found in results.items()
    }
    return {task: metrics for task, metrics in scores.items() if metrics}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) else None


def _facts(found: Any) -> dict[str, Any]:
    return {
        "lm_eval": version("lm_eval"),
        "versions": {task: str(number) for task, number in found["versions"].items()},
        "items": {task: counts["effective"] for task, counts in found["n-samples"].items()},
        "num_fewshot": dict(found["n-shot"]),
    }
