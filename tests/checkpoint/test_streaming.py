"""Layer by layer and in one piece, a teacher computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moefuse.artifacts import read_tensors
from moefuse.calibration.collect import Batch, CalibrationStore, collect
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.streaming import StreamedTeacher
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
