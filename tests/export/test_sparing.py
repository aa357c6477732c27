"""Scales that are moved between the projections of a base, and how they are chosen."""

from copy import deepcopy

import torch

from moefuse.export.quantized.sparing import scale_neurons
from moefuse.mathematics.activation_aware import input_scales
from moefuse.mathematics.integers import Grid, nearest
from moefuse.mathematics.lowrank import expected_error
from moefuse.modeling.modeling_moefuse import FusedExperts, PlainGating


def test_scaled_neurons_compute_the_same() -> None:
    torch.manual_seed(0)
    silu = PlainGating(torch.nn.functional.silu)
    module = FusedExperts(32, 16, 6, 2, 2, silu, scale=True, bias=True).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    scaled = deepcopy(module)
    x_TD, weight_TK = torch.randn(64, 32).double(), torch.rand(64, 3).double()
    index_TK = torch.stack([torch.randperm(6)[:3] for _ in range(64)])

    for group in range(2):
        scale_neurons(scaled, group, torch.rand(16) + 0.5)

    wanted, got = (m(x_TD, index_TK, weight_TK) for m in (module, scaled))
    weights = [m.state_dict()["bases.1.down_proj.weight"] for m in (module, scaled)]
    assert not torch.equal(*weights)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_strong_inputs_are_spared() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(48, 64, generator=generator)
    x_NI = torch.randn(256, 64, generator=generator)
    x_NI[:, :4] *= 20
    moment_II, grid = x_NI.T @ x_NI / 256, Grid(4, 32)

    scale_I = input_scales(weight_OI, grid, torch.float32, moment_II)

    def error(factor_I: torch.Tensor) -> float:
        rounded = nearest(weight_OI * factor_I, grid, torch.float32, search=False, energy_I=None)
        return float(expected_error(weight_OI - rounded.weight() / factor_I, moment_II))

    assert scale_I[0] > scale_I[-1]
    assert error(scale_I) < 0.8 * error(torch.ones(64))


def test_inputs_that_never_come_are_not_scaled() -> None:
    scale_I = input_scales(torch.ones(4, 32), Grid(4, 32), torch.float32, torch.zeros(32, 32))

    assert torch.equal(scale_I, torch.ones(32))
