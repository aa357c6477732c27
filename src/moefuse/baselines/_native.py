"""Students made of ordinary experts, fewer than the teacher's: kept ones or merged ones."""

import copy

import torch
from torch import Tensor, nn

from moefuse.baselines import Layer
from moefuse.checkpoint.native import to_native
from moefuse.mathematics.experts import ExpertBiases


class MergedExperts(nn.Module):
    """Native experts that several of the teacher's experts share; the router stays as it is."""

    merged_of_expert: Tensor

    def __init__(self, native: nn.Module, merged_of_expert: Tensor) -> None:
        super().__init__()
        self.native = native
        self.register_buffer("merged_of_expert", merged_of_expert)

    def active_parameters(self, top_k: int) -> int:
        """Return the most routed numbers that one token passes: ``top_k`` merged experts."""
        return native_active(self.native, top_k)

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the routed output, (T, D)."""
        return self.native(x_TD, self.merged_of_expert[index_TK], weight_TK)


class _Nothing(nn.Module):
    """Stands in for shared experts while only the routed output is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class KeptExperts(nn.Module):
    """A native MoE block with fewer experts: its router chooses among those that were kept.

    It ignores the teacher's choice. ``block`` is the whole native block, shared experts and all;
    only the routed part of its output is returned.
    """

    def __init__(self, block: nn.Module, shared_names: list[str], experts_name: str) -> None:
        super().__init__()
        self.routed = block
        self.shared_names = shared_names
        self.experts_name = experts_name
        for name in shared_names:
            setattr(block, name, _Nothing())

    def active_parameters(self, top_k: int) -> int:
        """Return the most routed numbers that one token passes: ``top_k`` kept experts."""
        return native_active(self.routed.get_submodule(self.experts_name), top_k)

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:  # noqa: ARG002
        """Return the routed output, (T, D)."""
        output = self.routed(x_TD.unsqueeze(0))
        return (output[0] if isinstance(output, tuple) else output).reshape(x_TD.shape)

    def put_experts(self, experts: nn.Module) -> None:
        """Let the block call ``experts`` in the place of those it has."""
        setattr(self.routed, self.experts_name, experts)

    def block_like(self, block: nn.Module) -> nn.Module:
        """Return the whole native block with the shared experts of ``block`` put back."""
        whole = copy.copy(self.routed)
        whole._modules = dict(self.routed._modules)
        for name in self.shared_names:
            setattr(whole, name, getattr(block, name))
        return whole


def native_active(native: nn.Module, top_k: int) -> int:
    """Return the numbers of at most ``top_k`` experts of a native experts module."""
    return sum(min(top_k, len(one)) * one[0].numel() for one in native.parameters())


def native_experts(
    layer: Layer, rows: Tensor, down: Tensor, down_bias: Tensor | None = None
) -> nn.Module:
    """Make a native experts module of k experts.

    ``rows`` are as ``Experts.rows_EFD`` (k, 2F, D or one more), ``down`` is (k, D, F) and
    ``down_bias`` (k, D) where experts have biases.
    """
    hidden = down.shape[1]
    biases = None
    if down_bias is not None:
        biases = ExpertBiases(rows[..., hidden], down_bias)
    native = layer.block.get_submodule(layer.family.experts_name)
    made = type(native)(_config_with(layer, len(rows)))
    parameters = to_native((rows[..., :hidden], down, biases), layer.family.layout)
    for name, tensor in parameters.items():
        made.get_parameter(name).data = tensor.clone()
    return made


def kept_experts(layer: Layer, kept: Tensor) -> KeptExperts:
    """Prune: keep the experts ``kept`` (k,) and their rows of the router."""
    family, experts = layer.family, len(layer.experts.gate_up_EFD)
    block = type(layer.block)(_config_with(layer, len(kept)))
    router = f"{family.router_name}."
    state = {}
    for name, tensor in layer.block.state_dict().items():
        is_expert = name.startswith((router, f"{family.experts_name}."))
        state[name] = of_experts(tensor, kept, experts) if is_expert else tensor
    block.load_state_dict(state, assign=True)
    # Some routers are random while they train; a student is made for how it is used.
    block.requires_grad_(False).eval()
    block.get_submodule(family.experts_name).requires_grad_(True)
    shared = [name for name, child in block.named_children() if _is_shared(layer, name, child)]
    return KeptExperts(block, shared, family.experts_name)


def of_experts(tensor: Tensor, kept: Tensor, experts: int) -> Tensor:
    """Return the entries of the experts ``kept`` (k,), which lie along the first axis of E entries.

    A tensor without such an axis belongs to no expert and is returned as it is.
    """
    if experts not in tensor.shape:
        return tensor
    return tensor.index_select(tensor.shape.index(experts), kept.to(tensor.device))


def _is_shared(layer: Layer, name: str, child: nn.Module) -> bool:
    return name.startswith(layer.family.shared_prefix) and not isinstance(child, nn.Linear)


def _config_with(layer: Layer, experts: int) -> object:
    config = copy.deepcopy(layer.config)
    setattr(config, layer.family.experts_count_key, experts)
    config.num_experts_per_tok = min(layer.call.index_TK.shape[1], experts)
    if experts < len(layer.experts.gate_up_EFD) and getattr(config, "n_group", None):
        # Routers that choose among equal groups first: pruned, the groups have lost their borders.
        config.n_group = config.topk_group = 1
    return config
