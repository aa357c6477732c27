"""One MoE layer with as many experts as a fused one has groups, and a router of its own.

Where the fused layer gives every original expert its delta and the teacher's router chooses among
E, this one has G ordinary experts and a G-way router, as any engine of the family runs it. It
begins at what can be told in closed form: an expert is the mean of its group's members, weighed by
their routed mass; so is its router's row. Then the router learns the share that each group has of
a token, experts are scaled to what the groups weigh, and at last all learn together what the fused
layer returns (``distill_layer``).

Shape suffixes: T tokens, K experts chosen per token, E experts, G groups, D width, F neurons.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moefuse.checkpoint.native import Weights, to_native
from moefuse.distillation.loop import learning_rate_factor
from moefuse.families import Family
from moefuse.mathematics.experts import ExpertBiases, ExpertsCall
from moefuse.modeling.modeling_moefuse import weight_of_experts

ROUTER_RATE = 1e-2
WARMUP = 0.05


class _Nothing(nn.Module):
    """Stands in the place of shared experts, which stay as they are: adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class CollapsedLayer(nn.Module):
    """A family's own MoE block without shared experts, called like its experts module.

    ``block`` is the block of a model with G experts, on the meta device; it routes by itself, so
    that whatever chose among the teacher's experts is not looked at.
    """

    def __init__(self, block: nn.Module, family: Family) -> None:
        super().__init__()
        for name, _ in list(block.named_children()):
            if name.startswith(family.shared_prefix):
                setattr(block, name, _Nothing())
        self.block = block.eval()
        self.family = family

    @property
    def router(self) -> nn.Module:
        """The module that chooses experts."""
        return getattr(self.block, self.family.router_name)

    @property
    def experts(self) -> Any:
        """The native experts module, laid out as the family has it."""
        return getattr(self.block, self.family.experts_name)

    def forward(self, x_TD: Tensor, *_: Tensor) -> Tensor:
        """Return what the routed experts add, (T, D)."""
        returned = self.block(x_TD.unsqueeze(0))
        # Some blocks return what their router said behind it.
        y_1TD = returned[0] if isinstance(returned, tuple) else returned
        return y_1TD.squeeze(0)

    @contextmanager
    def listening(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Put in the place of the experts what only hears which are chosen, at what weight."""
        heard: list[tuple[Tensor, Tensor]] = []
        name, own = self.family.experts_name, self.experts
        setattr(self.block, name, _Listener(heard))
        try:
            yield heard
        finally:
            setattr(self.block, name, own)


class _Listener(nn.Module):
    def __init__(self, heard: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.heard = heard

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        self.heard.append((index_TK, weight_TK))
        return torch.zeros_like(x_TD)


def routed_mass(call: ExpertsCall, experts: int) -> Tensor:
    """Return the sum of the weights that every expert got, (E,) fp64."""
    mass_E = torch.zeros(experts, dtype=torch.float64, device=call.x_TD.device)
    return mass_E.index_add(0, call.index_TK.flatten().long(), call.weight_TK.flatten().double())


def folded(stacked_E: Tensor, group_E: Tensor, mass_E: Tensor) -> Tensor:
    """Return the mean of every group's members weighed by routed mass, (G, ...), in fp32.

    ``stacked_E`` (E, ...) is what each expert has, ``group_E`` (E,) its group. Members of a group
    that nothing was routed to count alike.
    """
    groups = int(group_E.max()) + 1
    total_G = torch.zeros_like(mass_E[:groups]).index_add(0, group_E, mass_E)
    weight_E = torch.where(total_G[group_E] > 0, mass_E, torch.ones_like(mass_E))
    total_G = torch.zeros_like(total_G).index_add(0, group_E, weight_E)
    share_E = (weight_E / total_G[group_E]).float().view(-1, *[1] * (stacked_E.ndim - 1))
    out_G = torch.zeros(groups, *stacked_E.shape[1:], device=stacked_E.device)
    for expert, group in enumerate(group_E.tolist()):  # one by one: a layer in fp32 is large
        out_G[group] += stacked_E[expert].float() * share_E[expert]
    return out_G


@torch.no_grad()
def begin(
    layer: CollapsedLayer,
    router: dict[str, Tensor],
    weights: Weights,
    group_E: Tensor,
    mass_E: Tensor,
) -> None:
    """Give a layer its first weights, fp32: what it folds out of E experts and their router.

    ``router`` is the state of the teacher's router by the names in its module. Its rows are
    folded, and biases of logits; a bias that only chooses begins at zero, because scores mean
    something else now.
    """
    gate_up_EFD, down_EDF, biases = weights
    device, family = gate_up_EFD.device, layer.family
    layer.block.to_empty(device=device).float()
    state = {key: torch.zeros_like(value) for key, value in layer.router.state_dict().items()}
    for name in (family.router_weight, family.router_bias):
        if name is not None:
            state[name] = folded(router[name].to(device), group_E, mass_E)
    layer.router.load_state_dict(state)
    if biases is not None:
        biases = ExpertBiases(
            folded(biases.gate_up_EF, group_E, mass_E), folded(biases.down_ED, group_E, mass_E)
        )
    gate_up_GFD, down_GDF = (folded(w, group_E, mass_E) for w in (gate_up_EFD, down_EDF))
    native = to_native((gate_up_GFD, down_GDF, biases), family.layout)
    for name, tensor in native.items():
        getattr(layer.experts, name).copy_(tensor)


def group_weights(index_TK: Tensor, weight_TK: Tensor, group_E: Tensor, groups: int) -> Tensor:
    """Return the weight that every group has of every token, (T, G)."""
    return weight_of_experts(group_E[index_TK.long()], weight_TK, groups)


def fit_router(
    layer: CollapsedLayer,
    call: ExpertsCall,
    group_E: Tensor,
    *,
    steps: int,
    batch_tokens: int,
    seed: int,
    progress: Callable[[range], Iterable[int]] = iter,
) -> None:
    """Let the router learn each group's share of a token, then scale experts to their weights.

    The share is a group's weight over all groups'; lessened is its squared error, by AdamW.
    Afterwards what expert g returns is multiplied by the best constant between what its
    router says and what the group weighs, ``sum c p / sum p p``.
    """
    groups = int(group_E.max()) + 1
    own_G = torch.arange(groups, device=group_E.device)
    generator = torch.Generator().manual_seed(seed)
    weights = [parameter for parameter in layer.router.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=ROUTER_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, WARMUP)
    )

    def told(part: ExpertsCall) -> tuple[Tensor, Tensor]:
        with layer.listening() as heard:
            layer(part.x_TD)
        said_TG = group_weights(*heard[0], own_G, groups)
        return said_TG, group_weights(part.index_TK, part.weight_TK, group_E, groups)

    for _ in progress(range(steps)):
        rows = torch.randint(len(call.x_TD), (batch_tokens,), generator=generator)
        shares = [c / c.sum(1, keepdim=True).clamp_min(1e-9) for c in told(call.rows(rows))]
        loss = (shares[0] - shares[1]).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        together = [told(call.rows(rows)) for rows in torch.arange(len(call.x_TD)).split(8192)]
        product_G = torch.stack([(said * wanted).sum(0) for said, wanted in together]).sum(0)
        square_G = torch.stack([said.square().sum(0) for said, _ in together]).sum(0)
        scale_G = torch.where(square_G > 0, product_G / square_G.clamp_min(1e-12), 1.0)
        layer.experts.down_proj.mul_(scale_G[:, None, None])
        if layer.family.layout.biased:
            layer.experts.down_proj_bias.mul_(scale_G[:, None])
