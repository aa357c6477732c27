"""Layers that learn to make up for the rounding of their bases."""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from moefuse.config import DistillConfig
from moefuse.distillation.rounded import LearntRounding, refit_layer
from moefuse.mathematics.experts import ExpertsCall
from moefuse.mathematics.integers import Grid, Rounded, nearest, with_feedback
from moefuse.modeling.modeling_moefuse import FusedExperts, PlainGating

GRID = Grid(4, 16)
OPTIONS = DistillConfig(
    steps=60,
    batch_tokens=256,
    delta_learning_rate=5e-4,
    scale_learning_rate=5e-4,
    code_learning_rate=5e-3,
)


def layer() -> FusedExperts:
    torch.manual_seed(0)
    module = FusedExperts(
        32, 16, 6, 2, 2, PlainGating(torch.nn.functional.silu), scale=True, bias=True
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module


def text(module: FusedExperts, tokens: int, seed: int) -> ExpertsCall:
    """Return what the module receives and returns; a few directions of its inputs are strong."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, 32, generator=generator) * torch.linspace(2, 0.2, 32)
    weight_TE = torch.randn(tokens, 6, generator=generator).softmax(-1)
    weight_TK, index_TK = weight_TE.topk(2)
    with torch.no_grad():
        return ExpertsCall(x_TD, index_TK, weight_TK, module(x_TD, index_TK, weight_TK))


def rounded_bases(module: FusedExperts) -> dict[str, Rounded]:
    return {
        f"bases.{name}": nearest(
            linear.weight.detach(), GRID, torch.float32, search=True, energy_I=None
        )
        for name, linear in module.bases.named_modules()
        if isinstance(linear, torch.nn.Linear)
    }


def error(module: FusedExperts, bases: dict[str, Tensor], rest: dict[str, Tensor]) -> float:
    """Return the error on text that nothing learnt from, over what the module returns."""
    student = deepcopy(module)
    weights = {f"{name}.weight": weight for name, weight in bases.items()}
    student.load_state_dict({**module.state_dict(), **weights, **rest})
    call = text(module, 1024, seed=2)
    with torch.no_grad():
        lost_TD = student(call.x_TD, call.index_TK, call.weight_TK) - call.y_TD
    return float(lost_TD.square().sum() / call.y_TD.square().sum())


def test_what_is_rounded_learns_to_make_up_for_it() -> None:
    module = layer()
    call = replace(text(module, 4096, seed=1), y_TD=torch.zeros(4096, 32))
    began = rounded_bases(module)
    read = {name: base.weight() for name, base in began.items()}

    learnt, rest, told = refit_layer(module, began, GRID, call, OPTIONS)
    _, deltas_alone, _ = refit_layer(module, read, None, call, OPTIONS)

    assert learnt.keys() == began.keys()
    bases = {name: base.rounded() for name, base in learnt.items()}
    for base in bases.values():
        assert torch.equal(base.codes_OI, base.codes_OI.round().clamp(-8, 7))
    assert 0 < told.after < 0.9 * told.before
    plain = error(module, read, {})
    assert error(module, read, deltas_alone) < 0.9 * plain
    assert error(module, {n: base.weight() for n, base in bases.items()}, rest) < 0.75 * plain


def test_the_module_itself_stays_as_it_was() -> None:
    module = layer()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    call = text(module, 512, seed=1)
    results = [
        refit_layer(module, rounded_bases(module), GRID, call, replace(OPTIONS, steps=4))
        for _ in range(2)
    ]

    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, base in results[0][0].items():
        codes_OI = results[1][0][name].rounded().codes_OI
        assert torch.equal(base.rounded().codes_OI, codes_OI), name


def test_learning_begins_at_the_codes_that_were_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(8, 32, generator=generator)
    x_NI = torch.randn(64, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    fed_back = with_feedback(weight_OI, GRID, torch.float32, x_NI.T @ x_NI)

    twin = LearntRounding(weight_OI, fed_back, GRID)

    assert torch.equal(twin.rounded().codes_OI, fed_back.codes_OI)
    assert torch.equal(twin.weight.detach(), fed_back.weight())


def test_learning_goes_on_where_it_ended() -> None:
    module = layer()
    call = text(module, 512, seed=1)
    learnt, _, _ = refit_layer(module, rounded_bases(module), GRID, call, OPTIONS)

    for base in learnt.values():
        again = LearntRounding(base.wanted(), base.rounded(), GRID)
        codes_OI = base.rounded().codes_OI
        assert torch.equal(again.rounded().codes_OI, codes_OI)
        within = (base.latent - codes_OI.view_as(base.latent)).abs() < 0.48
        assert within.float().mean() > 0.5
        assert (again.latent - base.latent)[within].abs().max() < 1e-4
