"""What the logits feel of each layer: against autograd on the whole model, and however stopped."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from running import contents, run_here, write_text
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moefuse import artifacts
from moefuse.artifacts import read_tensors, write_tensors
from moefuse.calibration import sensitivity
from moefuse.calibration.collect import Batch
from moefuse.calibration.sensitivity import measure_sensitivity, metric_path
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.errors import UserError
from moefuse.families import all_families
from moefuse.pipeline import Job, fuse

FAMILIES = sorted(all_families())
# Right-padded by more than a sliding window of four, so that some rows attend to nothing.
LENGTHS = ((9, 7, 2), (16, 16), (5, 12, 1))
SEED = 3
Metrics = dict[int, Tensor]


def padded(
    lengths: tuple[tuple[int, ...], ...] = LENGTHS, *, pad: int = 0, columns: int = 0
) -> list[Batch]:
    """Return the same random tokens whatever they are padded with, and to what length."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for batch in lengths:
        mask_BS = (torch.arange(max(batch) + columns) < torch.tensor(batch)[:, None]).long()
        ids_BS = torch.full(mask_BS.shape, pad)
        for row, length in enumerate(batch):
            ids_BS[row, :length] = torch.randint(2, 64, (length,), generator=generator)
        batches.append((ids_BS, mask_BS))
    return batches


def streamed(path: Path, dtype: torch.dtype = torch.float32) -> StreamedTeacher:
    return StreamedTeacher(CheckpointReader.open(path), device="cpu", dtype=dtype)


def measured(
    path: Path,
    out: Path,
    batches: list[Batch] | None = None,
    *,
    seed: int = SEED,
    dtype: torch.dtype = torch.float32,
) -> Metrics:
    teacher = streamed(path, dtype)
    measure_sensitivity(teacher, batches or padded(), out, seed=seed)
    layers = teacher.reader.shape.layers
    assert sorted(contents(out)) == [metric_path(out, layer).name for layer in layers]
    return {layer: read_tensors(metric_path(out, layer))["fisher_DD"] for layer in layers}


def with_nudges(model: nn.Module, reader: CheckpointReader, nudges: dict[int, Tensor]) -> None:
    """Add ``nudges`` to what routed experts return; a layer without one gets a leaf of zeros."""

    def nudge(layer: int) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], returned: Tensor) -> Tensor:
            if layer not in nudges:
                nudges[layer] = torch.zeros_like(returned).requires_grad_()
            return returned + nudges[layer].view_as(returned)

        return hook

    for layer in reader.shape.layers:
        path = f"{reader.family.moe_path(layer)}.{reader.family.experts_name}"
        model.get_submodule(path).register_forward_hook(nudge(layer))


