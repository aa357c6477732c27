"""The fused layer as vLLM runs it on GPUs, and wherever it is split over several devices.

``FusedExperts`` runs a base once for every (token, group) pair, and asks how many pairs there are,
which a CUDA graph cannot. Here everything has a size that the number of tokens tells: a base runs
for every chosen expert, by vLLM's own kernel for experts, given the group's number in place of the
expert's. Deltas go through the same kernel with the expert's number.

Split over W devices, each holds 1/W of the F neurons of every base and every delta: rows of gate
and up, of their B, of scale and bias, columns of down and of its A. Whatever is chosen, all devices
have the same work, and outputs are summed.

Split by experts instead (``--enable-expert-parallel``), each device holds whole bases, those of
some groups, and the deltas of their members. Rows of others are zero there, and outputs are summed
all the same. That needs as many groups as devices, and balances only as the router does.

Deltas that are stored in few bits are decoded as they are loaded, and are plain ones from then on.

Shape suffixes as in ``modeling_moefuse``; f is a device's share of F, e and g are how many experts
and groups it holds.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.fused_moe.fused_moe import (
    get_default_config,
    invoke_fused_moe_triton_kernel,
)
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
from vllm.triton_utils import tl

from moefuse.errors import UserError
from moefuse.export.vllm_plugin.decoding import DeltaDecoder, ranks_of
from moefuse.modeling.modeling_moefuse import (
    FusedExperts,
    MultiplexedExperts,
    OpaqueExperts,
    expert_linear,
)

COMPUTE_TYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


OF_GROUPS = ("gate_up", "down")


class Assignment(NamedTuple):
    """Which matrix each of the N = T * K rows is multiplied by; on a GPU also rows by blocks.

    ``place_N`` is the matrix's place among those of this device, -1 where it is on another.
    """

    place_N: Tensor
    blocks: tuple[Tensor, Tensor, Tensor] | None
    config: dict[str, int]


def assign(
    id_N: Tensor, place_of_id: Tensor | None, count: int, hidden: int, top_k: int
) -> Assignment:
    """Prepare products of N rows, row n by matrix ``id_N[n]`` of ``count``.

    ``place_of_id`` (count,) int32 tells where this device holds each, -1 where it does not; None:
    in order, all of them.
    """
    place_N = id_N if place_of_id is None else place_of_id[id_N].long()
    if not id_N.is_cuda:
        return Assignment(place_N, None, {})
    tokens = len(id_N) // top_k
    config = get_default_config(tokens, count, hidden, hidden, top_k, None)
    blocks = moe_align_block_size(
        id_N.int().unsqueeze(-1), config["BLOCK_SIZE_M"], count, place_of_id
    )
    return Assignment(place_N, blocks, config)


def product(x_MI: Tensor, weight_EOI: Tensor, rows: Assignment) -> Tensor:
    """Multiply row n // (N / M) of ``x_MI`` by the matrix that row n is assigned to: (N, O).

    ``x_MI`` (M, I) holds a row for each of the N, or a row for each token, M = T. Rows of matrices
    that are on other devices are zero.
    """
    each = len(rows.place_N) // max(len(x_MI), 1)
    if rows.blocks is None:
        return _product_in_turn(x_MI, weight_EOI, rows.place_N, each)
    sorted_N, matrix_of_block, padded = rows.blocks
    y_NO = x_MI.new_empty(len(rows.place_N), weight_EOI.shape[1])
    invoke_fused_moe_triton_kernel(
        x_MI,
        weight_EOI,
        y_NO.unsqueeze(1),
        None,
        None,
        None,
        sorted_N,
        matrix_of_block,
        padded,
        False,
        each,
        rows.config,
        compute_type=getattr(tl, COMPUTE_TYPES[x_MI.dtype]),
        use_fp8_w8a8=False,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=False,
    )
    return y_NO


def _product_in_turn(x_MI: Tensor, weight_EOI: Tensor, place_N: Tensor, each: int) -> Tensor:
    """Do the same matrix by matrix, where there is no GPU."""
    elsewhere = int((place_N < 0).sum())
    order_N = place_N.argsort(stable=True)[elsewhere:]
    counts = torch.bincount(place_N[order_N], minlength=len(weight_EOI)).tolist()
    y_NO = expert_linear(x_MI.index_select(0, order_N // max(each, 1)), weight_EOI, counts)
    return y_NO.new_zeros(len(place_N), y_NO.shape[1]).index_copy(0, order_N, y_NO)


def groups_of_device(
    group_of_expert: Sequence[int], groups: int, rank: int, devices: int
) -> list[int]:
    """Return the groups that device ``rank`` holds, so that all hold about as many experts.

    The largest group comes first, each goes to the device that has the fewest experts so far, or
    else the fewest groups; no device is left without where there are as many groups as devices.
    """
    members = [0] * groups
    for group in group_of_expert:
        members[group] += 1
    held: list[list[int]] = [[] for _ in range(devices)]
    for group in sorted(range(groups), key=lambda group: -members[group]):
        emptiest = min(held, key=lambda some: (sum(members[g] for g in some), len(some)))
        emptiest.append(group)
    return sorted(held[rank])


class ServedExperts(OpaqueExperts):
    """One device's share of a ``FusedExperts``, whose tensors ``load_weights`` takes in.

    Parameters: ``gate_up`` (g, 2f, D), ``down`` (g, D, f), ``gate_up_a`` (e, R, D), ``gate_up_b``
    (e, 2f, R), ``down_a`` (e, R, f), ``down_b`` (e, D, R), ``scale`` and ``bias`` (e, 2f),
    ``down_bias`` (e, D). Split by neurons g and e are all G and E; split by experts f is F, and the
    parameters are made when ``group_of_expert`` is loaded, which tells whose they are.
    """

    group_of_expert: Tensor
    place_of_expert: Tensor | None
    place_of_group: Tensor | None

    def __init__(
        self,
        fused: FusedExperts,
        *,
        rank: int,
        devices: int,
        dtype: torch.dtype,
        device: torch.device | str,
        sum_over_devices: Callable[[Tensor], Tensor],
        by_experts: bool = False,
    ) -> None:
        """Make room for what ``fused``, which may be on the meta device, becomes on a device."""
        super().__init__()
        first: Any = fused.bases[0]
        intermediate = first.down_proj.in_features
        self.gating, self.num_experts, self.num_groups = (
            fused.gating,
            fused.num_experts,
            len(fused.bases),
        )
        self.rank, self.devices, self.sum_over_devices = rank, devices, sum_over_devices
        self.by_experts = by_experts
        if by_experts and self.num_groups < devices:
            raise UserError(
                f"{self.num_groups} groups of experts cannot be spread over {devices} devices; "
                "leave --enable-expert-parallel out, and every device takes a part of each."
            )
        if not by_experts and intermediate % devices:
            raise UserError(
                f"Experts of {intermediate} neurons cannot be split over {devices} devices; give "
                "--tensor-parallel-size a divisor of them."
            )
        self.options = {"dtype": dtype, "device": device}
        share = intermediate if by_experts else intermediate // devices
        self.shapes = _shapes(fused, share, first.down_proj.out_features)
        self.register_buffer(
            "group_of_expert", torch.zeros(self.num_experts, dtype=torch.long, device=device)
        )
        self.register_buffer("place_of_expert", None)
        self.register_buffer("place_of_group", None)
        self.decoder = DeltaDecoder(fused.delta, dtype)
        self.waiting: list[tuple[str, Tensor]] = []
        if not by_experts:
            self._make_room(self.num_groups, self.num_experts)

    def _make_room(self, groups: int, experts: int) -> None:
        for name, shape in self.shapes.items():
            count = groups if name in OF_GROUPS else experts
            room = torch.empty((count, *shape), **self.options)
            self.register_parameter(name, nn.Parameter(room, requires_grad=False))

    def compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the routed experts' output, summed over devices; see ``FusedExperts``."""
        tokens, top_k = top_k_index.shape
        expert_N = top_k_index.reshape(-1).long()
        hidden = hidden_states.shape[1]
        group_N = self.group_of_expert[expert_N]
        by_group = assign(group_N, self.place_of_group, self.num_groups, hidden, top_k)
        by_expert = assign(expert_N, self.place_of_expert, self.num_experts, hidden, top_k)
        weight_N1 = top_k_weights.reshape(-1, 1) * (by_expert.place_N >= 0).unsqueeze(-1)
        own_N = by_expert.place_N.clamp(min=0)
        h_Nf = product(hidden_states, self.gate_up, by_group)
        if hasattr(self, "scale"):
            h_Nf = h_Nf * self.scale[own_N]
        if hasattr(self, "gate_up_a"):
            inner_NR = product(hidden_states, self.gate_up_a, by_expert)
            h_Nf = h_Nf + product(inner_NR, self.gate_up_b, by_expert)
        if hasattr(self, "bias"):
            h_Nf = h_Nf + self.bias[own_N]
        gate_Nf, up_Nf = h_Nf.chunk(2, dim=-1)
        z_Nf = (self.gating(gate_Nf, up_Nf) * weight_N1).to(h_Nf.dtype)
        y_ND = product(z_Nf, self.down, by_group)
        if hasattr(self, "down_a"):
            y_ND = y_ND + product(product(z_Nf, self.down_a, by_expert), self.down_b, by_expert)
        # Where neurons are split, one device alone adds what no neuron is part of.
        if hasattr(self, "down_bias") and (self.by_experts or self.rank == 0):
            y_ND = y_ND + (self.down_bias[own_N] * weight_N1).to(y_ND.dtype)
        y_TD = y_ND.view(tokens, top_k, hidden).sum(1, dtype=torch.float32)
        return self.sum_over_devices(y_TD.to(hidden_states.dtype))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take in this device's share of a ``FusedExperts``' tensors; return whose they are.

        May be called again with further ones. Split by experts, those that come before
        ``group_of_expert`` wait for it; they are of one layer.
        """
        loaded = set()
        for name, tensor in self.decoder.decoded(weights):
            if name == "group_of_expert":
                self.group_of_expert.copy_(tensor)
                loaded.add(name)
                if self.by_experts:
                    self._choose_own(tensor.tolist())
            self.waiting.append((name, tensor))
            if not self.by_experts or self.place_of_expert is not None:
                loaded |= {self._take(*each) for each in self.waiting}
                self.waiting.clear()
        return loaded

    def _choose_own(self, group_of_expert: list[int]) -> None:
        """Make room for this device's groups and their members, in order of their numbers."""
        groups = groups_of_device(group_of_expert, self.num_groups, self.rank, self.devices)
        experts = [e for e, group in enumerate(group_of_expert) if group in groups]
        for name, own, count in (
            ("place_of_group", groups, self.num_groups),
            ("place_of_expert", experts, self.num_experts),
        ):
            place = torch.full((count,), -1, dtype=torch.int32)
            place[own] = torch.arange(len(own), dtype=torch.int32)
            setattr(self, name, place.to(self.group_of_expert.device))
        self._make_room(len(groups), len(experts))

    @torch.no_grad()
    def _take(self, name: str, tensor: Tensor) -> str:
        """Copy this device's share of the checkpoint's ``name``; return the parameter's name."""
        parts = name.split(".")
        if parts[0] != "bases":
            target = parts[-1]
            if target != "group_of_expert":
                own = slice(None) if self.place_of_expert is None else self.place_of_expert >= 0
                self.get_parameter(target).copy_(self._share(target, tensor[own]))
            return target
        target, group = parts[2].removesuffix("_proj"), int(parts[1])
        place = group if self.place_of_group is None else int(self.place_of_group[group])
        if place >= 0:
            self.get_parameter(target)[place].copy_(self._share(target, tensor))
        return target

    def _share(self, target: str, tensor: Tensor) -> Tensor:
        if self.by_experts:
            return tensor
        if target in ("down", "down_a"):
            return tensor.chunk(self.devices, -1)[self.rank]
        if target in ("gate_up", "gate_up_b", "scale", "bias"):
            # Gate and up lie one after the other on this axis, and each is split.
            axis = 0 if target == "gate_up" else 1
            halves = tensor.chunk(2, axis)
            return torch.cat([half.chunk(self.devices, axis)[self.rank] for half in halves], axis)
        return tensor


