"""What calibration keeps of a teacher, against running the whole teacher at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from tiny import tiny_model
from torch import Tensor

from moefuse.calibration.collect import Batch, CalibrationStore, collect
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.families import all_families
from moefuse.mathematics.statistics import LayerStatistics

FAMILIES = sorted(all_families())
LENGTHS = (12, 5, 9, 1)


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 64, (length,), generator=generator) for length in LENGTHS]


def padded(rows: list[Tensor], fill: int) -> Batch:
    length = max(len(row) for row in rows)
    ids_BS = torch.full((len(rows), length), fill)
    mask_BS = torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids_BS[number, : len(row)] = row
        mask_BS[number, : len(row)] = 1
    return ids_BS, mask_BS


def collected(directory: Path, batches: list[Batch], out: Path) -> CalibrationStore:
    reader = CheckpointReader.open(directory)
    store = CalibrationStore(out)
    collect(StreamedTeacher(reader, device="cpu", dtype=torch.float32), batches, store)
    return store


@torch.no_grad()
def heard(model_type: str, rows: list[Tensor]) -> dict[int, list[tuple[Tensor, ...]]]:
    """Run the whole teacher on every sequence alone and hear its experts."""
    family, model = all_families()[model_type], tiny_model(model_type)
    found: dict[int, list[tuple[Tensor, ...]]] = {}

    def listen(layer: int) -> Callable[..., None]:
        return lambda _, given, returned: found.setdefault(layer, []).append((*given, returned))

    for layer in family.shape(model.config.to_dict()).layers:
        path = f"{family.moe_path(layer)}.{family.experts_name}"
        model.get_submodule(path).register_forward_hook(listen(layer))
    for row in rows:
        model(row[None])
    return found


def assert_same_statistics(actual: LayerStatistics, expected: LayerStatistics) -> None:
    assert (actual.tokens, actual.sampled) == (expected.tokens, expected.sampled)
    assert torch.equal(actual.coactivation_EE, expected.coactivation_EE)
    for name in actual.tensors().keys() - {"counts"}:
        assert_close(getattr(actual, name), getattr(expected, name))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_kept_is_what_the_whole_teacher_does(
    model_type: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    rows = sequences()
    batches = [padded(rows[:2], fill=7), padded(rows[2:], fill=7)]

    store = collected(tiny_checkpoint(model_type), batches, tmp_path / "store")

    for layer, calls in heard(model_type, rows).items():
        x_TD, index_TK, weight_TK, y_TD = (
            torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
            for parts in zip(*calls, strict=True)
        )
        kept = store.all_calls(layer)
        assert len(kept.x_TD) == sum(LENGTHS)
        assert_close(kept.x_TD, x_TD)
        assert_close(kept.y_TD, y_TD)
        assert torch.equal(*(i.long().sort(1).values for i in (kept.index_TK, index_TK)))
        assert_close(kept.weight_TK.sort(1).values, weight_TK.sort(1).values)


def test_padding_never_counts(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory, rows = tiny_checkpoint(), sequences()
    alone = collected(directory, [padded([row], fill=0) for row in rows], tmp_path / "alone")

    together = collected(directory, [padded(rows, fill=7)], tmp_path / "together")

    for layer in (1, 2):
        assert_same_statistics(together.statistics(layer), alone.statistics(layer))
        assert together.statistics(layer).tokens == sum(LENGTHS)


def test_what_padding_is_filled_with_does_not_matter(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory, rows = tiny_checkpoint(), sequences()

    first, second = (
        collected(directory, [padded(rows, fill)], tmp_path / str(fill)) for fill in (3, 60)
    )

    for layer in (1, 2):
        one, other = first.all_calls(layer), second.all_calls(layer)
        assert torch.equal(one.index_TK, other.index_TK)
        for name in ("x_TD", "weight_TK", "y_TD"):
            assert_close(getattr(one, name), getattr(other, name))
        assert_same_statistics(first.statistics(layer), second.statistics(layer))


def test_experts_never_routed_are_reported(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = collected(tiny_checkpoint(), [padded(sequences()[3:], fill=0)], tmp_path / "store")

    told = capfd.readouterr()
    for layer in (1, 2):
        never = store.statistics(layer).never_routed
        assert len(never) == 6, "one token chooses two of eight"
        assert f"Layer {layer}: no calibration token chose experts {never}" in told.out + told.err


def test_only_the_layers_with_experts_are_kept(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    store = collected(tiny_checkpoint(), [padded(sequences(), fill=0)], tmp_path / "store")

    assert sorted(path.name for path in store.directory.iterdir()) == ["layer-001", "layer-002"]


def test_layers_that_are_complete_are_not_run_again(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory, batches = tiny_checkpoint(), [padded(sequences(), fill=0)]
    store = collected(directory, batches, tmp_path / "store")

    class OnlyItsShape:
        """Fails at anything that running a layer needs."""

        reader = CheckpointReader.open(directory)

    teacher: Any = OnlyItsShape()
    before = {path: path.stat().st_mtime_ns for path in store.directory.rglob("*")}

    collect(teacher, batches, store)

    assert {path: path.stat().st_mtime_ns for path in store.directory.rglob("*")} == before