def whole(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def by_autograd(path: Path, batches: list[Batch], *, dtype: torch.dtype = torch.float32) -> Metrics:
    """Return the metrics by their definition, with the whole model in memory."""
    model, reader = whole(path, dtype), CheckpointReader.open(path)
    nudges: dict[int, Tensor] = {}
    with_nudges(model, reader, nudges)
    generator = torch.Generator().manual_seed(SEED)
    width = reader.shape.hidden
    found = {layer: torch.zeros(width, width).double() for layer in reader.shape.layers}
    for ids_BS, mask_BS in batches:
        nudges.clear()
        logits_BSV = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits
        loss = torch.zeros(())
        for logits_NV in logits_BSV[mask_BS.bool()].float().split(sensitivity.HEAD_TOKENS):
            drawn_N1 = torch.multinomial(logits_NV.detach().softmax(-1), 1, generator=generator)
            loss = loss - logits_NV.log_softmax(-1).gather(1, drawn_N1).sum()
        gradients = torch.autograd.grad(loss, list(nudges.values()))
        for layer, gradient in zip(nudges, gradients, strict=True):
            gradient_TD = gradient.reshape(-1, width).double()
            found[layer] += gradient_TD.T @ gradient_TD
    tokens = sum(int(mask_BS.sum()) for _, mask_BS in batches)
    return {layer: (fisher_DD / tokens).float() for layer, fisher_DD in found.items()}


def assert_equal_to_autograd(
    path: Path, out: Path, dtype: torch.dtype = torch.float32, tolerance: float = 1e-4
) -> None:
    found, wanted = measured(path, out, dtype=dtype), by_autograd(path, padded(), dtype=dtype)
    assert found.keys() == wanted.keys()
    for layer, metric_DD in wanted.items():
        assert found[layer].dtype == torch.float32
        assert metric_DD.diagonal().min() > 0
        assert_close(found[layer], metric_DD, tolerance)


# What is measured.


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_layer_by_layer_equals_autograd_on_the_whole_model(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "teacher", model_type, tie_word_embeddings=tied)
    assert ("lm_head.weight" in CheckpointReader.open(tmp_path / "teacher").tensors) != tied

    assert_equal_to_autograd(tmp_path / "teacher", tmp_path / "out")


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "two dense layers first": ("deepseek_v2", {"first_k_dense_replace": 2}),
    "none dense": ("deepseek_v3", {"first_k_dense_replace": 0}),
    "a dense layer between": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "a dense layer last": ("qwen2_moe", {"mlp_only_layers": [2]}),
    "windows in one layer": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "windows in all layers": ("mixtral", {"sliding_window": 4}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_arrangements_of_layers(name: str, tmp_path: Path) -> None:
    model_type, changes = VARIANTS[name]
    save_tiny(tmp_path / "teacher", model_type, **changes)

    assert_equal_to_autograd(tmp_path / "teacher", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_teachers_in_half_precision(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher", model_type, dtype=dtype)

    assert_equal_to_autograd(tmp_path / "teacher", tmp_path / "out", dtype, tolerance=5e-2)


def test_logits_of_few_tokens_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "teacher")
    monkeypatch.setattr(sensitivity, "HEAD_TOKENS", 5)
    assert_equal_to_autograd(tmp_path / "teacher", tmp_path / "out")


def test_a_head_stored_beside_tied_embeddings_is_the_head(tmp_path: Path) -> None:
    """Transformers ties nothing where a checkpoint stores two different tensors."""
    save_tiny(tmp_path / "teacher", "olmoe", tie_word_embeddings=True, max_shard_size="1GB")
    shard = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(shard)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})

    assert_equal_to_autograd(tmp_path / "teacher", tmp_path / "out")


@torch.no_grad()
def test_the_metric_tells_the_divergence_that_an_error_causes(tmp_path: Path) -> None:
    """Small noise in some directions of the output: its divergence is half their eigenvalues.

    In the last layer, since routers of later ones jump to other experts however small it is.
    """
    save_tiny(tmp_path / "teacher")
    reader, batches = CheckpointReader.open(tmp_path / "teacher"), padded(((16,) * 64,))
    metrics = measured(tmp_path / "teacher", tmp_path / "out", batches)
    ids_BS, _ = batches[0]
    plain_BSV = whole(tmp_path / "teacher")(ids_BS).logits.double().log_softmax(-1)
    eigenvalues_D, vectors_DD = torch.linalg.eigh(metrics[2].double())
    size, generator = 0.01, torch.Generator().manual_seed(0)

    caused = []
    for chosen in (slice(0, 8), slice(24, 32)):
        noise_TC = size * torch.randn(ids_BS.numel(), 8, generator=generator)
        nudges = {
            1: torch.zeros(len(noise_TC), 32),
            2: noise_TC @ vectors_DD[:, chosen].float().T,
        }
        model = whole(tmp_path / "teacher")
        with_nudges(model, reader, nudges)
        moved_BSV = model(ids_BS).logits.double().log_softmax(-1)
        divergence = float((plain_BSV.exp() * (plain_BSV - moved_BSV)).sum(-1).mean())
        expected = 0.5 * size**2 * float(eigenvalues_D[chosen].sum())
        # The metric comes from one drawn token after each of 1024.
        assert divergence == pytest.approx(expected, rel=0.2)
        caused.append(divergence)
    assert caused[1] > 5 * caused[0]


def test_padding_counts_for_nothing(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher")

    narrow = measured(tmp_path / "teacher", tmp_path / "narrow")
    filled = measured(tmp_path / "teacher", tmp_path / "filled", padded(pad=9))
    wide = measured(tmp_path / "teacher", tmp_path / "wide", padded(pad=9, columns=7))

    for layer, metric_DD in narrow.items():
        assert_close(filled[layer], metric_DD, 1e-5)
        assert_close(wide[layer], metric_DD, 1e-5)


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher")
    torch.manual_seed(1)
    measured(tmp_path / "teacher", tmp_path / "first")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    measured(tmp_path / "teacher", tmp_path / "second")
    measured(tmp_path / "teacher", tmp_path / "other", seed=SEED + 1)

    assert torch.equal(torch.get_rng_state(), state)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    first, other = contents(tmp_path / "first"), contents(tmp_path / "other")
    assert all(first[name] != other[name] for name in first)


def test_logits_that_feel_nothing_leave_zeros(tmp_path: Path) -> None:
    save_unfeeling(tmp_path / "teacher")

    for metric_DD in measured(tmp_path / "teacher", tmp_path / "out").values():
        assert torch.equal(metric_DD, torch.zeros(32, 32))


def save_unfeeling(path: Path) -> Path:
    """Save a teacher whose final norm lets nothing through."""
    save_tiny(path, max_shard_size="1GB")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"].zero_()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("name", "factor", "what"),
    [
        ("lm_head.weight", 1e6, "predictions"),
        # The first norm makes what enters larger by so much, and its gradient too.
        ("model.embed_tokens.weight", 1e-6, "gradients at layer 0"),
    ],
    ids=["forward", "backward"],
)
def test_what_overflows_is_told(name: str, factor: float, what: str, tmp_path: Path) -> None:
    path = tmp_path / "teacher"
    save_tiny(path, "olmoe", max_shard_size="1GB", rms_norm_eps=1e-14)
    tensors = load_file(path / "model.safetensors")
    tensors[name] *= factor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(
        UserError, match=f"teacher's {what} hold NaN or infinity in float16; choose"
    ):
        measured(path, tmp_path / "out", dtype=torch.float16)
    assert not list((tmp_path / "out").glob("layer-000*"))


# Memory.


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_no_more_than_one_layer_is_in_memory(tied: bool, tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher", "olmoe", tie_word_embeddings=tied)
    teacher = streamed(tmp_path / "teacher")
    output = teacher.model.get_output_embeddings()  # type: ignore[operator]
    seen: list[set[str]] = []

    def in_memory() -> set[str]:
        state = teacher.model.state_dict()
        held = {name for name, tensor in state.items() if tensor.device.type != "meta"}
        return {".".join(name.split(".")[:3]) for name in held} - {"model.embed_tokens.weight"}

    for module in (*teacher.layers, teacher.backbone.norm, output):
        module.register_forward_pre_hook(lambda *_: seen.append(in_memory()))
        module.register_full_backward_pre_hook(lambda *_: seen.append(in_memory()))

    measure_sensitivity(teacher, padded(), tmp_path / "out", seed=SEED)

    batches, layers = len(LENGTHS), [{f"model.layers.{n}"} for n in range(3)]
    head = {"model.norm.weight", "lm_head.weight"}
    forward = [layer for layer in layers for _ in range(batches)]
    backward = [layer for layer in reversed(layers) for _ in range(2 * batches)]
    assert seen == [*forward, *[head] * (4 * batches), *backward]
    assert in_memory() == set()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_is_in_memory_only_while_it_is_held(tied: bool, tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher", "mixtral", tie_word_embeddings=tied)
    teacher, model = streamed(tmp_path / "teacher"), whole(tmp_path / "teacher")
    hidden_BSD = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))

    def places() -> dict[str, str]:
        return {n: tensor.device.type for n, tensor in teacher.model.state_dict().items()}

    before = places()
    with torch.no_grad(), teacher.head() as head:
        expected = model.lm_head(model.model.norm(hidden_BSD))
        assert torch.equal(head(hidden_BSD), expected)
    assert places() == before
    with pytest.raises(RuntimeError, match="on purpose"), teacher.head():
        raise RuntimeError("on purpose")
    assert places() == before
    assert [name for name, place in before.items() if place != "meta"] == [
        "model.embed_tokens.weight"
    ]


# Interruptions.


Stopped = Callable[[Path, int | None, Callable[[], Any]], list[str]]


class _StoppedError(BaseException):
    """Ends a run at once, as a kill would: nothing catches it."""


class _Stop:
    """Counts changes below a directory, and stops the run just before one of them.

    Python calls such hooks for ever; without a directory it does nothing.
    """

    KINDS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod")

    def __init__(self) -> None:
        self.below: Path | None = None
        self.at: int | None = None
        self.seen: list[str] = []

    def __call__(self, kind: str, details: tuple[Any, ...]) -> None:
        if self.below is None or kind not in self.KINDS:
            return
        # Removing a tree names files relative to a descriptor of their directory.
        if kind not in ("os.remove", "os.rmdir") and not str(details[0]).startswith(
            str(self.below)
        ):
            return
        self.seen.append(f"{kind} {details[0]}")
        if len(self.seen) == self.at:
            raise _StoppedError


_stop = _Stop()
sys.addaudithook(_stop)


@pytest.fixture
def stopped() -> Iterator[Stopped]:
    """``stopped(out, at, measure)`` runs ``measure``; returns the changes made to ``out``."""

    def run(out: Path, at: int | None, measure: Callable[[], Any]) -> list[str]:
        _stop.below, _stop.at, _stop.seen = out, at, []
        try:
            measure()
        except _StoppedError:
            assert len(_stop.seen) == at
        finally:
            _stop.below = None
        return _stop.seen

    yield run
    _stop.below = None


def small(path: Path) -> Path:
    """Save a teacher of three layers, the middle one dense."""
    save_tiny(path, "qwen3_moe", mlp_only_layers=[1], max_shard_size="1GB")
    return path


def is_finished(out: Path, wanted: dict[str, bytes]) -> bool:
    return out.is_dir() and contents(out) == wanted and all(e.is_file() for e in out.iterdir())


def test_interrupted_before_any_change_it_goes_on(
    stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No power fails here, and waiting for the disk takes most of the time.
    monkeypatch.setattr(artifacts, "_flush", lambda path: None)
    path, batches = small(tmp_path / "teacher"), padded(((5, 3), (4,)))
    teacher, whole_run = streamed(path), tmp_path / "whole"
    changes = stopped(whole_run, None, lambda: measured(path, whole_run, batches))
    wanted = contents(whole_run)
    assert len(changes) > 90

    for at in range(1, len(changes) + 1):
        out = tmp_path / str(at)

        def measure(out: Path = out) -> None:
            measure_sensitivity(teacher, batches, out, seed=SEED)

        assert len(stopped(out, at, measure)) == at
        assert not is_finished(out, wanted)
        measure()
        assert is_finished(out, wanted), changes[at - 1]


def test_interrupted_again_and_again_it_ends(stopped: Stopped, tmp_path: Path) -> None:
    path, batches = small(tmp_path / "teacher"), padded(((5, 3), (4,)))
    teacher, out, runs = streamed(path), tmp_path / "out", 1
    measured(path, tmp_path / "whole", batches)

    def measure() -> None:
        measure_sensitivity(teacher, batches, out, seed=SEED)

    while len(stopped(out, 14, measure)) == 14:
        runs += 1
        assert runs < 40

    assert runs > 5
    assert is_finished(out, contents(tmp_path / "whole"))


def test_what_is_complete_is_not_run_again(tmp_path: Path) -> None:
    path = small(tmp_path / "teacher")
    measured(path, tmp_path / "out")
    made = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "out").iterdir()}

    class OnlyItsShape:
        """Fails at anything that running a layer needs."""

        reader = CheckpointReader.open(path)

    teacher: Any = OnlyItsShape()
    measure_sensitivity(teacher, padded(), tmp_path / "out", seed=SEED)

    assert {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "out").iterdir()} == made


