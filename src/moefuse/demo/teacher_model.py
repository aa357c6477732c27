"""The teachers' models: their configurations, the forward pass that trains them, their export.

A model is a Transformers `DeepseekV2ForCausalLM` or `Qwen3MoeForCausalLM`; `ARCHITECTURES` says in
what they differ. Training runs the forward pass written here over the model's parameters, because
it needs the router's probabilities for the load-balancing loss and a batched expert product that
compiles; a test holds the two forward passes equal.

Layers are typed Any: to a type checker every attribute of an nn.Module is Tensor or Module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GenerationConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moefuse.demo.teacher_data import VOCAB_SIZE

# --- the configurations -----------------------------------------------------------------------


def deepseek_v2_config(**changes: Any) -> DeepseekV2Config:
    """The DeepSeek-V2 teacher's configuration; tests shrink it through `changes`."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 160,
        "intermediate_size": 512,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 6,
        "first_k_dense_replace": 1,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "max_position_embeddings": 2048,
    }
    return DeepseekV2Config(
        **(shape | changes),
        norm_topk_prob=False,
        topk_method="greedy",
        scoring_func="softmax",  # pyright: ignore[reportCallIssue] (unlisted, but kept)
        # Six softmax weights of 64 sum to about 0.4; this brings the routed output near that of
        # the shared experts.
        routed_scaling_factor=2.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=0.04,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def qwen3_moe_config(**changes: Any) -> Qwen3MoeConfig:
    """The Qwen3-MoE teacher's configuration; tests shrink it through `changes`."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "intermediate_size": 512,  # of no layer, since every layer has experts
        "moe_intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 2048,
    }
    return Qwen3MoeConfig(
        **(shape | changes),
        norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


# --- the forward pass -------------------------------------------------------------------------

Attend = Callable[[Any, Tensor, Tensor], Tensor]
Weigh = Callable[[Any, Tensor], Tensor]


class GatherRows(torch.autograd.Function):
    """Row i of the result is row `order[i] // repeat` of x; `order` is a permutation.

    The gradient is a gather and a sum over the repeats, not a scatter with atomics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, repeat: int) -> Tensor:
        """x: [rows, width]; order, inverse: int64 [rows * repeat], each other's inverse."""
        ctx.save_for_backward(inverse)
        ctx.repeat = repeat
        return x[order // repeat]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of x: [rows, width]."""
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse].unflatten(0, (-1, ctx.repeat)).sum(1), None, None, None


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """RMS norm over the last dimension, computed in fp32 and returned in x's dtype."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), norm.weight.float(), norm.variance_epsilon)
    return normed.to(x.dtype)


def linear(layer: Any, x: Tensor) -> Tensor:
    """Product with a linear layer's weight, in x's dtype (the weight is kept in fp32)."""
    return F.linear(x, layer.weight.to(x.dtype))


def rotary_tables(config: Any, length: int, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary embedding, fp32 [2, length, rotated dims / 2]."""
    # DeepSeek-V2's head_dim is qk_rope_head_dim in Transformers.
    dim = config.head_dim
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    angles = torch.outer(
        torch.arange(length, device=device, dtype=torch.float32),
        config.rope_parameters["rope_theta"] ** -exponents,
    )
    return torch.stack([angles.cos(), angles.sin()])


