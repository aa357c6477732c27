"""How fast one fused layer runs: beside the original layer, a dense layer, and what must move.

All in one run: the fused layer by Triton's kernels or a CPU's own way, and by PyTorch alone; the
original layer by each of Transformers' experts implementations; a dense layer of as many bytes as
the fused one holds; and the floor, the greater of the bytes that must be read and written over the
measured copy bandwidth, and of the operations that must be done over the measured matrix rate.
Weights are random. Routing is that of the bundled teacher's router on held-out text (64 experts,
top-6), or uniform.

On a GPU whatever can be captured is timed as a CUDA graph that calls several copies of the layer in
turn, as a model's layers follow each other, so that no weight is found in the cache; what waits for
the host (marked *) is timed call by call. Every figure is the median of several, spread beside it.

With ``--form packed`` the layer is one of own neurons at few bits instead of shared bases: all
neurons at 2, 3 or 4 bits, or ``mix``, half as many neurons (experts have from a quarter to three
quarters of them) at 1.33, 2 and 4 bits and 128 shared ones.

    python benchmarks/fused_layer.py
    python benchmarks/fused_layer.py --device cuda --tokens 1 8 32 128 512 2048 8192
    python benchmarks/fused_layer.py --device cuda --form packed --tokens 1 8 32 128 512 8192
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from distillation_speed import matrix_rate
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

from moefuse import corpus, demo
from moefuse.artifacts import write_json, write_text
from moefuse.evaluation.machine import machine_meta
from moefuse.evaluation.run import load_model
from moefuse.modeling import kernels
from moefuse.modeling.modeling_moefuse import CodedRows, FusedExperts, NeuronExperts, PlainGating

SHAPES = {"lite": (2048, 1408, 64, 6), "v3": (7168, 2048, 256, 8)}
"""D, F, E, K of DeepSeek-Coder-V2-Lite's and of DeepSeek-V3's layers."""
ORIGINALS = ("eager", "batched_mm", "grouped_mm")
CACHE_BYTES = 400e6
REPEATS = 15
SLOW_SECONDS = 0.5
"""For how long what waits for the host is timed again and again, but five times at least."""


@dataclass(frozen=True)
class Packed:
    """How many of an expert's neurons have how many bits, as shares of F, and shared ones.

    ``uneven``: some experts have half as many of each and others half as many again."""

    shares: dict[str, float]
    shared: int = 0
    uneven: bool = False


PACKED = {
    "2": Packed({"2": 1.0}),
    "3": Packed({"3": 1.0}),
    "4": Packed({"4": 1.0}),
    "mix": Packed({"1.33": 0.25, "2": 0.125, "4": 0.125}, shared=128, uneven=True),
}
SHARED_BITS, GAIN_BITS = "2", "4"
MOST_GATHERED = 8e9
"""Bytes of weights that the batched way may copy for its rows; beyond, it is left out."""
Call = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Cell:
    """One size: a shape's name, G, R, tokens, where the routing comes from; a name in ``PACKED``
    instead of G and R."""

    shape: str
    groups: int
    rank: int
    tokens: int
    routing: str
    packed: str = ""


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cuda = torch.device(device).type == "cuda"

    def seconds(self, calls: list[Callable[[], Any]]) -> tuple[list[float], bool]:
        """Time the calls one after another; seconds of one each, and whether by a graph."""
        for call in calls[:2]:
            call()
            call()
        if not self.cuda:
            return [self._wall(calls) for _ in range(self._repeats(calls))], False
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            for call in calls:
                call()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except (RuntimeError, torch.AcceleratorError):
            torch.cuda.synchronize()
            repeats = max(5, min(REPEATS, int(SLOW_SECONDS / self._events(calls))))
            return [self._events(calls) for _ in range(repeats)], False
        graph.replay()
        return [self._events([graph.replay]) / len(calls) for _ in range(REPEATS)], True

    def _repeats(self, calls: list[Callable[[], Any]]) -> int:
        return max(5, min(50, int(1.0 / self._wall(calls))))

    def _wall(self, calls: list[Callable[[], Any]]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    def _events(self, calls: list[Callable[[], Any]]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)

    def copy_bandwidth(self) -> float:
        """Measure bytes a second of a large copy, read and written counted."""
        size = 2**30 if self.cuda else 2**28
        one, other = torch.ones(2, size, dtype=torch.uint8, device=self.device)
        spent, _ = self.seconds([lambda: other.copy_(one)] * 3)
        return 2 * size / min(spent)


def trained_routing() -> Tensor:
    """Return the experts that the bundled teacher's middle layer chooses on held-out text."""
    model, tokenizer = load_model(demo.teacher_path(), dtype="float32", device="cpu")
    found: list[Tensor] = []
    experts = [m for m in model.modules() if isinstance(m, DeepseekV2Experts)]
    middle = experts[len(experts) // 2]
    hook = middle.register_forward_hook(lambda _, given, __: found.append(given[1]))
    text = "\n".join(document.text or "" for document in corpus.load_documents(demo.heldout_path()))
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, :16_384]
    with torch.no_grad():
        for row in tokens.split(512):
            model(row[None])
    hook.remove()
    return torch.cat(found)


