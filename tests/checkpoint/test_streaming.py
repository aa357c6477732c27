"""Layer by layer and in one piece, a teacher computes the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import contents
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moefuse.artifacts import read_tensors
from moefuse.calibration.collect import Batch, CalibrationStore, collect
from moefuse.checkpoint import passing
from moefuse.checkpoint.headers import INDEX
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.errors import UserError
from moefuse.families import all_families

FAMILIES = sorted(all_families())
LENGTHS = ((9, 7, 2), (16, 16), (5, 12, 1))
# One rounding of the dtype, seen through sums of some hundred terms taken in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def padded(lengths: tuple[tuple[int, ...], ...] = LENGTHS, pad: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for batch in lengths:
        mask_BS = (torch.arange(max(batch)) < torch.tensor(batch)[:, None]).long()
        ids_BS = torch.randint(2, 64, mask_BS.shape, generator=generator)
        batches.append((ids_BS.where(mask_BS.bool(), torch.tensor(pad)), mask_BS))
    return batches


def streamed(path: Path, dtype: torch.dtype = torch.float32) -> StreamedTeacher:
    return StreamedTeacher(CheckpointReader.open(path), device="cpu", dtype=dtype)


def whole(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


class Heard:
    """What every decoder layer and every experts module of a whole model received and returned."""

    def __init__(self, model: nn.Module, reader: CheckpointReader) -> None:
        self.entering: dict[int, Tensor] = {}
        self.leaving: dict[int, Tensor] = {}
        self.experts: dict[int, tuple[Tensor, ...]] = {}
        family = reader.family
        for number, layer in enumerate(model.get_submodule(family.layers_path)):  # type: ignore
            layer.register_forward_hook(self._layer(number))
        for number in reader.shape.layers:
            path = f"{family.moe_path(number)}.{family.experts_name}"
            model.get_submodule(path).register_forward_hook(self._experts(number))

    def _layer(self, number: int) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], returned: Any) -> None:
            self.entering[number] = given[0]
            self.leaving[number] = returned[0] if isinstance(returned, tuple) else returned

        return hook

    def _experts(self, number: int) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], returned: Tensor) -> None:
            self.experts[number] = (*given[:3], returned)

        return hook


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == wanted.dtype
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < TOLERANCE[dtype], float(error)


@torch.no_grad()
def assert_equals_whole(path: Path, store: CalibrationStore, dtype: torch.dtype) -> None:
    """Compare collected artifacts, and every layer's hidden states, with the whole model's."""
    teacher, model, batches = streamed(path, dtype), whole(path, dtype), padded()
    collect(teacher, batches, store)
    heard = Heard(model, teacher.reader)
    for number, (ids_BS, mask_BS) in enumerate(batches):
        model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)
        kept_T = mask_BS.reshape(-1).bool()
        hidden_BSD, received = teacher.embed(ids_BS, mask_BS)
        for layer in range(len(teacher.layers)):
            real_BS = mask_BS.bool()
            assert_close(hidden_BSD[real_BS], heard.entering[layer][real_BS], dtype)
            with teacher.loaded(layer) as module:
                hidden_BSD = teacher.forward_layer(module, hidden_BSD, received[layer])
            assert_close(hidden_BSD[real_BS], heard.leaving[layer][real_BS], dtype)
        for layer in teacher.reader.shape.layers:
            found = read_tensors(store.layer(layer) / f"batch-{number:05d}.safetensors")
            x_TD, index_TK, weight_TK, y_TD = heard.experts[layer]
            assert len(found["x_TD"]) == int(mask_BS.sum())
            assert_close(found["x_TD"], x_TD.reshape(-1, x_TD.shape[-1])[kept_T], dtype)
            assert_close(found["y_TD"], y_TD.reshape(-1, y_TD.shape[-1])[kept_T], dtype)
            assert_close(found["weight_TK"], weight_TK[kept_T].float(), dtype)
            same = (found["index_TK"].long() == index_TK[kept_T]).float().mean()
            assert same == 1, float(same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_layer_by_layer_equals_in_one_piece(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "teacher", model_type, dtype=dtype)

    assert_equals_whole(tmp_path / "teacher", CalibrationStore(tmp_path / "store"), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_what_transformers_keeps_in_fp32_stays_so(dtype: torch.dtype, tmp_path: Path) -> None:
    """DeepSeek-V3's routers add a bias that is stored in fp32; rounding it moves tokens."""
    save_tiny(tmp_path / "teacher", "deepseek_v3")
    bias = "mlp.gate.e_score_correction_bias"
    teacher = streamed(tmp_path / "teacher", dtype)

    with teacher.loaded(1) as module:
        found = module.get_buffer(bias).clone()
        assert module.get_parameter("mlp.gate.weight").dtype == dtype

    wanted = whole(tmp_path / "teacher", dtype).get_buffer(f"model.layers.1.{bias}")
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert not torch.equal(found, found.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_router_that_is_kept_in_fp32_is_that_of_transformers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """ERNIE names what is kept by the end of a path, ``gate.weight``, and not by one module."""
    save_tiny(tmp_path / "teacher", "ernie4_5_moe")
    gate = whole(tmp_path / "teacher", dtype).get_submodule("model.layers.1.mlp.gate")

    with streamed(tmp_path / "teacher", dtype).loaded(1) as module:
        found = module.get_submodule("mlp.gate").state_dict()

    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "weight": torch.float32,
        "moe_statics.e_score_correction_bias": torch.float32,
    }
    for name, tensor in gate.state_dict().items():
        assert torch.equal(found[name], tensor)