def rotate_neighbours(x: Tensor, tables: Tensor) -> Tensor:
    """Rotary embedding of the pairs (0, 1), (2, 3), ... x: [batch, heads, length, dim]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = tables[0], tables[1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, tables: Tensor) -> Tensor:
    """Rotary embedding of the pairs (i, i + dim / 2). x: [batch, heads, length, dim]."""
    first, second = x.float().chunk(2, -1)
    cos, sin = tables[0], tables[1]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


def latent_attention(attn: Any, x: Tensor, tables: Tensor) -> Tensor:
    """Multi-head latent attention (DeepSeek-V2), causal. x: [batch, length, hidden]."""
    batch, length, _ = x.shape
    nope, rope, value = attn.qk_nope_head_dim, attn.qk_rope_head_dim, attn.v_head_dim
    q = linear(attn.q_proj, x).view(batch, length, -1, nope + rope).transpose(1, 2)
    q_nope, q_rope = q.split([nope, rope], -1)
    latent, k_rope = linear(attn.kv_a_proj_with_mqa, x).split([attn.kv_lora_rank, rope], -1)
    kv = linear(attn.kv_b_proj, rms_norm(attn.kv_a_layernorm, latent))
    kv = kv.view(batch, length, -1, nope + value).transpose(1, 2)
    k_nope, v = kv.split([nope, value], -1)
    k_rope = rotate_neighbours(k_rope[:, None], tables).expand(-1, k_nope.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(
        torch.cat([q_nope, rotate_neighbours(q_rope, tables)], -1),
        torch.cat([k_nope, k_rope], -1),
        v,
        is_causal=True,
        scale=attn.scaling,
    )
    return linear(attn.o_proj, out.transpose(1, 2).reshape(batch, length, -1))


def grouped_query_attention(attn: Any, x: Tensor, tables: Tensor) -> Tensor:
    """Grouped-query attention with normalised queries and keys (Qwen3), causal.

    x: [batch, length, hidden].
    """
    batch, length, _ = x.shape
    q, k, v = (
        linear(layer, x).view(batch, length, -1, attn.head_dim)
        for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    q = rotate_halves(rms_norm(attn.q_norm, q).transpose(1, 2), tables)
    k = rotate_halves(rms_norm(attn.k_norm, k).transpose(1, 2), tables)
    # Repeated here, so that any attention kernel will do: not all take fewer keys than queries.
    k, v = (
        heads[:, :, None].expand(-1, -1, attn.num_key_value_groups, -1, -1).flatten(1, 2)
        for heads in (k, v.transpose(1, 2))
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attn.scaling)
    return linear(attn.o_proj, out.transpose(1, 2).reshape(batch, length, -1))


def mlp(block: Any, x: Tensor) -> Tensor:
    """Gated MLP, any leading dimensions."""
    return linear(block.down_proj, F.silu(linear(block.gate_proj, x)) * linear(block.up_proj, x))


@torch.compiler.disable
def routed_experts(experts: Any, x: Tensor, index: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Weighted sum of each token's experts, by one grouped product over tokens sorted by expert.

    x: [tokens, hidden]; index: int64 [tokens, k]; weight: [tokens, k] in x's dtype; ends: int32
    [experts], how many choices fell on this expert and those before it.

    Not compiled: on an H200, torch 2.11's compiled backward of this function gave gradients
    wrong by factors of thousands where eager ones were right.
    """
    tokens, k = index.shape
    order = index.flatten().argsort()
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=x.device))
    rows = GatherRows.apply(x, order, inverse, k)
    gate_up = experts.gate_up_proj.to(x.dtype).transpose(1, 2)
    gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, -1)
    down = experts.down_proj.to(x.dtype).transpose(1, 2)
    rows = F.grouped_mm(F.silu(gate) * up, down, offs=ends)
    rows = GatherRows.apply(rows, inverse, order, 1)
    return (rows.view(tokens, k, -1) * weight[..., None]).sum(1)


def scaled_weights(gate: Any, weight: Tensor) -> Tensor:
    """The chosen experts' probabilities [tokens, k], times the router's factor (DeepSeek-V2)."""
    return weight * gate.routed_scaling_factor


def normalised_weights(_gate: Any, weight: Tensor) -> Tensor:
    """The chosen experts' probabilities [tokens, k], scaled to sum to 1 (Qwen3)."""
    return weight / weight.sum(-1, keepdim=True)


def moe(block: Any, x: Tensor, weigh: Weigh) -> tuple[Tensor, Tensor, Tensor]:
    """Mixture-of-experts layer. x: [batch, length, hidden].

    Returns the output, the load-balancing loss (1 when even; fp32 scalar), and the share of
    expert choices that fell on each expert (fp32 [experts], sums to 1).
    """
    flat = x.flatten(0, 1)
    gate = block.gate
    probabilities = F.linear(flat.float(), gate.weight.float()).softmax(-1)
    weight, index = probabilities.topk(gate.top_k, dim=-1)
    weight = weigh(gate, weight).to(x.dtype)
    counts = F.one_hot(index, gate.num_experts).sum((0, 1))
    share = counts.float() / index.numel()
    balance = gate.num_experts * (share * probabilities.mean(0)).sum()
    ends = counts.cumsum(0).to(torch.int32)
    out = routed_experts(block.experts, flat, index, weight, ends).view_as(x)  # pyright: ignore[reportCallIssue]
    if hasattr(block, "shared_experts"):
        out = out + mlp(block.shared_experts, x)
    return out, balance, share


