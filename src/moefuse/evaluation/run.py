"""Measuring models side by side on the same text.

All models go through the text in lockstep: the teacher's logits of a batch are computed once,
serve every student and are dropped. Storing them instead would take gigabytes a minute; running
the teacher once per student would double the time.

B sequences in a batch, S their padded length, T tokens, V vocabulary.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moefuse import demo
from moefuse.artifacts import fingerprint
from moefuse.console import track
from moefuse.corpus import batch_order, load_documents, pad, tokenize_by_document
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
from moefuse.evaluation.metrics import (
    agreement_per_token,
    bootstrap_interval,
    kl_per_token,
    token_losses,
)
from moefuse.evaluation.report import TEACHER, Row, machine_meta, report_json, rich_table

__all__ = ["EvaluationReport", "Quality", "evaluate", "evaluate_command", "load_model"]

BOOTSTRAP_SEED = 0
METRICS = ("cross_entropy", "kl", "agreement")
"""What is summed over tokens, in this order; the last two need a teacher."""


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text, and how close it stays to its teacher."""

    tokens: int
    """Predicted tokens, padding and each sequence's first token left out."""
    documents: int
    cross_entropy: float
    """Mean over tokens, nats."""
    perplexity: float
    """``exp(cross_entropy)``."""
    kl: float | None
    """Mean KL(teacher || model) over tokens, nats; None without a teacher."""
    agreement: float | None
    """Share of tokens, 0 to 1, where the model's first choice is the teacher's."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap intervals over documents, by the names above; empty for a single sequence."""


@torch.no_grad()
def evaluate(
    models: Mapping[str, nn.Module],
    sequences: Sequence[Tensor],
    *,
    teacher: nn.Module | None = None,
    documents: Sequence[int] | None = None,
    batch_size: int = 8,
    pad_id: int,
    device: str | torch.device = "cpu",
    description: str = "evaluate",
) -> dict[str, Quality]:
    """Measure every model on the same sequences.

    ``sequences`` are 1-D int64 token ids of length 2 or more; ``documents`` numbers the document
    that each belongs to (default: each its own; where all belong to one, its sequences are
    resampled instead). ``device`` is where the models are. ``teacher`` may be one of ``models``.
    Each model runs in its own dtype and leaves in the mode (training or not) that it came in.

    Raises ``UserError`` without sequences, for models whose vocabularies differ in size and for
    logits that are not numbers.
    """
    if not sequences:
        raise UserError("There is no text to evaluate on; give at least one sequence.")
    sums = {name: torch.zeros(len(sequences), 3, dtype=torch.float64) for name in models}
    order = batch_order(map(len, sequences), batch_size)
    with _evaluation_mode([*models.values(), *([teacher] if teacher is not None else [])]):
        for positions in track(order, description):
            ids_BS, mask_BS = pad([sequences[position] for position in positions], pad_id)
            ids_BS, mask_BS = ids_BS.to(device), mask_BS.to(device)
            wanted_BSV = None if teacher is None else _logits(teacher, ids_BS, mask_BS)
            for name, model in models.items():
                known_BSV = wanted_BSV if model is teacher else None
                logits_BSV = _logits(model, ids_BS, mask_BS) if known_BSV is None else known_BSV
                sums[name][positions] = _batch_sums(name, logits_BSV, wanted_BSV, ids_BS, mask_BS)
    units = _units(len(sequences), documents)
    tokens_N = torch.tensor([len(sequence) - 1 for sequence in sequences])
    return {
        name: _quality(sums[name], tokens_N, units, documents, teacher is not None)
        for name in models
    }