def make_call(cell: Cell, routed: Tensor | None, device: str, dtype: torch.dtype) -> Call:
    """Make random inputs and the routing of a cell."""
    hidden, _, experts, top_k = SHAPES[cell.shape]
    generator = torch.Generator().manual_seed(cell.tokens)
    if routed is None:
        index_TK = torch.rand(cell.tokens, experts, generator=generator).topk(top_k).indices
    else:
        # Decoded together, tokens are of different texts.
        chosen = torch.randint(len(routed), (cell.tokens,), generator=generator)
        index_TK = routed[chosen] if cell.tokens <= 512 else routed[: cell.tokens]
    x_TD = torch.randn(cell.tokens, hidden, generator=generator)
    weight_TK = torch.rand(cell.tokens, top_k, generator=generator)
    return x_TD.to(device, dtype), index_TK.to(device), weight_TK.to(device)


def make_fused(cell: Cell, device: str, dtype: torch.dtype) -> FusedExperts:
    """Make the fused layer with random weights."""
    hidden, intermediate, experts, _ = SHAPES[cell.shape]
    gating = PlainGating(nn.functional.silu)
    with torch.device(device):
        made = FusedExperts(hidden, intermediate, experts, cell.groups, cell.rank, gating).to(dtype)
        for parameter in made.parameters():
            parameter.data.normal_(std=0.02)
    return made.requires_grad_(False)


def make_packed(cell: Cell, device: str, dtype: torch.dtype) -> NeuronExperts:
    """Make the layer of own neurons at few bits, with random codes."""
    hidden, intermediate, experts, _ = SHAPES[cell.shape]
    form = PACKED[cell.packed]
    factor_E = torch.ones(experts)
    if form.uneven:
        factor_E = torch.linspace(0.5, 1.5, experts)[torch.randperm(experts)]
    rows = [(factor_E * share * intermediate).int() for share in form.shares.values()]
    with torch.device(device):
        made = NeuronExperts(
            hidden,
            experts,
            PlainGating(nn.functional.silu),
            neurons={b: int(n.sum()) for b, n in zip(form.shares, rows, strict=True)},
            shared=form.shared,
            shared_bits=SHARED_BITS,
            gain_bits=GAIN_BITS,
        ).to(dtype)
    made.widths.copy_(torch.stack(rows))
    for part in made.modules():
        if isinstance(part, CodedRows):
            part.codes.random_(256)
            part.codebook.data.normal_()
            part.scale.data.fill_(0.02)
    return made.requires_grad_(False)


def make_layer(cell: Cell, device: str, dtype: torch.dtype) -> FusedExperts | NeuronExperts:
    """Make the layer of a cell with random weights."""
    made = (make_packed if cell.packed else make_fused)(cell, device, dtype)
    if made.fast_compute is None:
        raise SystemExit("moefuse is not installed here, so its kernels would not be found.")
    return made


def make_original(cell: Cell, device: str, dtype: torch.dtype) -> Any:
    """Make the original experts; their implementation is chosen by their configuration."""
    hidden, intermediate, experts, _ = SHAPES[cell.shape]
    config = AutoConfig.for_model(
        "deepseek_v2",
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        n_routed_experts=experts,
    )
    config.num_experts = experts
    with torch.device("meta"):
        made = DeepseekV2Experts(config).to(dtype)
    made = made.to_empty(device=device)
    for parameter in made.parameters():
        parameter.data.normal_(std=0.02)
    return made.requires_grad_(False)


class Dense(nn.Module):
    """A plain gated layer of given width, the practical ceiling for its bytes."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the layer's output, (T, D)."""
        gate, up = self.gate_up(x_TD).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


