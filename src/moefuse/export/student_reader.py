"""A fused checkpoint read as if it were a plain one of its teacher's architecture.

Whatever reads a teacher reads a student this way: layer by layer, its experts written out when they
are asked for. So a student can be streamed, written out whole, and stand as the teacher of another.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefuse.checkpoint.formats import check_known
from moefuse.checkpoint.headers import local_headers
from moefuse.checkpoint.native import Weights, to_native
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.devices import WORKING
from moefuse.errors import UserError
from moefuse.export.ordinary import ordinary_experts, widest
from moefuse.families import Family, all_families
from moefuse.mathematics.experts import ExpertBiases
from moefuse.modeling import is_fused
from moefuse.modeling.modeling_moefuse import FACTORS, FusedExperts, LowRankDelta, NeuronExperts
from moefuse.sizes import LayerPlan, make_experts

PREDICTION_LAYERS = "num_nextn_predict_layers"
"""What configurations call layers behind the last one, which no student has."""


@dataclass(frozen=True)
class StudentReader(CheckpointReader):
    """A student's checkpoint; make one with :meth:`of`.

    ``config``, ``family`` and ``shape`` are those of the plain model, ``plans`` what the student's
    layers are. Tensors beside the experts have the names of Transformers' modules.
    """

    plans: dict[int, LayerPlan]

    @classmethod
    def of(cls, directory: Path, *, exactly: bool = True) -> "StudentReader":
        """Open a fused checkpoint in ``directory``; raises ``UserError`` for anything else, and for
        the format of a quantiser that moefuse does not read.

        Multiplexed experts, which ordinary ones only come near to, are refused if the plain model
        is to compute ``exactly`` what the student does.
        """
        headers = local_headers(str(directory), directory)
        if not is_fused(headers.config):
            raise UserError(
                f"{directory} is not a fused checkpoint: its config.json has no moefuse block. "
                "Give one that 'moefuse fuse' wrote."
            )
        check_known(headers.source, headers.config)
        block = headers.config["moefuse"]
        family = all_families()[block["teacher_model_type"]]
        config = plain_config(headers.config, family)
        plans = {int(layer): LayerPlan(**plan) for layer, plan in block["layers"].items()}
        if exactly and any(plan.is_multiplexed for plan in plans.values()):
            raise UserError(
                f"{directory} has multiplexed experts (imported from the layout of 2025, or fused "
                "by --form multiplexed), which are mixed before the non-linearity: no ordinary "
                "experts compute that, so it has no plain form; 'moefuse collapse' makes a plain "
                "model that learns to come near."
            )
        shape = family.shape(config)
        return cls(headers.source, directory, config, headers.tensors, family, shape, plans=plans)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the student is stored in."""
        return WORKING.get(str(self.config.get("dtype")), torch.bfloat16)

    @property
    def is_multiplexed(self) -> bool:
        """Whether members of a group are mixed before the non-linearity."""
        return any(plan.is_multiplexed for plan in self.plans.values())

    @property
    def loses_biases(self) -> bool:
        """Whether experts have biases that an ordinary expert of the family cannot have."""
        return not self.shape.biased and any(plan.bias for plan in self.plans.values())

    def module(self, layer: int) -> FusedExperts | NeuronExperts:
        """Read one layer's fused module, on the CPU and in the dtype that it is stored in.

        Its activation means nothing.
        """
        prefix = f"{self.family.experts_path(layer)}."
        _, names = self._names(layer)
        state = {name.removeprefix(prefix): self.read(name) for name in names}
        module = make_experts(self.shape, self.plans[layer], "meta")
        module.load_state_dict(state, assign=True)
        return module

    def factor_shapes(self, layer: int) -> dict[str, torch.Size]:
        """Return the shapes of a layer's low-rank deltas' factors by name; of none, nothing."""
        return {name: factor.shape for name, factor in _factors(self._delta(layer)).items()}

    def read_factors(self, layer: int) -> dict[str, Tensor]:
        """Read the factors of a layer's low-rank deltas by name, those of few bits decoded."""
        prefix = f"{self.family.experts_path(layer)}.delta."
        names = [name for name in self._names(layer)[1] if name.startswith(prefix)]
        delta = self._delta(layer)
        if delta is not None:
            state = {name.removeprefix(prefix): self.read(name) for name in names}
            delta.load_state_dict(state, assign=True)
        return _factors(delta)

    def _delta(self, layer: int) -> LowRankDelta | None:
        delta = getattr(make_experts(self.shape, self.plans[layer], "meta"), "delta", None)
        return delta if isinstance(delta, LowRankDelta) else None

    def widest(self) -> int:
        """Return how many neurons the largest of all experts has, reading layer by layer."""
        return max(widest(self.module(layer)) for layer in self.shape.layers)

    def widened(self, width: int) -> "StudentReader":
        """Return the same student with experts of ``width`` neurons, zeros filling them up."""
        config = {**self.config, self.family.intermediate_key: width}
        return replace(self, config=config, shape=replace(self.shape, intermediate=width))

    def read_experts(
        self,
        layer: int,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Weights:
        """Return a layer's experts written out: ``gate_up`` (E, 2F, D), ``down`` (E, D, F), biases
        where the family has them."""
        return self.written_out(self.module(layer), device=device, dtype=dtype)

    def written_out(
        self,
        module: FusedExperts | NeuronExperts,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Weights:
        """Do what ``read_experts`` does for a layer that ``module`` has read."""
        shape = self.shape
        place: dict[str, Any] = {"dtype": dtype or self.dtype, "device": device}
        gate_up_EFD = torch.empty((shape.experts, 2 * shape.intermediate, shape.hidden), **place)
        down_EDF = torch.empty((shape.experts, shape.hidden, shape.intermediate), **place)
        bias_EF = torch.empty(gate_up_EFD.shape[:2], **place) if shape.biased else None
        for expert, made in enumerate(ordinary_experts(module, shape.intermediate)):
            gate_up_FD, down_DF, bias_F = made
            gate_up_EFD[expert].copy_(gate_up_FD)
            down_EDF[expert].copy_(down_DF)
            if bias_EF is not None and bias_F is not None:
                bias_EF[expert].copy_(bias_F)
        if bias_EF is None or module.down_bias is None:
            return gate_up_EFD, down_EDF, None
        return gate_up_EFD, down_EDF, ExpertBiases(bias_EF, module.down_bias.detach().to(**place))

    def read_native(
        self, layer: int, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return a layer's experts written out, as parameters of Transformers' module."""
        weights = self.read_experts(layer, device=device, dtype=dtype)
        return to_native(weights, self.family.layout)

    def _names(self, layer: int) -> tuple[list[str], list[str]]:
        """Return the names of a layer's tensors beside its fused experts, and of those."""
        routed = f"{self.family.experts_path(layer)}."
        parts: tuple[list[str], list[str]] = ([], [])
        for name in self._by_layer.get(layer, ()):
            parts[name.startswith(routed)].append(name)
        return parts


def _factors(delta: LowRankDelta | None) -> dict[str, Tensor]:
    names = () if delta is None else FACTORS
    return {name: getattr(delta, name).detach() for name in names}


def plain_config(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return the ``config.json`` of a plain model of the teacher's architecture.

    Rotary settings are spelt both as Transformers 5 has them and as everybody did before.
    """
    dropped = {"moefuse", "auto_map", "transformers_version"}
    plain = {key: value for key, value in config.items() if key not in dropped}
    plain |= {"architectures": [family.causal_lm], "model_type": family.model_type}
    if plain.get(PREDICTION_LAYERS):
        plain[PREDICTION_LAYERS] = 0
    return {**plain, **_older_rope(plain.get("rope_parameters"))}


def _older_rope(parameters: Any) -> dict[str, Any]:
    """Spell flat ``rope_parameters`` as ``rope_theta`` and ``rope_scaling``, for other engines."""
    if not isinstance(parameters, dict) or "rope_type" not in parameters:
        return {}
    beside = {k: parameters[k] for k in ("rope_theta", "partial_rotary_factor") if k in parameters}
    scaling = {key: value for key, value in parameters.items() if key not in beside}
    if scaling["rope_type"] == "default":
        return {**beside, "rope_scaling": None}
    return {**beside, "rope_scaling": {**scaling, "type": scaling["rope_type"]}}
