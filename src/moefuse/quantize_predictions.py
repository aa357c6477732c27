"""A whole quantised student learns to predict what it predicted before it was rounded.

What learns are the deltas, scales and biases of its experts, and bases' codes and their scales; see
``distillation.predictions``. Both students are in memory, in fp32.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moefuse.config import DistillConfig
from moefuse.console import track
from moefuse.distillation.predictions import divergence, learn_predictions
from moefuse.distillation.rounded import LearntRounding
from moefuse.export.quantized.deltas import stored_kind
from moefuse.export.student_reader import StudentReader
from moefuse.mathematics.integers import Grid, Rounded
from moefuse.modeling import load_fused
from moefuse.modeling.modeling_moefuse import CodedLowRankDelta
from moefuse.modeling.training import TrainedLowRankDelta
from moefuse.sizes import make_experts

PREDICTIONS = DistillConfig(delta_learning_rate=2e-4, warmup=0.05)
"""How deltas and scales learn predictions, all at one rate; measured in docs/research.md, 17."""
CODES_SCALE_RATE, CODE_RATE = 8e-4, 1e-3
"""The rates of the scales of bases' codes beside it, which are counted in shares of themselves, and
of the numbers that are rounded to codes, counted in scales."""
DELTA_CODE_RATES = {"8": 2e-3, "4": 1e-2}
"""The rate of what deltas' codes stand for, in units of a row's scale, by bits: the coarser codes
are, the further a number has to go to the next."""


class WholeStudent:
    """A student as it is stored quantised, and as it was before."""

    def __init__(
        self,
        reader: StudentReader,
        tensors: Mapping[str, Tensor],
        rounded: Mapping[str, Rounded],
        *,
        delta_bits: str,
        device: str,
    ) -> None:
        """Load the student of ``reader`` twice.

        ``tensors`` are those of the quantised one by name, ``rounded`` its rounded linear layers.
        """
        self.reader, self.tensors, self.rounded = reader, tensors, rounded
        self.delta_bits, self.device = delta_bits, device
        self.before: Any = load_fused(reader.directory, dtype=torch.float32).eval()
        self.after: Any = deepcopy(self.before)
        self._load_rounded()
        self._move()

    def _load_rounded(self) -> None:
        for layer, plan in self.reader.plans.items():
            experts = self.after.get_submodule(self.reader.family.experts_path(layer))
            stored = replace(plan, delta=stored_kind(plan, self.delta_bits))
            if stored != plan:
                experts.delta = make_experts(self.reader.shape, stored, "cpu").delta
        state = self.after.state_dict()
        known = {name: tensor for name, tensor in self.tensors.items() if name in state}
        weights = {f"{name}.weight": rounded.weight() for name, rounded in self.rounded.items()}
        self.after.load_state_dict({**known, **weights}, strict=False)

    def _move(self) -> None:
        self.before, self.after = self.before.to(self.device), self.after.to(self.device)

    def divergence(self, sequences: Sequence[Tensor]) -> float:
        """Return KL(before || after), nats a token, on token ids (S,) each."""
        return divergence(self.before, self.after, self._sent(sequences))

    def learn(
        self,
        sequences: Sequence[Tensor],
        wanted: Mapping[str, Tensor],
        grid: Grid | None,
        *,
        steps: int,
        seed: int,
    ) -> tuple[dict[str, Tensor], dict[str, Rounded]]:
        """Teach the quantised student; return what is stored otherwise now.

        Bases learn if their codes are whole numbers on a ``grid``; ``wanted`` (O, I) are the
        numbers that were rounded, by the names of layers. Returned are tensors by name, in the
        dtypes of those that there were, and rounded bases.
        """
        linears = {} if grid is None else self._with_learning_bases(wanted, grid)
        deltas = self._with_learning_deltas()
        self._move()
        learnt = learn_predictions(
            self.before,
            self.after,
            self._rates(linears, deltas),
            self._sent(sequences),
            replace(PREDICTIONS, steps=steps),
            seed=seed,
            progress=partial(track, description="Learn predictions"),
        )
        changed = {name: tensor for name, tensor in learnt.items() if name in self.tensors}
        for name in deltas:
            packed = self.after.get_submodule(name).packed()
            self.after.set_submodule(name, packed)
            changed |= {f"{name}.{part}": tensor for part, tensor in packed.state_dict().items()}
        changed = {n: tensor.to("cpu", self.tensors[n].dtype) for n, tensor in changed.items()}
        self.after.load_state_dict(changed, strict=False)
        bases = {name: self.after.get_submodule(name).rounded() for name in linears}
        for name, linear in linears.items():
            linear.weight.data.copy_(bases[name].weight())
            self.after.set_submodule(name, linear)
        self._move()
        return changed, bases

    def _sent(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        return [ids_S.to(self.device) for ids_S in sequences]

    @property
    def _paths(self) -> tuple[str, ...]:
        layers = self.reader.shape.layers
        return tuple(f"{self.reader.family.experts_path(layer)}." for layer in layers)

    def _with_learning_bases(self, wanted: Mapping[str, Tensor], grid: Grid) -> dict[str, Any]:
        """Let the codes of bases and their scales learn; return what stood there, by name."""
        linears = {name: self.after.get_submodule(name) for name in wanted}
        for name, weight_OI in wanted.items():
            learning = LearntRounding(weight_OI, self.rounded[name], grid)
            self.after.set_submodule(name, learning)
        return linears

    def _with_learning_deltas(self) -> list[str]:
        """Let the codes of deltas learn; return the names of these."""
        coded = {n: m for n, m in self.after.named_modules() if isinstance(m, CodedLowRankDelta)}
        for name, module in coded.items():
            self.after.set_submodule(name, TrainedLowRankDelta(module))
        return list(coded)

    def _rates(self, linears: Mapping[str, Any], deltas: Sequence[str]) -> dict[str, float]:
        """Return the learning rates of the parameters that learn, by name."""
        rates = {f"{name}.scale": CODES_SCALE_RATE for name in linears}
        rates |= {f"{name}.latent": CODE_RATE for name in linears}
        stems = tuple(f"{name}." for name in deltas)
        for name, _ in self.after.named_parameters():
            if name.startswith(stems):
                if name.endswith(".latent"):
                    rates[name] = DELTA_CODE_RATES[self.delta_bits]
            elif name.startswith(self._paths) and ".bases." not in name:
                rates[name] = PREDICTIONS.delta_learning_rate
        return rates