def needed(cell: Cell, layer: nn.Module, index_TK: Tensor, itemsize: int) -> tuple[float, float]:
    """Count the bytes that must move and the operations that must be done."""
    if isinstance(layer, NeuronExperts):
        return needed_packed(layer, index_TK, itemsize)
    hidden, intermediate, _, _ = SHAPES[cell.shape]
    group_TK = index_TK % cell.groups
    pairs = sum(len(row.unique()) for row in group_TK.cpu())
    rows = index_TK.numel()
    base = 3 * hidden * intermediate
    delta = cell.rank * (hidden + 3 * intermediate + hidden)
    weights = len(group_TK.unique()) * base + len(index_TK.unique()) * delta
    moved = weights + 2 * cell.tokens * hidden
    return moved * itemsize, 2.0 * (pairs * base + rows * delta)


def needed_packed(layer: NeuronExperts, index_TK: Tensor, itemsize: int) -> tuple[float, float]:
    """Count the same of own and shared neurons: those of the chosen experts, as they are stored."""
    chosen, rows = index_TK.cpu().unique(), torch.bincount(index_TK.cpu().flatten())
    own: list[Any] = list(layer.own.values())
    hidden = own[0].width
    moved = 2.0 * len(index_TK) * hidden * itemsize
    operations = 0.0
    for kind, width_E in zip(own, layer.widths.cpu(), strict=True):
        moved += of_bytes(kind) * float(width_E[chosen].sum() / width_E.sum())
        operations += float((width_E[: len(rows)] * rows).sum()) * 6 * hidden
    shared: Any = layer.shared
    if shared is not None:
        moved += of_bytes(shared) + of_bytes(layer.gain) * len(chosen) / layer.num_experts
        operations += 6.0 * len(index_TK) * hidden * shared.codes.shape[1]
    return moved, operations


def of_bytes(module: nn.Module | None) -> int:
    """Return the bytes of a module's parameters and codes."""
    assert module is not None
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


def measure(
    cell: Cell, clock: Clock, routed: Tensor | None, dtype: torch.dtype, original: Any
) -> list[dict[str, Any]]:
    """Time all ways of one cell."""
    call = make_call(cell, routed, clock.device, dtype)
    layer = make_layer(cell, clock.device, dtype)
    size = of_bytes(layer)
    copies = max(1, min(12, round(CACHE_BYTES / size))) if clock.cuda and cell.tokens <= 512 else 1
    layers = [layer] + [make_layer(cell, clock.device, dtype) for _ in range(copies - 1)]
    ways: dict[str, list[Callable[[], Any]]] = {}

    def fused_way(setting: str) -> list[Callable[[], Any]]:
        def run(module: nn.Module) -> None:
            kernels.use(setting)
            module(*call)

        return [lambda module=module: run(module) for module in layers]

    if clock.cuda:
        ways["fused, Triton"] = fused_way("triton")
    elif not cell.packed:
        ways["fused, CPU"] = fused_way("cpu")
    ways["fused, PyTorch"] = fused_way("plain")
    gathered = call[1].numel() * sum(p[0].nbytes for p in original.parameters())
    for name in ORIGINALS:
        if name == "batched_mm" and gathered > MOST_GATHERED:
            continue

        def run(name: str = name) -> None:
            original.config._experts_implementation = name
            original(*call)

        ways[f"original, {name}"] = [run]
    hidden = SHAPES[cell.shape][0]
    width = round(size / call[0].element_size() / (3 * hidden) / 64) * 64
    dense = [Dense(hidden, width).to(clock.device, dtype) for _ in layers]
    ways["dense, equal bytes"] = [lambda module=module: module(call[0]) for module in dense]

    moved, operations = needed(cell, layer, call[1], call[0].element_size())
    rows = []
    with torch.no_grad():
        for way, calls in ways.items():
            try:
                spent, graphed = clock.seconds(calls)
            except torch.OutOfMemoryError:
                continue
            rows.append(
                {
                    **vars(cell),
                    "way": way,
                    "seconds": median(spent),
                    "least": min(spent),
                    "most": max(spent),
                    "graph": graphed,
                    "bytes": moved,
                    "operations": operations,
                }
            )
    kernels.use("auto")
    return rows


