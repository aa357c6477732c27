"""How fast one layer is distilled: against a plain loop over experts, and the device's matrix rate.

The layer has DeepSeek-Coder-V2-Lite's shapes (64 experts, D 2048, F 1408, top-6) as 8 fused experts
of rank 8 with scales; the numbers in it are random. A step is what ``distill_layer`` does: forward,
loss, backward and the optimiser. Two plain loops do the same step on the same student with the same
optimiser: one goes over experts and makes each one's matrices out of base and delta, as merging
LoRA does; the other goes over experts and adds the delta's output, so that a base runs once for
every expert that a token chose of its group.

Operations are counted as 2 a multiplication and addition, three times for forward and backward, of
what our own step multiplies; elementwise work and the optimiser count as none. The matrix rate is
that of one large product. Leaves ``distillation_speed-DEVICE-PRECISION.json`` and ``.md`` in
``results/``.

    python benchmarks/distillation_speed.py
    python benchmarks/distillation_speed.py --device cuda --precision bfloat16 --tokens 1024 16384
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefuse.artifacts import write_json, write_text
from moefuse.config import PRECISIONS, DistillConfig
from moefuse.distillation.loop import distill_layer
from moefuse.evaluation.machine import machine_meta
from moefuse.mathematics.experts import ExpertsCall
from moefuse.modeling.modeling_moefuse import FusedExperts, PlainGating

E, D, F, K = 64, 2048, 1408, 6
GROUPS, RANK = 8, 8
WARM_UP = 2
RUN = {"cpu": 1, "cuda": 10}
"""How many steps are timed together."""
RATE_SIZE = {"cpu": 2048, "cuda": 8192}


class MergedLoop(FusedExperts):
    """The same function: a loop over experts, each with its matrices made of base and delta."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the routed experts' output, (T, D)."""
        y_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token_N, slot_N = (top_k_index == expert).nonzero(as_tuple=True)
            base, delta, scale = self.of(expert)
            gate_up = base.gate_up_proj.weight * scale.unsqueeze(-1)
            gate_up = gate_up + delta.gate_up_b[expert] @ delta.gate_up_a[expert]
            down = base.down_proj.weight + delta.down_b[expert] @ delta.down_a[expert]
            h_NF = nn.functional.linear(hidden_states[token_N], gate_up)
            z_NF = self.gating(h_NF[:, :F], h_NF[:, F:])
            y_ND = nn.functional.linear(z_NF, down) * top_k_weights[token_N, slot_N].unsqueeze(-1)
            y_TD = y_TD.index_add(0, token_N, y_ND.to(y_TD.dtype))
        return y_TD

    def of(self, expert: int) -> tuple[Any, Any, Tensor]:
        """Return an expert's base, the deltas and its scales."""
        assert self.scale is not None
        return self.bases[int(self.group_of_expert[expert])], self.delta, self.scale[expert]


class AddedLoop(MergedLoop):
    """The same function: a loop over experts, each delta's output added to its base's."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the routed experts' output, (T, D)."""
        y_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token_N, slot_N = (top_k_index == expert).nonzero(as_tuple=True)
            base, delta, scale = self.of(expert)
            x_ND = hidden_states[token_N]
            h_NF = base.gate_up_proj(x_ND) * scale
            h_NF = h_NF + x_ND @ delta.gate_up_a[expert].T @ delta.gate_up_b[expert].T
            z_NF = self.gating(h_NF[:, :F], h_NF[:, F:])
            z_NF = z_NF * top_k_weights[token_N, slot_N].unsqueeze(-1)
            y_ND = base.down_proj(z_NF) + z_NF @ delta.down_a[expert].T @ delta.down_b[expert].T
            y_TD = y_TD.index_add(0, token_N, y_ND.to(y_TD.dtype))
        return y_TD


WAYS: dict[str, type[FusedExperts]] = {
    "moefuse": FusedExperts,
    "loop, matrices merged": MergedLoop,
    "loop, outputs added": AddedLoop,
}


def make_student(way: str, device: str) -> FusedExperts:
    """Make the layer, its random weights the same in every way."""
    torch.manual_seed(0)
    student = WAYS[way](D, F, E, GROUPS, RANK, PlainGating(nn.functional.silu), scale=True)
    for parameter in student.parameters():
        if parameter.dim() > 1 and parameter is not student.scale:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return student.to(device)


def make_call(tokens: int, device: str) -> ExpertsCall:
    """Make random tokens and what the layer should return for them."""
    generator = torch.Generator().manual_seed(1)
    x_TD, y_TD = torch.randn(2, tokens, D, generator=generator)
    weight_TK, index_TK = torch.rand(tokens, E, generator=generator).topk(K)
    call = ExpertsCall(x_TD, index_TK.int(), weight_TK / weight_TK.sum(1, keepdim=True), y_TD)
    return call.to(device)


