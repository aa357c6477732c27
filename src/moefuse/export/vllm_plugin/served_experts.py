"""The fused layer as vLLM runs it on GPUs, and wherever it is split over several devices.

``FusedExperts`` runs a base once for every (token, group) pair, and asks how many pairs there are,
which a CUDA graph cannot. Here everything has a size that the number of tokens tells: a base runs
for every chosen expert, by vLLM's own kernel for experts, given the group's number in place of the
expert's. Deltas go through the same kernel with the expert's number.

Split over W devices, each holds 1/W of the F neurons of every base and every delta: rows of gate
and up, of their B, of scale and bias, columns of down and of its A. Whatever is chosen, all devices
have the same work, and outputs are summed. Splitting by experts instead would need as many groups
as devices, and balances only as the router does.

Shape suffixes as in ``modeling_moefuse``; f is a device's share of F.
"""

from collections.abc import Callable, Iterable
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


class Assignment(NamedTuple):
    """Which matrix each of the N = T * K rows is multiplied by; on a GPU also rows by blocks."""

    id_N: Tensor
    count: int
    blocks: tuple[Tensor, Tensor, Tensor] | None
    config: dict[str, int]


def assign(id_N: Tensor, count: int, tokens: int, hidden: int) -> Assignment:
    """Prepare products of N rows, row n by matrix ``id_N[n]`` of ``count``."""
    if not id_N.is_cuda:
        return Assignment(id_N, count, None, {})
    config = get_default_config(tokens, count, hidden, hidden, len(id_N) // max(tokens, 1), None)
    blocks = moe_align_block_size(id_N.int().unsqueeze(-1), config["BLOCK_SIZE_M"], count)
    return Assignment(id_N, count, blocks, config)


def product(x_MI: Tensor, weight_EOI: Tensor, rows: Assignment) -> Tensor:
    """Multiply row n // (N / M) of ``x_MI`` by the matrix that row n is assigned to: (N, O).

    ``x_MI`` (M, I) holds a row for each of the N, or a row for each token, M = T.
    """
    each = len(rows.id_N) // max(len(x_MI), 1)
    if rows.blocks is None:
        return _product_in_turn(x_MI, weight_EOI, rows, each)
    sorted_N, matrix_of_block, padded = rows.blocks
    y_NO = x_MI.new_empty(len(rows.id_N), weight_EOI.shape[1])
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


def _product_in_turn(x_MI: Tensor, weight_EOI: Tensor, rows: Assignment, each: int) -> Tensor:
    """Do the same matrix by matrix, where there is no GPU."""
    id_N, order_N = rows.id_N.sort(stable=True)
    counts = torch.bincount(id_N, minlength=rows.count).tolist()
    y_NO = expert_linear(x_MI.index_select(0, order_N // max(each, 1)), weight_EOI, counts)
    return torch.empty_like(y_NO).index_copy(0, order_N, y_NO)


class ServedExperts(OpaqueExperts):
    """One device's share of a ``FusedExperts``, whose tensors ``load_weights`` takes in.

    Parameters: ``gate_up`` (G, 2f, D), ``down`` (G, D, f), ``gate_up_a`` (E, R, D), ``gate_up_b``
    (E, 2f, R), ``down_a`` (E, R, f), ``down_b`` (E, D, R), ``scale`` and ``bias`` (E, 2f),
    ``down_bias`` (E, D).
    """

    group_of_expert: Tensor

    def __init__(
        self,
        fused: FusedExperts,
        *,
        rank: int,
        devices: int,
        dtype: torch.dtype,
        device: torch.device | str,
        sum_over_devices: Callable[[Tensor], Tensor],
    ) -> None:
        """Make room for what ``fused``, which may be on the meta device, becomes on a device."""
        super().__init__()
        first: Any = fused.bases[0]
        intermediate = first.down_proj.in_features
        if intermediate % devices:
            raise UserError(
                f"Experts of {intermediate} neurons cannot be split over {devices} devices; give "
                "--tensor-parallel-size a divisor of them."
            )
        self.gating, self.num_experts = fused.gating, fused.num_experts
        self.rank, self.devices, self.sum_over_devices = rank, devices, sum_over_devices
        share, hidden = intermediate // devices, first.down_proj.out_features
        groups, experts = len(fused.bases), fused.num_experts
        shapes: dict[str, tuple[int, ...]] = {
            "gate_up": (groups, 2 * share, hidden),
            "down": (groups, hidden, share),
        }
        if fused.delta is not None:
            rank_up, rank_down = fused.delta.gate_up_a.shape[1], fused.delta.down_a.shape[1]
            shapes |= {
                "gate_up_a": (experts, rank_up, hidden),
                "gate_up_b": (experts, 2 * share, rank_up),
                "down_a": (experts, rank_down, share),
                "down_b": (experts, hidden, rank_down),
            }
        shapes |= {
            name: (experts, 2 * share)
            for name in ("scale", "bias")
            if getattr(fused, name) is not None
        }
        if fused.down_bias is not None:
            shapes["down_bias"] = (experts, hidden)
        for name, shape in shapes.items():
            room = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(room, requires_grad=False))
        self.register_buffer(
            "group_of_expert", torch.zeros(experts, dtype=torch.long, device=device)
        )

    def compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the routed experts' output, summed over devices; see ``FusedExperts``."""
        tokens, top_k = top_k_index.shape
        expert_N = top_k_index.reshape(-1).long()
        hidden = hidden_states.shape[1]
        group_N = self.group_of_expert[expert_N]
        by_group = assign(group_N, len(self.gate_up), tokens, hidden)
        by_expert = assign(expert_N, self.num_experts, tokens, hidden)
        h_Nf = product(hidden_states, self.gate_up, by_group)
        if hasattr(self, "scale"):
            h_Nf = h_Nf * self.scale[expert_N]
        if hasattr(self, "gate_up_a"):
            inner_NR = product(hidden_states, self.gate_up_a, by_expert)
            h_Nf = h_Nf + product(inner_NR, self.gate_up_b, by_expert)
        if hasattr(self, "bias"):
            h_Nf = h_Nf + self.bias[expert_N]
        gate_Nf, up_Nf = h_Nf.chunk(2, dim=-1)
        z_Nf = (self.gating(gate_Nf, up_Nf) * top_k_weights.reshape(-1, 1)).to(h_Nf.dtype)
        y_ND = product(z_Nf, self.down, by_group)
        if hasattr(self, "down_a"):
            y_ND = y_ND + product(product(z_Nf, self.down_a, by_expert), self.down_b, by_expert)
        # Devices' outputs are summed, so that one alone adds what no neuron is part of.
        if hasattr(self, "down_bias") and self.rank == 0:
            weight_N1 = top_k_weights.reshape(-1, 1)
            y_ND = y_ND + (self.down_bias[expert_N] * weight_N1).to(y_ND.dtype)
        y_TD = y_ND.view(tokens, top_k, hidden).sum(1, dtype=torch.float32)
        return self.sum_over_devices(y_TD.to(hidden_states.dtype))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take in this device's share of a ``FusedExperts``' tensors; return whose they are."""
        loaded = set()
        for name, tensor in weights:
            target, place = self._place(name)
            with torch.no_grad():
                place.copy_(self._share(target, tensor))
            loaded.add(target)
        return loaded

    def _place(self, name: str) -> tuple[str, Tensor]:
        """Return the tensor that a checkpoint's ``name`` goes to, and where in it."""
        parts = name.split(".")
        if parts[0] == "bases":
            target = parts[2].removesuffix("_proj")
            return target, self.get_parameter(target)[int(parts[1])]
        return parts[-1], getattr(self, parts[-1])

    def _share(self, target: str, tensor: Tensor) -> Tensor:
        if target in ("down", "down_a"):
            return tensor.chunk(self.devices, -1)[self.rank]
        if target in ("gate_up", "gate_up_b", "scale", "bias"):
            # Gate and up lie one after the other on this axis, and each is split.
            axis = 0 if target == "gate_up" else 1
            halves = tensor.chunk(2, axis)
            return torch.cat([half.chunk(self.devices, axis)[self.rank] for half in halves], axis)
        return tensor


def put_served_experts(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
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
                )
                setattr(parent, name, share)
