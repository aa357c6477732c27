"""What is counted and summed of a MoE layer while calibration text passes through it.

Shape suffixes: T tokens of a batch, K experts chosen per token, N = T * K rows sorted by expert,
E experts, D hidden width, F expert intermediate width, S sampled tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefuse.mathematics.experts import Experts, ExpertsCall

MEAN_OUTPUT_TOKENS = 2048
"""Every expert is run on this many tokens, chosen or not, to learn its mean output."""


@dataclass
class LayerStatistics:
    """Running sums over the calibration tokens of one layer, fp64 on the CPU.

    ``coactivation_EE`` counts tokens that chose both experts (diagonal: tokens that chose one),
    ``mass_E`` sums routing weights, ``weighted_norm_E`` sums routing weight times output norm,
    ``moment_DD`` and ``sum_D`` sum ``x x^T`` and ``x`` of the layer's input, ``output_ED`` sums
    what each expert returns on the same ``sampled`` tokens.
    """

    coactivation_EE: Tensor
    mass_E: Tensor
    weighted_norm_E: Tensor
    moment_DD: Tensor
    sum_D: Tensor
    output_ED: Tensor
    tokens: int = 0
    sampled: int = 0

    @classmethod
    def empty(cls, experts: int, hidden: int) -> "LayerStatistics":
        """Start with nothing seen."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return cls(
            coactivation_EE=zeros(experts, experts),
            mass_E=zeros(experts),
            weighted_norm_E=zeros(experts),
            moment_DD=zeros(hidden, hidden),
            sum_D=zeros(hidden),
            output_ED=zeros(experts, hidden),
        )

    def add(self, call: ExpertsCall, experts: Experts) -> None:
        """Count one batch; ``experts`` are the layer's weights on the batch's device."""
        index_TK = call.index_TK.long()
        chosen_TE = torch.zeros(len(index_TK), len(self.mass_E), device=index_TK.device)
        chosen_TE.scatter_(1, index_TK, 1.0)
        self.coactivation_EE += (chosen_TE.T @ chosen_TE).double().cpu()
        weights_TE = torch.zeros_like(chosen_TE).scatter_(1, index_TK, call.weight_TK)
        self.mass_E += weights_TE.sum(0).double().cpu()
        self.weighted_norm_E += _weighted_norms(call, experts, weights_TE).double().cpu()
        x_TD = call.x_TD.float()
        self.moment_DD += (x_TD.T @ x_TD).double().cpu()
        self.sum_D += x_TD.sum(0).double().cpu()
        self.tokens += len(index_TK)
        self._sample(call, experts)

    def _sample(self, call: ExpertsCall, experts: Experts) -> None:
        wanted = min(MEAN_OUTPUT_TOKENS - self.sampled, len(call.x_TD))
        if wanted <= 0:
            return
        x_SD = call.x_TD[:wanted]
        for expert in range(len(self.mass_E)):
            self.output_ED[expert] += experts.run(expert, x_SD).sum(0).double().cpu()
        self.sampled += wanted

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors for an artifact."""
        sums = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {"counts": torch.tensor([self.tokens, self.sampled]), **sums}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "LayerStatistics":
        """Read back what ``tensors`` gave."""
        sums = {name: tensor for name, tensor in tensors.items() if name != "counts"}
        tokens, sampled = tensors["counts"].tolist()
        counts: dict[str, Any] = {"tokens": tokens, "sampled": sampled}
        return cls(**sums, **counts)

    @property
    def count_E(self) -> Tensor:
        """How many tokens chose each expert, (E,) fp64."""
        return self.coactivation_EE.diagonal()

    @property
    def never_routed(self) -> list[int]:
        """The experts that no calibration token chose."""
        return (self.count_E == 0).nonzero().flatten().tolist()

    @property
    def mean_output_ED(self) -> Tensor:
        """Each expert's mean output over the sampled tokens, (E, D) fp64."""
        return self.output_ED / max(self.sampled, 1)

    @property
    def mean_weighted_norm_E(self) -> Tensor:
        """REAP's score: mean of routing weight times output norm over an expert's own tokens.

        Lasby et al., "REAP the Experts" (2025), equation 9. (E,) fp64; 0 for experts never routed.
        """
        return self.weighted_norm_E / self.count_E.clamp_min(1.0)


def _weighted_norms(call: ExpertsCall, experts: Experts, weights_TE: Tensor) -> Tensor:
    sums = []
    for expert in range(weights_TE.shape[1]):
        rows = weights_TE[:, expert].nonzero().flatten()
        output = experts.run(expert, call.x_TD[rows]).float()
        sums.append((output.norm(dim=1) * weights_TE[rows, expert]).sum())
    return torch.stack(sums)
