"""Packed weights as vLLM reads them from files, part by part; vLLM itself is not needed."""

import pytest
import torch
from torch import Tensor, nn

from moefuse.export.quantized.compressed import LAYOUTS, grid_of, parts, settings
from moefuse.export.vllm_plugin.unpacking import settings_to_unpack_by, unpacked
from moefuse.mathematics.integers import Rounded, nearest

O, I = 32, 64  # noqa: E741


def rounded(scheme: str, seed: int) -> tuple[Rounded, dict]:
    layout = LAYOUTS[scheme]
    grid = grid_of(layout, {I}, None)
    weight_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(seed))
    found = nearest(weight_OI, grid, torch.float32, search=False, energy_I=None)
    return found, settings(layout, grid, [])


def stored(scheme: str, *names: str) -> tuple[list[tuple[str, Tensor]], dict[str, Tensor], dict]:
    """Return the tensors of ``names``, scales last, as if in another file; what they stand for."""
    tensors, weights, written = {}, {}, {}
    for seed, name in enumerate(names):
        weight, written = rounded(scheme, seed)
        tensors |= parts(name, weight, LAYOUTS[scheme])
        weights[f"{name}.weight"] = weight.weight()
    return sorted(tensors.items(), key=lambda item: "scale" in item[0]), weights, written


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_parts_far_from_each_other_become_weights_and_others_pass(scheme: str) -> None:
    tensors, weights, written = stored(scheme, "layers.0.down_proj", "layers.1.down_proj")
    norm = torch.ones(3)

    found = dict(unpacked([("norm.weight", norm), *tensors], written))

    assert found.pop("norm.weight") is norm
    assert found.keys() == weights.keys()
    for name, weight_OI in weights.items():
        assert torch.equal(found[name], weight_OI)


@pytest.mark.parametrize(
    ("scheme", "dtype", "columns", "to_unpack"),
    [
        ("w4a16", torch.float32, 64, True),
        ("w4a16", torch.bfloat16, 64, False),
        ("w4a16", torch.bfloat16, 48, True),
        ("w8a16", torch.bfloat16, 64, True),
        ("w8a8", torch.float32, 64, False),
    ],
)
def test_what_a_cpu_has_a_kernel_for_stays_packed(
    scheme: str, dtype: torch.dtype, columns: int, to_unpack: bool
) -> None:
    _, written = rounded(scheme, 0)
    linears = [nn.Linear(64, 64, device="meta"), nn.Linear(columns, 32, device="meta")]

    assert settings_to_unpack_by(written, dtype, linears) == (written if to_unpack else None)
    assert settings_to_unpack_by(None, dtype, linears) is None
