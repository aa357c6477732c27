"""Rivals at few bits: what is trained, what is counted and what is measured are one thing."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import Tensor, nn

from moefuse.arena.lowbit import RoundedStudent, bits_per_number, numbers_bytes, student_bytes
from moefuse.arena.students import compress_within, multiply_grouped
from moefuse.baselines import Layer, TooSmallError, method
from moefuse.comparison import routed_part
from moefuse.families import all_families
from moefuse.mathematics.experts import ExpertsCall
from moefuse.mathematics.quantization import Format, best_scale, pack, to_codes
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.modeling.native import experts_of

EXPERT = 3 * 32 * 16


@pytest.fixture(scope="module")
def layer() -> Layer:
    """One layer of a tiny teacher with what it received and returned."""
    family = all_families()["deepseek_v2"]
    block = tiny_model("deepseek_v2").get_submodule(family.moe_path(2))
    native = block.get_submodule(family.experts_name)
    experts = experts_of(native, family, tiny_config("deepseek_v2").to_dict())
    heard: list[tuple[Tensor, ...]] = []
    handle = native.register_forward_hook(lambda _, given, out: heard.append((*given[:3], out)))
    with torch.no_grad():
        block(torch.randn(1, 400, 32, generator=torch.Generator().manual_seed(0)))
    handle.remove()
    call = ExpertsCall(*heard[0])
    statistics = LayerStatistics.empty(8, 32)
    with torch.no_grad():
        statistics.add(call, experts)
    return Layer(family, tiny_config("deepseek_v2"), block, experts, statistics, call)


def student_of(layer: Layer, name: str, experts: int = 4) -> nn.Module:
    return method(name).compress(layer, experts * EXPERT)


def output(student: nn.Module, call: ExpertsCall) -> Tensor:
    return student(call.x_TD, call.index_TK.long(), call.weight_TK)


class Thin(nn.Module):
    """A student with a thin factor, a vector, and what is not trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.thin = nn.Parameter(torch.randn(3, 200, 2, generator=generator))
        self.gain = nn.Parameter(torch.randn(7, generator=generator))
        self.frozen = nn.Parameter(torch.randn(5, 5, generator=generator), requires_grad=False)
        self.register_buffer("map", torch.arange(4))


def test_bytes_are_those_of_packed_codes_and_scales() -> None:
    student, fmt = Thin(), Format(2, 64)
    across = student.thin.detach().mT.contiguous()

    codes = to_codes(across, best_scale(across, fmt), fmt)
    expected = pack(codes, 2).nbytes + best_scale(across, fmt).half().nbytes
    rest = 2 * (7 + 25)

    assert numbers_bytes(student, 2) == expected + rest
    assert student_bytes(student, 2) == expected + rest + 4 * 8
    assert numbers_bytes(student, 16) == 2 * (1200 + 7 + 25)
    assert (bits_per_number(16), bits_per_number(4)) == (16, 4.25)


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_groups_hold_no_more_values_than_their_bits(bits: float) -> None:
    student = Thin()
    before = copy.deepcopy(student)

    RoundedStudent(student, bits, torch.bfloat16).finished()

    for group in student.thin.detach().mT.flatten(0, -2):
        for part in group.split(64):
            assert len(part.unique()) <= 2**bits
    assert not student.thin.equal(before.thin)
    for name in ("gain", "frozen"):
        rounded = before.get_parameter(name).bfloat16().float()
        assert student.get_parameter(name).equal(rounded)


@pytest.mark.parametrize("name", ["reap", "hc-smoe", "d2-moe", "mobe", "multiplex-mean"])
def test_what_is_finished_is_what_was_trained(name: str, layer: Layer) -> None:
    student = RoundedStudent(student_of(layer, name).float(), 4, torch.bfloat16)
    plain = output(copy.deepcopy(student.student), layer.call).detach()
    loss = (output(student, layer.call) - layer.call.y_TD).square().mean()
    loss.backward()

    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert any(n.startswith("scales.") for n in trained)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert all(float(p.grad.abs().sum()) > 0 for n, p in trained.items() if "scales" in n)  # type: ignore
    with torch.no_grad():
        seen = output(student, layer.call)
        finished = student.finished()
        stored = output(finished, layer.call)
    assert not torch.allclose(seen, plain, rtol=0.01, atol=0.01 * float(plain.std()))
    # What differs are numbers of one dimension alone, which are stored in bf16.
    torch.testing.assert_close(stored, seen, rtol=0.02, atol=0.02 * float(plain.std()))
    if name in ("reap", "hc-smoe"):
        torch.testing.assert_close(stored, seen)


def test_the_router_stays(layer: Layer) -> None:
    student = student_of(layer, "reap")
    names = [name for name, _ in student.named_parameters() if "gate.weight" in name]
    before = {name: student.get_parameter(name).clone() for name in names}

    RoundedStudent(student, 1, torch.bfloat16).finished()

    assert names == ["routed.gate.weight"]
    assert all(student.get_parameter(name).equal(weight) for name, weight in before.items())


@pytest.mark.parametrize("bits", [16, 4, 1])
@pytest.mark.parametrize("name", ["reap", "m-smoe", "d2-moe", "multiplex-mixture-of-lora"])
def test_as_many_numbers_as_the_bytes_hold(name: str, bits: float, layer: Layer) -> None:
    budget = 3 * EXPERT * 2
    student = compress_within(method(name).compress, layer, budget, bits)

    whole = sum(parameter.numel() for parameter in routed_part(student).parameters())
    assert numbers_bytes(student, bits) <= budget
    # All of the teacher's numbers may take less.
    assert numbers_bytes(student, bits) > 0.5 * budget or whole >= layer.numbers
    if (name, bits) in (("reap", 16), ("m-smoe", 16)):
        assert numbers_bytes(student, bits) == budget


def test_a_budget_that_holds_nothing(layer: Layer) -> None:
    with pytest.raises(TooSmallError):
        compress_within(method("reap").compress, layer, EXPERT // 2, 16)


def test_numbers_are_lowered_until_they_fit(layer: Layer) -> None:
    """Vectors stay at 16 bits, so that the first guess is too high."""
    asked: list[int] = []

    def compress(_: Layer, numbers: int) -> nn.Module:
        asked.append(numbers)
        student = nn.Module()
        student.vector = nn.Parameter(torch.zeros(numbers // 2))
        student.matrix = nn.Parameter(torch.zeros(1, numbers - numbers // 2))
        return student

    student = compress_within(compress, layer, 1000, 4)

    assert asked[0] == 8 * 1000 // 4.25
    assert asked == sorted(asked, reverse=True)
    assert len(asked) > 1
    assert 950 < numbers_bytes(student, 4) <= 1000


def native(name: str) -> Callable[[Layer], nn.Module]:
    return lambda layer: student_of(layer, name).float()


@pytest.mark.parametrize("name", ["reap", "hc-smoe", "frequency", "ream"])
def test_grouped_products_are_the_same(name: str, layer: Layer) -> None:
    looped = native(name)(layer)
    grouped = copy.deepcopy(looped)
    multiply_grouped(grouped)
    configs = [m.config for m in grouped.modules() if hasattr(m, "gate_up_proj")]
    assert [config._experts_implementation for config in configs] == ["grouped_mm"]

    outputs = [output(student, layer.call) for student in (looped, grouped)]
    for found in outputs:
        (found - layer.call.y_TD).square().sum().backward()

    torch.testing.assert_close(outputs[1], outputs[0])
    for one, other in zip(looped.parameters(), grouped.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad is not None
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4)
