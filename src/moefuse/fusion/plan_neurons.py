"""Plan neuron experts: from bytes to how many neurons of every layer have how many bits.

Before calibration the plan is a forecast with typical energies; after it, ``settle`` chooses for
the energies that were measured, over all layers at once, and counts true bytes on the modules.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from moefuse.config import SizeConfig
from moefuse.errors import UserError
from moefuse.families import MoeShape
from moefuse.fusion.allocate import FULL, LOW_BITS, allocate, neuron_bytes, predicted_loss
from moefuse.sizes import LayerPlan, layer_bytes, neuron_numbers

LEAST_BITS = 0.05
"""Bits per number of the teacher's experts below which a budget is refused."""
SHARED_BELOW_BITS = 0.75
"""Budget, in bits per number, below which low-bit students have shared neurons: they won there."""
SHARED_SHARE = 0.5
"""Most of the budget that shared neurons take where the teacher has shared experts as well; where
it has none, shared neurons may take all."""
FEW_BITS = {1.25: ("1.6", "2"), 0.875: ("1.6",), 0.625: ("1.33",), 0.0: ("1",)}
"""Where the teacher has shared experts: from how many bits per number of budget on own neurons have
which bits or none, as long as not all can have two. Kept neurons then have alike many, and about
three fifths of the neurons are kept (docs/research.md, section 15)."""
FINE_BITS = ("1", "1.14", "1.33", "1.6", "2")
"""Where it has none, a neuron that is lost is made up for by nothing: all are kept while all can
have one bit, at the two of these, side by side, that the budget lies between."""
FROM_TWO_BITS = ("2", "3", "4", "8", "16")
SHARED_BITS, GAIN_BITS = "2", "4"
CODEBOOK_SHARE = 0.01
"""Share of the budget below which codebooks are too small to choose bit widths by."""
LARGEST_CODEBOOK_SHARE = 0.1
"""Share of the budget above which even one codebook is too large to be taken without asking."""
ENERGY_SPREAD = 1.6
"""Standard deviation of the logarithm of neurons' energies; about what trained teachers show."""
WIDTH_BYTES = 4

Settled = tuple[dict[int, Tensor], dict[int, LayerPlan]]


def uses_neurons(size: SizeConfig) -> bool:
    """Say whether experts become own neurons; see ``SizeConfig.form``."""
    if size.form != "auto":
        return size.form == "neurons"
    wishes = (size.params, size.bytes, size.expert_bits)
    has_budget = any(wish is not None for wish in wishes)
    return has_budget and size.groups is None and size.rank is None


def choices_of(size: SizeConfig) -> tuple[str, ...]:
    """Return the bits that a neuron may have, none ("0") first."""
    if size.params is not None:
        return FULL
    return LOW_BITS if size.bits == "auto" else ("0", size.bits)


def least_bytes(shape: MoeShape, size: SizeConfig, itemsize: int) -> int:
    """Return the least that all routed experts may take; room for a few neurons in any case."""
    alone = [LayerPlan(neurons={bits: 1}) for bits in choices_of(size)[1:]]
    one = min(layer_bytes(shape, plan, itemsize) for plan in alone)
    return max(2 * len(shape.layers) * one, int(LEAST_BITS * _numbers(shape) / 8) + 1)


def most_bytes(shape: MoeShape, itemsize: int) -> int:
    """Return what all routed experts take when every neuron is kept whole: numbers and widths."""
    return _numbers(shape) * itemsize + len(shape.layers) * shape.experts * WIDTH_BYTES


