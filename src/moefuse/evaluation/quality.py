"""Measuring models side by side on the same text.

All models go through the text in lockstep: the teacher's logits of a batch are computed once,
serve every student and are dropped. Storing them instead would take gigabytes a minute; running
the teacher once per student would double the time.

B sequences in a batch, S their padded length, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moefuse.console import track
from moefuse.corpus import batch_order, pad
from moefuse.errors import UserError
from moefuse.evaluation.metrics import (
    agreement_per_token,
    bootstrap_interval,
    kl_per_token,
    token_losses,
)

BOOTSTRAP_SEED = 0
Speaker = Callable[[int, Tensor, Tensor], Tensor]
"""Whatever gives logits without being a model in memory: called with a batch's number, its token
ids and its mask, (B, S), in the order of ``corpus.batch_order``, it returns (B, S, V)."""
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
    models: Mapping[str, nn.Module | Speaker],
    sequences: Sequence[Tensor],
    *,
    teacher: nn.Module | Speaker | None = None,
    documents: Sequence[int] | None = None,
    batch_size: int = 8,
    pad_id: int,
    device: str | torch.device = "cpu",
    description: str | None = "evaluate",
) -> dict[str, Quality]:
    """Measure every model on the same sequences.

    ``sequences`` are 1-D int64 token ids of length 2 or more; ``documents`` numbers the document
    that each belongs to (default: each its own; where all belong to one, its sequences are
    resampled instead). ``device`` is where the models are. ``teacher`` may be one of ``models``.
    Progress is shown under ``description``, if there is one.
    Each model runs in its own dtype and leaves in the mode (training or not) that it came in.

    Raises ``UserError`` without sequences, for models whose vocabularies differ in size and for
    logits that are not numbers.
    """
    if not sequences:
        raise UserError("There is no text to evaluate on; give at least one sequence.")
    sums = {name: torch.zeros(len(sequences), 3, dtype=torch.float64) for name in models}
    order = batch_order(map(len, sequences), batch_size)
    with _evaluation_mode([*models.values(), *([teacher] if teacher is not None else [])]):
        for number, positions in enumerate(
            order if description is None else track(order, description)
        ):
            ids_BS, mask_BS = pad([sequences[position] for position in positions], pad_id)
            ids_BS, mask_BS = ids_BS.to(device), mask_BS.to(device)
            batch = (number, ids_BS, mask_BS)
            wanted_BSV = None if teacher is None else _logits(teacher, *batch)
            for name, model in models.items():
                known_BSV = wanted_BSV if model is teacher else None
                logits_BSV = _logits(model, *batch) if known_BSV is None else known_BSV
                sums[name][positions] = _batch_sums(name, logits_BSV, wanted_BSV, ids_BS, mask_BS)
    units = _units(len(sequences), documents)
    tokens_N = torch.tensor([len(sequence) - 1 for sequence in sequences])
    return {
        name: _quality(sums[name], tokens_N, units, documents, teacher is not None)
        for name in models
    }


@contextmanager
def _evaluation_mode(models: Sequence[nn.Module | Speaker]) -> Iterator[None]:
    loaded = [model for model in models if isinstance(model, nn.Module)]
    modes = [(module, module.training) for model in loaded for module in model.modules()]
    for model in loaded:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _logits(model: nn.Module | Speaker, number: int, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    if not isinstance(model, nn.Module):
        return model(number, ids_BS, mask_BS)
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