@contextmanager
def _evaluation_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _logits(model: nn.Module, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    return model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits


def _batch_sums(
    name: str, logits_BSV: Tensor, wanted_BSV: Tensor | None, ids_BS: Tensor, mask_BS: Tensor
) -> Tensor:
    """Return the sums of loss, KL and agreement over each sequence's tokens: B x 3, fp64, CPU."""
    if wanted_BSV is not None and wanted_BSV.shape[-1] != logits_BSV.shape[-1]:
        raise UserError(
            f"{name} knows {logits_BSV.shape[-1]} words and the teacher {wanted_BSV.shape[-1]}; "
            "only models with one vocabulary can be compared."
        )
    sums = []
    # Row by row, since a row's real tokens are a view while those of a batch would be a copy.
    for row, length in enumerate(mask_BS.sum(dim=1).tolist()):
        logits_TV = logits_BSV[row, : length - 1]
        wanted_TV = None if wanted_BSV is None else wanted_BSV[row, : length - 1]
        sums.append(_sequence_sums(logits_TV, wanted_TV, ids_BS[row, 1:length]))
    stacked_B3 = torch.tensor(sums, dtype=torch.float64)
    if not stacked_B3.isfinite().all():
        raise UserError(
            f"{name} gives logits that are no numbers; load it in bfloat16 or float32, "
            "or make it anew if it is damaged."
        )
    return stacked_B3


def _sequence_sums(
    logits_TV: Tensor, wanted_TV: Tensor | None, labels_T: Tensor
) -> tuple[float, float, float]:
    loss = token_losses(logits_TV, labels_T).double().sum().item()
    if wanted_TV is None:
        return loss, 0.0, 0.0
    kl = kl_per_token(wanted_TV, logits_TV).double().sum().item()
    return loss, kl, agreement_per_token(wanted_TV, logits_TV).double().sum().item()


def _units(sequences: int, documents: Sequence[int] | None) -> Tensor:
    """Return what is resampled: the number of each sequence's document, or of the sequence."""
    own_N = torch.arange(sequences)
    if documents is None:
        return own_N
    distinct, document_N = torch.tensor(documents).unique(return_inverse=True)
    return document_N if len(distinct) > 1 else own_N


def _quality(
    sums_N3: Tensor,
    tokens_N: Tensor,
    unit_N: Tensor,
    documents: Sequence[int] | None,
    has_teacher: bool,
) -> Quality:
    units = int(unit_N.max()) + 1
    sums_U3 = torch.zeros(units, 3, dtype=torch.float64).index_add(0, unit_N, sums_N3)
    tokens_U = torch.zeros(units, dtype=torch.int64).index_add(0, unit_N, tokens_N)
    tokens = int(tokens_N.sum())
    loss, kl, agreement = (sums_U3.sum(dim=0) / tokens).tolist()
    measured = (
        {"cross_entropy": 0, "kl": 1, "agreement": 2} if has_teacher else {"cross_entropy": 0}
    )
    intervals = {
        metric: bootstrap_interval(sums_U3[:, column].tolist(), tokens_U.tolist(), BOOTSTRAP_SEED)
        for column, metric in enumerate(measured)
        if units > 1
    }
    if intervals:
        low, high = intervals["cross_entropy"]
        intervals["perplexity"] = (_exp(low), _exp(high))
    return Quality(
        tokens=tokens,
        documents=units if documents is None else len(set(documents)),
        cross_entropy=loss,
        perplexity=_exp(loss),
        kl=kl if has_teacher else None,
        agreement=agreement if has_teacher else None,
        intervals=intervals,
    )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


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
    command: str = "moefuse eval",
) -> EvaluationReport:
    """Measure the checkpoint ``model`` and, beside it, its ``teacher``.

    ``data`` is what ``load_documents`` takes; without it the text bundled for the bundled teacher
    serves models that share its tokenizer. ``tokens`` limits how much of it is read (None: all),
    ``sequence_length`` is in tokens, ``command`` is the command line to keep in the report.

    Raises ``UserError`` for checkpoints, text and devices that cannot be used, and for a teacher
    with another tokenizer.
    """
    paths = {"teacher": teacher, "model": model} if teacher else {"model": model}
    tokenizer = _shared_tokenizer(list(paths.values()), trust_remote_code)
    source = data or str(_bundled_text(model, tokenizer))
    windows = tokenize_by_document(
        load_documents(source), tokenizer, sequence_length, limit_tokens=tokens
    )
    sequences = [window for document in windows for window in document]
    documents = [number for number, document in enumerate(windows) for _ in document]
    options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    models = {name: load_model(path, **options)[0] for name, path in paths.items()}
    start = time.monotonic()
    found = evaluate(
        models,
        sequences,
        teacher=models.get("teacher"),
        documents=documents,
        batch_size=batch_size,
        pad_id=pad_id(tokenizer),
        device=device,
    )
    meta = machine_meta(
        command,
        device=device,
        data={
            "name": Path(source).name if Path(source).exists() else source,
            "documents": len(windows),
            "sequence_length": sequence_length,
            "fingerprint": fingerprint([sequence.tolist() for sequence in sequences]),
        },
        dtype=dtype or "as stored",
        seconds=round(time.monotonic() - start, 2),
    )
    rows = [_measured_row(name, paths[name], models[name], found[name]) for name in paths]
    return EvaluationReport(meta, rows)


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


def _measured_row(name: str, path: str, model: nn.Module, quality: Quality) -> Row:
    headers = read_sizes(path)
    return Row(
        **_origin(name, path, headers.config),
        tokens=quality.tokens,
        parameters=count_parameters(model),
        active_parameters=count_active_parameters(model, headers),
        expert_bytes=expert_bytes(headers),
        total_bytes=headers.total_bytes,
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