# In a job.

VALUES: dict[str, Any] = {
    "tokens": 512,
    "sequence_length": 64,
    "batch_size": 4,
    "sensitivity_tokens": 100,
    "steps": 3,
    "batch_tokens": 64,
}
NEURONS = {**VALUES, "expert_bits": 4.0}
LOW_RANK = {**VALUES, "groups": 3, "rank": 2}


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_text(tmp_path / "text.txt"))


@pytest.fixture
def teacher(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


def test_calibrating_for_own_neurons_leaves_it(teacher: Path, data: str, tmp_path: Path) -> None:
    job = Job(teacher, tmp_path / "work", {**NEURONS, "data": data})
    job.calibrate()

    (directory,) = (tmp_path / "work").glob("sensitivity-*")
    assert directory == job.sensitivity_directory
    assert sorted(contents(directory)) == ["layer-001.safetensors", "layer-002.safetensors"]
    # A hundred tokens are a batch of 256, not all 512.
    found = measured(teacher, tmp_path / "out", job.batches[:1], seed=0)
    for layer, metric_DD in found.items():
        assert torch.equal(job.metric(layer), metric_DD)  # type: ignore[arg-type]


def test_grouping_without_it_tells_to_calibrate(
    teacher: Path, data: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Job(teacher, tmp_path / "work", {**LOW_RANK, "data": data}).calibrate()
    assert not list((tmp_path / "work").glob("sensitivity-*"))
    settings = [
        part
        for name in ("tokens", "sequence_length", "batch_size", "sensitivity_tokens")
        for part in (f"--{name.replace('_', '-')}", str(VALUES[name]))
    ]

    ran = run_here(
        capfd,
        *("group", teacher, tmp_path / "work", "--expert-bits", "4", "--data", data),
        *settings,
    )

    assert ran.status == 2
    assert "run 'moefuse calibrate' with the same settings first" in " ".join(ran.err.split())


def test_distilling_by_what_the_logits_feel_tells_to_calibrate(
    teacher: Path, data: str, tmp_path: Path
) -> None:
    before = Job(teacher, tmp_path / "work", {**LOW_RANK, "data": data})
    before.calibrate()
    before.group()
    before.factor()

    with pytest.raises(UserError, match="run 'moefuse calibrate' with the same settings"):
        Job(teacher, tmp_path / "work", {**LOW_RANK, "data": data, "loss": "logits"}).distill()


@pytest.mark.parametrize(
    ("values", "felt"),
    [
        (NEURONS, True),
        ({**NEURONS, "loss": "output"}, True),
        ({**NEURONS, "sensitivity_tokens": 0}, False),
        (LOW_RANK, False),
        ({**LOW_RANK, "loss": "output"}, False),
        ({**LOW_RANK, "loss": "logits"}, True),
    ],
)
def test_who_asks_for_it(
    values: dict[str, Any], felt: bool, teacher: Path, data: str, tmp_path: Path
) -> None:
    job = Job(teacher, tmp_path / "work", {**values, "data": data})

    assert (job.sensitivity_directory is not None) == felt
    if not felt:
        assert job.metric(1) is None
    job.calibrate()
    by_logits = felt and values.get("loss") != "output"
    assert (job.metric_root(1) is not None) == by_logits


def test_turned_off_it_is_another_job(teacher: Path, data: str, tmp_path: Path) -> None:
    def names(**change: Any) -> list[str]:
        job = Job(teacher, tmp_path / "work", {**NEURONS, "data": data, **change})
        felt = job.sensitivity_directory
        made = (job.store.directory, job.energies_directory, job.distilled_directory)
        return [felt.name if felt else "", *(directory.name for directory in made)]

    felt, off, more, seed = (
        names(),
        names(sensitivity_tokens=0),
        names(sensitivity_tokens=300),
        names(seed=1),
    )

    assert len({found[1] for found in (felt, off, more, seed)}) == 1
    for number in (0, 2, 3):
        assert len({found[number] for found in (felt, off, more, seed)}) == 4
    assert names(sensitivity_tokens=256) == felt, "the same batches"


def test_logits_without_their_tokens_are_told(teacher: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--loss logits needs what --sensitivity-tokens 0"):
        Job(
            teacher, tmp_path, {**LOW_RANK, "data": data, "loss": "logits", "sensitivity_tokens": 0}
        )


def test_without_resume_it_is_measured_again(teacher: Path, data: str, tmp_path: Path) -> None:
    values, work = {**NEURONS, "data": data}, tmp_path / "work"
    fuse(teacher, tmp_path / "student", values, work=work)
    (metric,) = work.glob("sensitivity-*/layer-001.safetensors")
    made, student = metric.stat().st_mtime_ns, contents(tmp_path / "student")

    fuse(teacher, tmp_path / "student", values, work=work, resume=False, overwrite=True)

    assert metric.stat().st_mtime_ns != made
    assert contents(tmp_path / "student") == student


def test_a_layer_that_is_not_felt_comes_last(teacher: Path, data: str, tmp_path: Path) -> None:
    job = Job(teacher, tmp_path / "work", {**NEURONS, "data": data})
    job.calibrate()
    assert job.sensitivity_directory is not None
    path = metric_path(job.sensitivity_directory, 1)
    write_tensors(path, {"fisher_DD": torch.zeros(32, 32)})

    job.group()
    job.factor()
    job.distill()

    chosen, _ = job.settled
    assert not read_tensors(job.energies_directory / "layer-001.safetensors")["energy_EF"].any()
    felt = read_tensors(job.energies_directory / "layer-002.safetensors")["energy_EF"]
    assert chosen[1].max() <= chosen[2][felt > 0].min()
    assert all(error["after"] <= error["before"] for error in job.errors().values())


def test_a_teacher_whose_logits_feel_nothing_is_fused(data: str, tmp_path: Path) -> None:
    teacher = save_unfeeling(tmp_path / "teacher")

    result = fuse(teacher, tmp_path / "student", {**NEURONS, "data": data})

    assert all(0 <= error["after"] <= error["before"] for error in result.errors.values())
