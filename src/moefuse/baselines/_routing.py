"""What a layer's own router makes of some tokens, and what it would choose with experts left out.

Shape suffixes: T tokens, D hidden width, E experts, k experts kept, K experts chosen per token.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moefuse.baselines import Layer, TooSmallError
from moefuse.baselines._native import _config_with, of_experts
from moefuse.mathematics.experts import ExpertsCall


def spread(call: ExpertsCall, tokens: int) -> ExpertsCall:
    """Return at most ``tokens`` of a call's tokens, evenly spaced over all of them."""
    total = len(call.x_TD)
    if total <= tokens:
        return call
    return call.rows(torch.arange(tokens, device=call.x_TD.device) * total // tokens)


def router_logits(layer: Layer, x_TD: Tensor) -> Tensor:
    """Return the router's logits of every expert, (T, E) fp32; ``x_TD`` (T, D) fp32."""
    return _returned(layer, _native_router(layer)(x_TD))["logits"].float()


def all_gates(layer: Layer, logits_TE: Tensor) -> Tensor:
    """Return the routing weights of every expert as if each token chose all, (T, E) fp32.

    They are what the family makes of the logits: a softmax, or sigmoids divided by their sum. Where
    its router cannot choose more than two, the others get nothing.
    """
    experts = logits_TE.shape[1]
    config = _config_for(layer, experts)
    config.num_experts_per_tok = experts
    if getattr(config, "n_group", None):
        config.n_group = config.topk_group = 1
    router = _router_of_logits(layer, config, torch.arange(experts, device=logits_TE.device))
    returned = _returned(layer, router(logits_TE))
    return torch.zeros_like(logits_TE).scatter_(1, returned["index"], returned["weights"].float())


def choose_among(layer: Layer, logits_TE: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Route tokens among the experts ``kept`` (k,) alone, as a block pruned to them does.

    Returns the chosen experts, numbered as in the whole layer, and their weights: (T, min(K, k))
    int64 and fp32. ``logits_TE`` (T, E) fp32 is what ``router_logits`` gave, ``kept`` is on its
    device.
    """
    router = _router_of_logits(layer, _config_for(layer, len(kept)), kept)
    returned = _returned(layer, router(logits_TE[:, kept]))
    return kept[returned["index"]], returned["weights"].float()


def routable_within(layer: Layer, numbers: int) -> int:
    """Return how many whole experts ``numbers`` numbers hold.

    Raises ``TooSmallError`` where they hold none, or fewer than the family's router can choose
    among: DeepSeek-V3's adds the best two scores of each group and so needs two, as Phi-3.5-MoE's,
    which chooses one after the other.
    """
    experts = layer.experts_within(numbers)
    one = torch.zeros(1, len(layer.experts.gate_up_EFD), device=layer.experts.gate_up_EFD.device)
    try:
        _, weight_TK = choose_among(layer, one, torch.arange(experts, device=one.device))
    except RuntimeError:
        weight_TK = one.new_full((), torch.nan)
    if not weight_TK.isfinite().all():
        raise TooSmallError(f"The router cannot choose among {experts} experts alone.")
    return experts


def _returned(layer: Layer, returned: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return what a router gave by what it is: ``logits``, ``weights`` and ``index``."""
    return dict(zip(layer.family.router_returns, returned, strict=True))


def _native_router(layer: Layer) -> nn.Module:
    # In fp32, as students are run, whatever the teacher is stored in.
    return copy.deepcopy(layer.block.get_submodule(layer.family.router_name)).float().eval()


def _config_for(layer: Layer, experts: int) -> Any:
    config: Any = _config_with(layer, experts)
    config.hidden_size = experts
    return config


def _router_of_logits(layer: Layer, config: Any, kept: Tensor) -> nn.Module:
    """Make a native router whose input is the logits of the experts ``kept`` (k,).

    An identity in the place of its weight leaves all that follows the logits, where families
    differ, to the native code, and spares each trial the product with the weight.
    """
    native = layer.block.get_submodule(layer.family.router_name)
    experts = len(layer.experts.gate_up_EFD)
    state = {
        name: of_experts(tensor.float(), kept, experts)
        for name, tensor in native.state_dict().items()
    }
    state[layer.family.router_weight] = torch.eye(len(kept), device=kept.device)
    if layer.family.router_bias is not None:  # it is in the logits already
        state[layer.family.router_bias] = torch.zeros(len(kept), device=kept.device)
    router = type(native)(config)
    router.load_state_dict(state, assign=True)
    return router.eval()
