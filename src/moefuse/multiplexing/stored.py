"""A multiplexed student as checkpoints store it, in the module that travels with them.

Shape suffixes: E experts, G groups, M members of a group, D hidden width, O outputs, I inputs,
R rank.
"""

import torch
from torch import Tensor

from moefuse.multiplexing.student import AdaptedLinear, Lora, MultiplexedExperts

PROJECTIONS = ("gate", "up", "down")


@torch.no_grad()
def stored_state(student: MultiplexedExperts) -> dict[str, Tensor]:
    """Return the state of a ``modeling_moefuse.MultiplexedExperts`` that computes what this does.

    ``student`` is told the routing and has no biases. Scales of adapters are multiplied into their
    B; where there are no adapters they are of rank 0 and of kind mixture.
    """
    groups = student.listed()
    member_E = torch.cat([group.members for group in groups])
    order_E = member_E.argsort()
    sizes = torch.tensor([len(group.members) for group in groups], device=member_E.device)
    group_E = torch.arange(len(groups), device=member_E.device).repeat_interleave(sizes)
    state = {"group_of_expert": group_E[order_E]}
    for number, group in enumerate(groups):
        gate, up, down = group.linears()
        state[f"bases.{number}.gate_up_proj.weight"] = torch.cat([gate.weight, up.weight])
        state[f"bases.{number}.down_proj.weight"] = down.weight.detach()
    shifts = [group.get_parameter("routing").T for group in groups]
    state["delta.shift"] = torch.cat(shifts)[order_E]
    for place, name in enumerate(PROJECTIONS):
        parts = [_adapter(group.linears()[place], len(group.members)) for group in groups]
        for part in parts[0]:
            stacked = torch.cat([adapter[part] for adapter in parts])
            by_member = "mask" not in parts[0] or part == "mask"
            state[f"delta.{name}.{part}"] = stacked[order_E] if by_member else stacked
    return state


def _adapter(linear: AdaptedLinear, members: int) -> dict[str, Tensor]:
    """Return ``a`` (M, R, I) and ``b`` (M, O, R), or (1, R, I), (1, O, R) and ``mask`` (M, R)."""
    adapter = linear.adapter
    if adapter is None:
        outputs, inputs = linear.weight.shape
        zeros = linear.weight.new_zeros
        return {"a": zeros(members, 0, inputs), "b": zeros(members, outputs, 0)}
    if adapter.mixing is not None:
        return {"a": adapter.a[None], "b": _scaled_b(adapter)[None], "mask": adapter.mixing.T}
    a_MRI = adapter.a.unflatten(0, (members, -1))
    return {"a": a_MRI, "b": _scaled_b(adapter).unflatten(1, (members, -1)).transpose(0, 1)}


def _scaled_b(adapter: Lora) -> Tensor:
    return adapter.scaling[:, None] * adapter.b