def _shapes(fused: FusedExperts, share: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of one group's or expert's part of every parameter, f being ``share``."""
    shapes: dict[str, tuple[int, ...]] = {"gate_up": (2 * share, hidden), "down": (hidden, share)}
    if fused.delta is not None:
        rank_up, rank_down = ranks_of(fused.delta)
        shapes |= {
            "gate_up_a": (rank_up, hidden),
            "gate_up_b": (2 * share, rank_up),
            "down_a": (rank_down, share),
            "down_b": (hidden, rank_down),
        }
    shapes |= {name: (2 * share,) for name in ("scale", "bias") if getattr(fused, name) is not None}
    if fused.down_bias is not None:
        shapes["down_bias"] = (hidden,)
    return shapes


def put_served_experts(
    model: nn.Module, dtype: torch.dtype, device: torch.device | str, *, by_experts: bool
) -> None:
    """Put this device's share in the place of every ``FusedExperts`` below ``model``.

    Other forms of experts stay as they are, whole on every device.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FusedExperts) and not isinstance(child, MultiplexedExperts):
                share = ServedExperts(
                    child,
                    rank=get_tensor_model_parallel_rank(),
                    devices=get_tensor_model_parallel_world_size(),
                    dtype=dtype,
                    device=device,
                    sum_over_devices=tensor_model_parallel_all_reduce,
                    by_experts=by_experts,
                )
                setattr(parent, name, share)
