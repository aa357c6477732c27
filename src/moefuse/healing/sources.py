"""Where healing gets the teacher's predictions from: the teacher itself, or a cache of them.

A live teacher runs beside the student on every batch and tells everything. A cache, made once by
``moefuse teach``, needs no memory beside the student's and tells the likeliest words alone.

Shape suffixes: B rows, S tokens in a row, T tokens that count, D hidden width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefuse.families import Family
from moefuse.healing.cache import TeacherCache
from moefuse.healing.losses import CachedTargets, LiveTargets, NoTargets, Targets


@dataclass(frozen=True)
class Told:
    """What a teacher tells about one batch: ``targets`` for the tokens that count and, where asked
    for and there is a live teacher, the ``hidden`` states after every layer, (B, S, D) each."""

    targets: Targets
    hidden: tuple[Tensor, ...] = ()


class TeacherSource(Protocol):
    """What tells a batch's targets; ``knows_all`` is whether of other text than that to heal on."""

    knows_all: bool

    def tell(self, batch: Mapping[str, Tensor], counted_BS: Tensor, *, hidden: bool) -> Told:
        """Return what the teacher says about ``batch`` (see ``PackedRows``)."""
        ...


def packed_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what makes a Transformers model read packed rows, each piece by itself."""
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "use_cache": False,
    }


class LiveTeacher:
    """A teacher in memory; it never learns."""

    knows_all = True

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model = model.eval().requires_grad_(False)
        self.logit_scale = family.logit_scale(model.config.to_dict())

    @torch.no_grad()
    def tell(self, batch: Mapping[str, Tensor], counted_BS: Tensor, *, hidden: bool) -> Told:
        """Run the teacher; its head is applied later, a few tokens at a time."""
        backbone: Any = self.model.base_model
        given = packed_inputs(batch)
        output = backbone(**given, output_hidden_states=hidden)
        head: Any = self.model.get_output_embeddings()
        states = tuple(output.hidden_states[1:]) if hidden else ()
        hidden_TD = output.last_hidden_state[counted_BS]
        return Told(LiveTargets(hidden_TD, head, self.logit_scale), states)


class CachedTeacher:
    """A cache's rows, which are the text's."""

    knows_all = False

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def tell(self, batch: Mapping[str, Tensor], counted_BS: Tensor, *, hidden: bool) -> Told:
        """Read the batch's rows from the disk."""
        assert not hidden, "refused before work starts: a cache has no hidden states"
        return Told(CachedTargets(self.cache.rows(batch["row"]).to(counted_BS.device)))


class NoTeacher:
    """Nothing at all: only the text's own cross-entropy can be measured."""

    knows_all = True

    def tell(self, batch: Mapping[str, Tensor], counted_BS: Tensor, *, hidden: bool) -> Told:  # noqa: ARG002
        """Return targets from which everything is as far as nothing."""
        return Told(NoTargets())
