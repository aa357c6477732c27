"""Layer distillation where there is a GPU: no step waits for it, and bits are the same twice."""

import copy
from collections.abc import Iterator

import pytest
import torch
from test_distill import same_bits
from torch import nn

from moefuse.config import DistillConfig
from moefuse.distillation.loop import DistillResult, distill_layer
from moefuse.mathematics.experts import ExpertsCall
from moefuse.modeling import FusedExperts
from moefuse.modeling.modeling_moefuse import PlainGating

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
        reason="grouped products are one kernel from Hopper on",
    ),
]
T, K, E, G, R, D, F = 2048, 4, 16, 3, 5, 64, 48
OPTIONS = DistillConfig(steps=8, batch_tokens=1024, precision="bfloat16")


def random_layer() -> tuple[FusedExperts, ExpertsCall]:
    """Return a student with a scale on the GPU, and what it should learn."""
    generator = torch.Generator().manual_seed(0)
    student = FusedExperts(D, F, E, G, R, PlainGating(nn.functional.silu), scale=True)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(std=0.1, generator=generator)
    x_TD, y_TD = torch.randn(2, T, D, generator=generator)
    weight_TK, index_TK = torch.rand(T, E, generator=generator).topk(K)
    return student.cuda(), ExpertsCall(x_TD, index_TK.int(), weight_TK, y_TD).to("cuda")


def distilled(student: FusedExperts, call: ExpertsCall) -> DistillResult:
    """Distil; a step that waits for the GPU is an error, but for the first, which compiles."""

    def strict(numbers: range) -> Iterator[int]:
        for number in numbers:
            torch.cuda.set_sync_debug_mode("error" if number else "default")
            yield number
        torch.cuda.set_sync_debug_mode("default")

    try:
        return distill_layer(student, call, OPTIONS, progress=strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_step_waits_for_the_gpu_and_the_same_seed_gives_the_same_bits() -> None:
    student, call = random_layer()
    again = copy.deepcopy(student)

    first, second = distilled(student, call), distilled(again, call)

    assert first == second
    assert first.after < first.before
    assert same_bits(student, again)