# Families whose layers do not all receive the same arguments, or whose attention is local.
LOCAL: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 4},
    "mixtral": {"sliding_window": 4},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sliding_windows(model_type: str, tmp_path: Path) -> None:
    if model_type not in LOCAL:
        pytest.skip(f"{model_type} has no sliding window in Transformers")
    save_tiny(tmp_path / "teacher", model_type, **LOCAL[model_type])

    assert_equals_whole(tmp_path / "teacher", CalibrationStore(tmp_path / "store"), torch.float32)

    teacher = streamed(tmp_path / "teacher")
    _, received = teacher.embed(*padded()[1])
    seen = [given["attention_mask"] for given in received]
    all_alike = all(mask is seen[0] for mask in seen)
    assert all_alike == (model_type != "qwen2_moe")


def test_tied_embeddings(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher", "olmoe", tie_word_embeddings=True)
    assert "lm_head.weight" not in CheckpointReader.open(tmp_path / "teacher").tensors

    assert_equals_whole(tmp_path / "teacher", CalibrationStore(tmp_path / "store"), torch.float32)


def test_layers_hold_memory_only_while_loaded(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher")
    teacher = streamed(tmp_path / "teacher")

    def in_memory() -> set[str]:
        state = teacher.model.state_dict()
        return {name for name, tensor in state.items() if tensor.device.type != "meta"}

    assert in_memory() == {"model.embed_tokens.weight"}
    with teacher.loaded(1):
        held = in_memory() - {"model.embed_tokens.weight"}
        assert held == {n for n in teacher.model.state_dict() if n.startswith("model.layers.1.")}
    assert in_memory() == {"model.embed_tokens.weight"}
    with pytest.raises(RuntimeError, match="on purpose"), teacher.loaded(2):
        raise RuntimeError("on purpose")
    collect(teacher, padded(), CalibrationStore(tmp_path / "store"))
    assert in_memory() == {"model.embed_tokens.weight"}


def test_names_beyond_the_model_are_left_out(tmp_path: Path) -> None:
    """Older checkpoints store what is computed; Transformers ignores it too."""
    save_tiny(tmp_path / "teacher", "mixtral")
    index = json.loads((tmp_path / "teacher" / INDEX).read_text())
    shard = tmp_path / "teacher" / index["weight_map"]["model.norm.weight"]
    extra = "model.layers.1.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(shard), extra: torch.ones(4)}, shard, metadata={"format": "pt"})
    index["weight_map"][extra] = shard.name
    (tmp_path / "teacher" / INDEX).write_text(json.dumps(index))

    with streamed(tmp_path / "teacher").loaded(1) as module:
        assert "self_attn.rotary_emb.inv_freq" not in module.state_dict()


def test_what_is_missing_is_named_before_anything_is_read(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "kv_lora_rank": 12}))

    with pytest.raises(UserError, match=r"kv_a_proj_with_mqa.*configuration and weights are of"):
        streamed(tmp_path / "teacher")


# What is passed on from layer to layer.


def test_padding_is_never_recorded_and_changes_nothing(tmp_path: Path) -> None:
    """Batches with other padding tokens, or with none at all, leave the same artifacts."""
    save_tiny(tmp_path / "teacher")
    zeros, ones = padded(pad=0), padded(pad=1)
    alone = [
        (ids_BS[row : row + 1, : int(mask_BS[row].sum())], mask_BS[row : row + 1, :length])
        for ids_BS, mask_BS in zeros
        for row, length in enumerate(mask_BS.sum(1).tolist())
    ]
    stores = {}
    for name, batches in {"zeros": zeros, "ones": ones, "alone": alone}.items():
        stores[name] = CalibrationStore(tmp_path / name)
        collect(streamed(tmp_path / "teacher"), batches, stores[name])

    for layer in (1, 2):
        first, *others = (stores[name].all_calls(layer) for name in ("zeros", "ones", "alone"))
        assert len(first.x_TD) == sum(map(sum, LENGTHS))
        assert stores["zeros"].statistics(layer).tokens == len(first.x_TD)
        for other in others:
            torch.testing.assert_close(first.x_TD, other.x_TD, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(first.y_TD, other.y_TD, rtol=1e-4, atol=1e-5)
            assert torch.equal(first.index_TK, other.index_TK)


@pytest.mark.parametrize("room", [0, 3 * 9 * 32 * 4 + 1])
def test_passing_on_through_the_disk_is_the_same(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing fits, or only the first batch; artifacts are the same bytes as when all do."""
    save_tiny(tmp_path / "teacher")
    collect(streamed(tmp_path / "teacher"), padded(), CalibrationStore(tmp_path / "memory"))
    read: list[str] = []
    from_disk = passing.artifacts.read_tensors

    def reading(path: Path) -> dict[str, Tensor]:
        read.append(path.name)
        return from_disk(path)

    monkeypatch.setattr(passing, "MEMORY_BYTES", room)
    monkeypatch.setattr(passing.artifacts, "read_tensors", reading)
    collect(streamed(tmp_path / "teacher"), padded(), CalibrationStore(tmp_path / "disk"))

    numbers = (0, 1, 2) if room == 0 else (1, 2)
    # Two of the three layers have something passed on to them.
    assert read == [f"batch-{number:05d}.safetensors" for number in numbers] * 2
    assert contents(tmp_path / "disk") == contents(tmp_path / "memory")


def test_stale_inputs_of_an_interrupted_run_go(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher")
    store = CalibrationStore(tmp_path / "store")
    teacher = streamed(tmp_path / "teacher")
    collect(teacher, padded(), store)
    made = contents(store.directory)
    for layer in (1, 2):
        store.hidden(layer).mkdir()
        (store.hidden(layer) / "batch-00000.safetensors").write_bytes(b"stale")

    collect(teacher, padded(), store)

    assert contents(store.directory) == made
    assert not any(store.directory.glob("hidden-*"))