def dense_layer(layer: Any, x: Tensor, tables: Tensor, dropout: float, attend: Attend) -> Tensor:
    """Decoder layer with an ordinary MLP. x: [batch, length, hidden]."""
    x = x + F.dropout(attend(layer.self_attn, rms_norm(layer.input_layernorm, x), tables), dropout)
    return x + F.dropout(mlp(layer.mlp, rms_norm(layer.post_attention_layernorm, x)), dropout)


def moe_layer(
    layer: Any, x: Tensor, tables: Tensor, dropout: float, attend: Attend, weigh: Weigh
) -> tuple[Tensor, Tensor, Tensor]:
    """Decoder layer with experts; also returns `moe`'s balance loss and expert shares."""
    x = x + F.dropout(attend(layer.self_attn, rms_norm(layer.input_layernorm, x), tables), dropout)
    out, balance, share = moe(layer.mlp, rms_norm(layer.post_attention_layernorm, x), weigh)
    return x + F.dropout(out, dropout), balance, share


def head_loss(model: Any, x: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats. x: [batch, length, hidden]; targets: int64 [batch, length]."""
    logits = linear(model.lm_head, rms_norm(model.model.norm, x))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# --- the architectures ------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """In what one teacher differs from another."""

    config: Callable[..., Any]
    causal_lm: Callable[[Any], Any]
    attend: Attend
    weigh: Weigh
    shard_size: str  # the largest weight file


ARCHITECTURES = {
    "deepseek_v2": Architecture(
        config=deepseek_v2_config,
        causal_lm=DeepseekV2ForCausalLM,
        attend=latent_attention,
        weigh=scaled_weights,
        shard_size="9MB",
    ),
    "qwen3_moe": Architecture(
        config=qwen3_moe_config,
        causal_lm=Qwen3MoeForCausalLM,
        attend=grouped_query_attention,
        weigh=normalised_weights,
        shard_size="15MB",
    ),
}  # by Transformers' model_type


def save_checkpoint(trained: Any, folder: Path) -> None:
    """Write the model as a bf16 Hugging Face checkpoint."""
    architecture = ARCHITECTURES[trained.config.model_type]
    model = architecture.causal_lm(trained.config).bfloat16()
    model.load_state_dict(trained.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder, max_shard_size=architecture.shard_size)


# --- the training loss ------------------------------------------------------------------------


class Objective:
    """The training loss of a model; its parts are compiled once each when `compiled` is set.

    Compiling the layer rather than the model lets all layers of a kind share one compilation.
    """

    def __init__(self, model: Any, dtype: torch.dtype, compiled: bool) -> None:
        wrap: Callable[..., Any] = torch.compile if compiled else lambda function: function
        if compiled:  # one graph for each dropout rate, not one with the rate as an input
            torch._dynamo.config.specialize_float = True
        self.model, self.dtype = model, dtype
        self.architecture = ARCHITECTURES[model.config.model_type]
        self.dense_layer, self.moe_layer = wrap(dense_layer), wrap(moe_layer)
        self.head_loss = wrap(head_loss)

    def __call__(self, rows: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of token rows [batch, length + 1].

        Returns cross-entropy (nats), the summed balance loss of the layers, and the share of each
        expert in each sparse layer [layers, experts].
        """
        model, parts = self.model.model, self.architecture
        ids, targets = rows[:, :-1], rows[:, 1:]
        tables = rotary_tables(self.model.config, ids.shape[1], ids.device)
        x = F.embedding(ids, model.embed_tokens.weight).to(self.dtype)
        balances, shares = [], []
        for layer in model.layers:
            if hasattr(layer.mlp, "experts"):
                x, balance, share = self.moe_layer(
                    layer, x, tables, dropout, parts.attend, parts.weigh
                )
                balances.append(balance)
                shares.append(share)
            else:
                x = self.dense_layer(layer, x, tables, dropout, parts.attend)
        loss = self.head_loss(self.model, x, targets)
        return loss, torch.stack(balances).sum(), torch.stack(shares)

    @torch.no_grad()
    def heldout(self, rows: Tensor, size: int) -> tuple[float, Tensor]:
        """Cross-entropy (nats) and expert shares [layers, experts] of rows, `size` at a time."""
        chunks = [chunk for chunk in rows.split(size) if len(chunk) == size]
        results = [self(chunk) for chunk in chunks]
        loss = torch.stack([r[0] for r in results]).mean().item()
        return loss, torch.stack([r[2] for r in results]).mean(0)