def forecast(
    shape: MoeShape, budget: int, size: SizeConfig, itemsize: int
) -> tuple[dict[int, LayerPlan], float]:
    """Plan every layer for ``budget`` bytes of routed experts as if all layers were typical.

    Returns the plans and the share of the experts' energy that they lose, 0 to 1. Raises
    ``UserError`` where the shared neurons that were asked for leave no room.
    """
    first = shape.layers[0]
    count = shape.experts * shape.intermediate
    place_N = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    energy_N = (ENERGY_SPREAD * torch.special.ndtri(place_N)).exp()
    # Every expert gets its share of strong neurons and of weak ones.
    energy_EF = energy_N.view(-1, shape.experts).T
    typical = replace(shape, layers=(first,))
    energies = {first: energy_EF}
    chosen, plans = settle(typical, energies, budget // len(shape.layers), size, itemsize)
    lost = predicted_loss(energies, chosen, choices_of(size))
    return dict.fromkeys(shape.layers, plans[first]), lost


def settle(
    shape: MoeShape,
    energies: Mapping[int, Tensor],
    budget: int,
    size: SizeConfig,
    itemsize: int,
) -> Settled:
    """Choose every neuron's bits by what was measured, and plan every layer.

    ``energies`` holds each layer's (E, F); all layers together take at most ``budget`` bytes,
    codebooks, scales and widths counted. Returns each layer's (E, F) numbers of a choice in
    ``choices_of(size)``, and the plans. Where a codebook in every layer is no trifle beside the
    budget, only those bit widths are used that pay for theirs. Raises ``UserError`` where the
    shared neurons that were asked for leave no room.
    """
    if size.spread == "layer" and len(energies) > 1:
        return _settle_apart(shape, energies, budget, size, itemsize)
    settling = _Settling(shape, energies, budget, size, itemsize)
    widths = settling.choices[1:]
    if widths == LOW_BITS[1:]:
        if settling.fits_all("2", FROM_TWO_BITS):
            return settling.with_widths(FROM_TWO_BITS, least=())
        few, least = settling.few_bits()
        if settling.codebook_share(few) <= LARGEST_CODEBOOK_SHARE:
            return settling.with_widths(few, least=least)
    if settling.codebook_share(widths) <= CODEBOOK_SHARE:
        return settling.with_widths(widths)
    return settling.with_best_widths()


def _settle_apart(
    shape: MoeShape,
    energies: Mapping[int, Tensor],
    budget: int,
    size: SizeConfig,
    itemsize: int,
) -> Settled:
    """Settle every layer by itself, each with an equal share of the budget."""
    chosen: dict[int, Tensor] = {}
    plans: dict[int, LayerPlan] = {}
    for layer, energy_EF in energies.items():
        alone = replace(shape, layers=(layer,))
        share = budget // len(energies)
        of_one, plan = settle(alone, {layer: energy_EF}, share, size, itemsize)
        chosen, plans = chosen | of_one, plans | plan
    return chosen, plans


@dataclass(frozen=True)
class _Settling:
    shape: MoeShape
    energies: Mapping[int, Tensor]
    budget: int
    size: SizeConfig
    itemsize: int

    @property
    def choices(self) -> tuple[str, ...]:
        return choices_of(self.size)

    def codebook_share(self, widths: tuple[str, ...]) -> float:
        """Return the share of the budget that codebooks of these bit widths take."""
        empty = LayerPlan(neurons=dict.fromkeys(widths, 0))
        taken = len(self.energies) * layer_bytes(self.shape, empty, self.itemsize)
        return taken / max(self.budget, 1)

    def fits_all(self, bits: str, widths: tuple[str, ...]) -> bool:
        """Say whether all neurons can have ``bits`` and codebooks for all ``widths``."""
        neurons = len(self.energies) * self.shape.experts * self.shape.intermediate
        taken = neurons * neuron_bytes(self.shape.hidden, bits, self.itemsize, self.shape.biased)
        return taken + self.codebook_share(widths) * self.budget <= self.budget

    def few_bits(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the bits that neurons have where not all can have two, and the least of all."""
        if not self.shape.shared_experts:
            pairs = pairwise(FINE_BITS)
            fitting = [pair for pair in pairs if self.fits_all(pair[0], pair)]
            return (fitting[-1], ()) if fitting else (FINE_BITS[:1], ("0",))
        per_number = 8 * self.budget / _numbers(self.shape)
        return next(bits for start, bits in FEW_BITS.items() if per_number >= start), ("0",)

    def with_best_widths(self) -> Settled:
        """Settle with the bit widths that lose least, found by adding one after another."""
        tried: tuple[str, ...] = ()
        best, least = self.with_widths(tried), float("inf")
        while True:
            options = [
                tuple(sorted({*tried, bits}, key=self.choices.index))
                for bits in self.choices[1:]
                if bits not in tried
            ]
            found = [(self.with_widths(widths), widths) for widths in options]
            losses = [predicted_loss(self.energies, f[0][0], self.choices) for f in found]
            if not losses or min(losses) >= least:
                return best
            least = min(losses)
            best, tried = found[losses.index(least)]

    def with_widths(self, widths: tuple[str, ...], least: tuple[str, ...] = ("0",)) -> Settled:
        """Settle with neurons of these bit widths only; with no ``least``, all are kept."""
        shared = _shared_count(self.shape, self.budget, self.size, self.itemsize)
        allowed = (*least, *widths)
        number = torch.tensor([self.choices.index(bits) for bits in allowed])
        room = self.budget
        asked, most = self.size.shared is not None, _most_shared(self.shape)
        if not asked and not self.shape.shared_experts and 0 < shared < most:
            # They took the budget; what is left of it would give few layers a neuron of their own.
            room = 0
        while True:
            shape, hidden = self.shape, self.shape.hidden
            found = allocate(
                self.energies, hidden, room, allowed, self.itemsize, biased=shape.biased
            )
            chosen = {layer: number.to(part.device)[part] for layer, part in found.items()}
            plans = {layer: self._plan(part, shared) for layer, part in chosen.items()}
            sizes = (layer_bytes(self.shape, plan, self.itemsize) for plan in plans.values())
            excess = sum(sizes) - self.budget
            if excess <= 0:
                return chosen, plans
            room -= excess

    def _plan(self, chosen_EF: Tensor, shared: int) -> LayerPlan:
        """Plan a layer.

        Unless their number was asked for, it shares fewer neurons where a token would else pass
        more parameters than the teacher's.
        """
        shape = self.shape
        own_E = (chosen_EF > 0).sum(1)
        widest = int(own_E.topk(min(shape.top_k, shape.experts)).values.sum())
        neuron = neuron_numbers(shape)
        room = neuron * (shape.top_k * shape.intermediate - widest) // (neuron + shape.top_k)
        shared = min(shared, room) if self.size.shared is None else shared
        plan = _layer_plan(shape, _counts(chosen_EF, self.choices), shared, self.choices)
        return replace(plan, widest=widest)


def _numbers(shape: MoeShape) -> int:
    return len(shape.layers) * shape.layer_numbers


def _counts(chosen_EF: Tensor, choices: tuple[str, ...]) -> dict[str, int]:
    counts = torch.bincount(chosen_EF.flatten(), minlength=len(choices)).tolist()
    return {
        bits: counts[number] for number, bits in enumerate(choices) if number and counts[number]
    }


def _shared_count(shape: MoeShape, budget: int, size: SizeConfig, itemsize: int) -> int:
    """Return how many neurons every layer shares; raises ``UserError`` for more than fit."""
    choices = choices_of(size)

    def taken(count: int) -> int:
        plan = _layer_plan(shape, {}, count, choices)
        return len(shape.layers) * layer_bytes(shape, plan, itemsize)

    if size.shared is not None:
        if taken(size.shared) > budget:
            raise UserError(
                f"--shared is {size.shared}, and that many neurons in every layer take "
                f"{taken(size.shared) / 1e6:.3f} MB of the {budget / 1e6:.3f} MB that the routed "
                "experts may take; share fewer."
            )
        return size.shared
    if choices == FULL:
        has_shared = budget < _numbers(shape) * itemsize
    else:
        has_shared = 8 * budget <= SHARED_BELOW_BITS * _numbers(shape)
    if not has_shared:
        return 0
    share = SHARED_SHARE if shape.shared_experts else 1.0
    return bisect_right(range(1, _most_shared(shape) + 1), share * budget, key=taken)


def _most_shared(shape: MoeShape) -> int:
    """Return how many neurons a layer shares at most without being asked to.

    Without shared experts nothing else is common to all tokens: as many as a token passes in the
    teacher.
    """
    return shape.intermediate * (1 if shape.shared_experts else shape.top_k)


def _layer_plan(
    shape: MoeShape, neurons: dict[str, int], shared: int, choices: tuple[str, ...]
) -> LayerPlan:
    left_over = shape.experts * shape.intermediate - sum(neurons.values())
    plan = LayerPlan(neurons=neurons, shared=min(shared, left_over))
    if choices == FULL:
        return plan
    return replace(plan, shared_bits=SHARED_BITS, gain_bits=GAIN_BITS)