def operations(call: ExpertsCall, tokens: int) -> float:
    """Count the operations of one step's matrix products over ``tokens`` tokens."""
    hit_TG = torch.zeros(len(call.x_TD), GROUPS, device=call.x_TD.device)
    hit_TG.scatter_(1, call.index_TK.long() % GROUPS, 1.0)
    pairs = float(hit_TG.sum(1).mean()) * tokens
    bases = pairs * 3 * D * F
    deltas = tokens * K * RANK * (D + 2 * F + F + D)
    return 6 * (bases + deltas)


def seconds_of_step(
    way: str, call: ExpertsCall, options: DistillConfig, device: str, run: int
) -> float:
    """Return the wall time of a distillation step, warm: the median over runs of ``run`` steps.

    A GPU is waited for between runs and not within them, as distilling does not wait for it.
    """
    student = make_student(way, device)
    begun: list[float] = []

    def timed(numbers: Iterable[int]) -> Iterator[int]:
        for number in numbers:
            if number >= WARM_UP and (number - WARM_UP) % run == 0:
                if device != "cpu":
                    torch.cuda.synchronize(device)
                begun.append(time.perf_counter())
            yield number

    distill_layer(student, call, options, progress=timed)
    begun_S = torch.tensor(begun, dtype=torch.float64)
    return float(begun_S.diff().median()) / run


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """Measure the operations a second of one large matrix product, the best of ten."""
    size = RATE_SIZE[torch.device(device).type]
    one, other = torch.randn(2, size, size, device=device).to(dtype)
    wait: Callable[[], None] = torch.cuda.synchronize if device != "cpu" else lambda: None
    best = float("inf")
    for _ in range(10):
        wait()
        start = time.perf_counter()
        torch.matmul(one, other)
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(
    options: DistillConfig, device: str, run: int, rates: dict[str, float]
) -> list[dict[str, Any]]:
    """Time all ways of a step."""
    tokens = options.batch_tokens
    call = make_call(4 * tokens, device)
    count = operations(call, tokens)
    rows = []
    for way in WAYS:
        spent = seconds_of_step(way, call, options, device, run)
        shares = {f"share_of_{name}": count / spent / rate for name, rate in rates.items()}
        facts = {"tokens": tokens, "precision": options.precision}
        rows.append({"way": way, **facts, "seconds": spent, "operations": count, **shares})
    return rows


def render(meta: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    rates = ", ".join(f"{rate / 1e12:.2f} T/s in {name}" for name, rate in meta["rates"].items())
    lines = [
        "# Distilling one layer",
        "",
        f"{E} experts, D {D}, F {F}, top-{K}, as {GROUPS} fused experts of rank {RANK}, on "
        f"{meta['device']} ({meta['cpu']}, {meta['threads']} threads). Matrix rate: {rates}.",
        "",
        "| tokens | way | seconds a step | times moefuse's | share of the bf16 rate | of fp32's |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        own = next(r for r in rows if r["way"] == "moefuse" and r["tokens"] == row["tokens"])
        lines.append(
            f"| {row['tokens']:,} | {row['way']} | {row['seconds']:.4f} | "
            f"{row['seconds'] / own['seconds']:.2f} | {row['share_of_bfloat16']:.1%} | "
            f"{row['share_of_float32']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[DistillConfig().batch_tokens])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    given = parser.parse_args()
    run = RUN[torch.device(given.device).type]
    kinds = (torch.bfloat16, torch.float32)
    rates = {str(kind).removeprefix("torch."): matrix_rate(kind, given.device) for kind in kinds}
    rows = [
        row
        for tokens in given.tokens
        for row in measure(
            DistillConfig(
                steps=WARM_UP + given.runs * run + 1,
                batch_tokens=tokens,
                held_back=1e-6,
                precision=given.precision,
            ),
            given.device,
            run,
            rates,
        )
    ]
    meta = machine_meta(
        f"python benchmarks/distillation_speed.py --device {given.device} "
        f"--precision {given.precision}",
        device=given.device,
        threads=torch.get_num_threads(),
        rates=rates,
    )
    name = f"distillation_speed-{torch.device(given.device).type}-{given.precision}"
    write_json(given.out / f"{name}.json", {"meta": meta, "rows": rows})
    write_text(given.out / f"{name}.md", render(meta, rows))
    print(render(meta, rows))


if __name__ == "__main__":
    main()