def cells(given: argparse.Namespace) -> list[Cell]:
    """List the cells asked for: all sizes at G = 8 and R = 8, other G and R at 32 tokens."""
    found = []
    for shape, tokens in itertools.product(given.shapes, given.tokens):
        if given.form == "packed":
            found += [Cell(shape, 0, 0, tokens, "uniform", name) for name in given.bits]
            continue
        routings = ("trained", "uniform") if shape == "lite" else ("uniform",)
        found += [Cell(shape, 8, 8, tokens, routing) for routing in routings]
        if tokens == given.others_at:
            found += [Cell(shape, g, 8, tokens, "uniform") for g in given.groups if g != 8]
            found += [Cell(shape, 8, r, tokens, "uniform") for r in given.ranks if r != 8]
    return found


def render(meta: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    bandwidth, rate = meta["copy_bytes_per_second"], meta["matrix_operations_per_second"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    names = ["shape", "G", "R", "tokens", "routing", "bits", "floor", *ways]
    names += ["best fused / floor", "best original / best fused"]
    lines = [
        "# The fused layer's speed",
        "",
        f"{meta['device']}, {meta['dtype']}, {meta['threads']} threads; copy "
        f"{bandwidth / 1e9:.0f} GB/s, matrix product {rate / 1e12:.2f} T operations/s. Medians in "
        "microseconds, half the spread beside them; * timed call by call, all else by CUDA graphs "
        "where there is a GPU.",
        "",
        "| " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * (len(names) - 1),
    ]
    for cell in dict.fromkeys(tuple(row[key] for key in CELL) for row in rows):
        of = {row["way"]: row for row in rows if tuple(row[k] for k in CELL) == cell}
        one = next(iter(of.values()))
        floor = max(one["bytes"] / bandwidth, one["operations"] / rate)
        fused = min(row["seconds"] for way, row in of.items() if way.startswith("fused"))
        original = min(row["seconds"] for way, row in of.items() if way.startswith("original"))
        shown = [str(value) for value in cell] + [f"{floor * 1e6:,.0f}"]
        shown += [_time(of.get(way), meta["kind"]) for way in ways]
        lines.append(
            "| " + " | ".join([*shown, f"{fused / floor:.2f}", f"{original / fused:.2f}"]) + " |"
        )
    return "\n".join(lines) + "\n"


CELL = ("shape", "groups", "rank", "tokens", "routing", "packed")


def _time(row: dict[str, Any] | None, kind: str) -> str:
    if row is None:
        return ""
    star = "" if row["graph"] or kind == "cpu" else " *"
    half = (row["most"] - row["least"]) / 2
    return f"{row['seconds'] * 1e6:,.0f} ± {half * 1e6:,.0f}{star}"


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--shapes", nargs="+", default=["lite"], choices=sorted(SHAPES))
    parser.add_argument("--form", default="bases", choices=("bases", "packed"))
    parser.add_argument("--bits", nargs="+", default=list(PACKED), choices=list(PACKED))
    parser.add_argument("--groups", type=int, nargs="*", default=[16, 4, 2, 1])
    parser.add_argument("--ranks", type=int, nargs="*", default=[0, 32, 128])
    parser.add_argument("--others-at", type=int, default=32, help="tokens at which G and R vary")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    clock = Clock(given.device)
    routed = trained_routing() if given.form == "bases" else None
    wanted = cells(given)
    bandwidth, rate = clock.copy_bandwidth(), matrix_rate(dtype, given.device)
    originals: dict[str, Any] = {}
    rows = []
    for cell in wanted:
        if cell.shape not in originals:
            originals = {cell.shape: make_original(cell, given.device, dtype)}
        of_router = routed if cell.routing == "trained" else None
        rows += measure(cell, clock, of_router, dtype, originals[cell.shape])
        told = ", ".join(
            f"{r['way']} {r['seconds'] * 1e6:,.0f}"
            for r in rows
            if r["way"] and all(r[key] == value for key, value in vars(cell).items())
        )
        print(f"{cell}: {told} us", flush=True)
    meta = machine_meta(
        f"python benchmarks/fused_layer.py --device {given.device} --dtype {given.dtype} "
        f"--form {given.form}",
        device=given.device,
        kind=torch.device(given.device).type,
        dtype=given.dtype,
        threads=torch.get_num_threads(),
        copy_bytes_per_second=bandwidth,
        matrix_operations_per_second=rate,
    )
    layer = "fused_layer" if given.form == "bases" else "packed_layer"
    name = f"{layer}-{torch.device(given.device).type}-{given.dtype}"
    write_json(given.out / f"{name}.json", {"meta": meta, "rows": rows})
    write_text(given.out / f"{name}.md", render(meta, rows))
    print(render(meta, rows))


if __name__ == "__main__":
    main()
