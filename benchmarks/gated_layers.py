"""Plainly gated experts against gpt-oss's, on random layers of the same matrices.

    python benchmarks/gated_layers.py

prints the relative errors, one shot and distilled, of bases of both kinds and of own neurons: the
table of docs/families.md. Experts are a common part and ``own`` times a part of their own, of equal
spread whatever ``own`` is, their neurons in any order; gpt-oss's have biases besides. A minute on
one core.

Shape suffixes: T tokens, K experts chosen per token, E experts, F neurons, D hidden width.
"""

import torch

from moefuse.config import DistillConfig, FactorConfig
from moefuse.distillation.loop import distill_layer
from moefuse.fusion.choose import factor
from moefuse.fusion.keep import keep
from moefuse.mathematics.experts import ExpertBiases, Experts, ExpertsCall
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.modeling.modeling_moefuse import ClampedGating, PlainGating
from moefuse.sizes import LayerPlan, load_experts

E, D, F, K, T = 8, 64, 32, 2, 6144
FITTED = 4096
SPREAD, BIAS_SPREAD = 1.5, 0.3
GATINGS = {
    "plain": PlainGating(torch.nn.functional.silu),
    "gpt-oss": ClampedGating(alpha=1.702, limit=7.0),
}
OWN = (0.3, 1.0, 100.0)
SIZES = ((1, 4), (3, 4), (3, 8))
DISTILL = DistillConfig(steps=200, batch_tokens=512)


def make_layer(own: float, name: str) -> Experts:
    """Return random experts; the same matrices for every gating."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def mixed(common: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
        return (common + own * each) / (1 + own**2) ** 0.5

    rows_E3FD = SPREAD * mixed(normal(3, F, D), normal(E, 3, F, D)) / D**0.5
    bias_E2F = BIAS_SPREAD * mixed(normal(2, F), normal(E, 2, F))
    for expert in range(E):
        order_F = torch.randperm(F, generator=generator)
        rows_E3FD[expert] = rows_E3FD[expert][:, order_F]
        bias_E2F[expert] = bias_E2F[expert][:, order_F]
    biases = ExpertBiases(bias_E2F.flatten(1), 0.1 * normal(E, D)) if name == "gpt-oss" else None
    down_EDF = rows_E3FD[:, 2].mT * (D / F) ** 0.5
    return Experts(rows_E3FD[:, :2].flatten(1, 2), down_EDF.contiguous(), GATINGS[name], biases)


def call_of(experts: Experts) -> ExpertsCall:
    """Return what the layer does on random inputs."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(T, D, generator=generator)
    scores_TE = torch.softmax(2 * torch.randn(T, E, generator=generator), -1)
    weight_TK, index_TK = scores_TE.topk(K)
    weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
    y_TD = torch.zeros(T, D)
    for expert in range(E):
        token_N, slot_N = (index_TK == expert).nonzero(as_tuple=True)
        y_TD[token_N] += weight_TK[token_N, slot_N, None] * experts.run(expert, x_TD[token_N])
    return ExpertsCall(x_TD, index_TK.int(), weight_TK, y_TD)


def bases(experts: Experts, call: ExpertsCall, groups: int, rank: int) -> str:
    """Return the errors of both kinds of bases."""
    statistics = LayerStatistics.empty(E, D)
    statistics.add(call, experts)
    plan, told = LayerPlan(groups, rank, scale=True), []
    for base in ("mean", "neurons"):
        options = FactorConfig(base=base, fit_tokens=FITTED)
        made = factor(experts, statistics, call, torch.arange(E) % groups, plan, options)
        errors = distill_layer(load_experts(made.state, experts, plan), call, DISTILL)
        told.append(f"{base} {errors.before:.3f}, distilled {errors.after:.3f}")
    return "; ".join(told)


def main() -> None:
    """Print all errors."""
    torch.set_num_threads(1)
    for own in OWN:
        for groups, rank in SIZES:
            for name in GATINGS:
                experts = make_layer(own, name)
                told = bases(experts, call_of(experts), groups, rank)
                print(f"own {own:5}, {groups} groups, rank {rank}, {name:7}: {told}")
    for bits in ("2", "4", "8"):
        for name in GATINGS:
            experts, all_EF = make_layer(OWN[-1], name), torch.ones(E, F, dtype=torch.int64)
            call, plan = call_of(experts), LayerPlan(neurons={bits: E * F})
            kept = keep(experts, call, all_EF.float(), all_EF, ("0", bits), plan).trained()
            errors = distill_layer(kept, call, DISTILL)
            print(f"own neurons, {bits} bits, {name:7}: {errors.before:.4f}, {errors.after:.4f}")


if __name__ == "__main__":
    main()
