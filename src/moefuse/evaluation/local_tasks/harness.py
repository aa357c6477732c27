"""What the local tasks' YAML files name: their documents and their scores.

Needs ``datasets``, which comes with lm-evaluation-harness, and nothing of the harness itself.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from moefuse.errors import UserError
from moefuse.evaluation.generate import InfillMarkers, infill_markers
from moefuse.evaluation.local_tasks.scoring import (
    completes_function,
    edit_similarity,
    same_line,
)

FOLDER = Path(__file__).resolve().parent


def infill_documents(*, infill_tokenizer: PreTrainedTokenizerBase, **_: Any) -> dict[str, Dataset]:
    """Return ``python_infill_line``'s items, each with a ``prompt`` in the tokenizer's own markers.

    Called by the harness with the task's metadata, of which ``infill_tokenizer`` is the measured
    model's. Raises ``UserError`` for a tokenizer without tokens for filling in the middle.
    """
    markers = _markers(infill_tokenizer)
    items = _items("python_infill_line")
    prompts = [markers.prompt(item["prefix"], item["suffix"]) for item in items]
    told = [{**item, "prompt": prompt} for item, prompt in zip(items, prompts, strict=True)]
    return {"test": Dataset.from_list(told)}


def function_documents(**_: Any) -> dict[str, Dataset]:
    """Return ``python_function_parses``'s items; called by the harness with the task's metadata."""
    return {"test": Dataset.from_list(_items("python_function_parses"))}


def score_line(item: dict[str, str], results: list[str]) -> dict[str, float]:
    """Return ``exact_match`` (1 or 0) and ``edit_similarity`` (0 to 1) of ``results[0]``."""
    found, wanted = results[0], item["line"]
    return {
        "exact_match": float(same_line(found, wanted)),
        "edit_similarity": edit_similarity(found, wanted),
    }


def score_function(item: dict[str, str], results: list[str]) -> dict[str, float]:
    """Return ``parses`` (1 or 0) of ``results[0]``."""
    return {"parses": float(completes_function(item["prompt"], results[0]))}


def _markers(tokenizer: PreTrainedTokenizerBase) -> InfillMarkers:
    try:
        return infill_markers(tokenizer)
    except UserError as error:
        raise UserError(
            "The tokenizer has no tokens for filling in the middle, so the model never learnt it; "
            "leave python_infill_line out of --tasks."
        ) from error


def _items(task: str) -> list[dict[str, str]]:
    lines = (FOLDER / f"{task}.jsonl").read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
