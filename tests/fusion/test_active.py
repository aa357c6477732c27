"""A token passes no more of the student's parameters than of the teacher's."""

import pytest
import torch

from moefuse.config import SizeConfig
from moefuse.families import MoeShape
from moefuse.fusion.plan_neurons import settle
from moefuse.sizes import active_parameters

SHAPE = MoeShape(layers=(0, 1), experts=8, top_k=2, shared_experts=0, hidden=32, intermediate=16)


@pytest.mark.parametrize("bits", ["auto", "16"])
@pytest.mark.parametrize("expert_bits", [0.5, 1.0, 4.0, 8.0, 15.0])
def test_a_student_has_no_more_active_parameters(bits: str, expert_bits: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # One layer and a few experts of great energy: they keep all of their neurons.
    energies = {
        layer: torch.rand(8, 16, generator=generator) * weight
        for layer, weight in ((0, 0.1), (1, 10.0))
    }
    energies[1][:3] *= 100
    size = SizeConfig(expert_bits=expert_bits, bits=bits, shared=None)
    budget = int(2 * 8 * 3 * 32 * 16 * expert_bits / 8)

    chosen, plans = settle(SHAPE, energies, budget, size, 2)

    teacher = 2 * 3 * 32 * 16
    for layer, plan in plans.items():
        own_E = (chosen[layer] > 0).sum(1).sort(descending=True).values
        active = 3 * 32 * (int(own_E[:2].sum()) + plan.shared) + 2 * plan.shared
        assert active_parameters(SHAPE, plan) == active <= teacher
