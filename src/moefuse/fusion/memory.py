"""Memory: what running a model takes besides its weights, and which student then fits a device.

All is counted from the configuration; nothing is measured. Symbols: S tokens of a sequence (the
context), B sequences, T tokens of one prefill step, K of E experts chosen per token, D hidden
width, F expert width, V vocabulary, b bytes of one number.

- **Cache.** b times B times the sum over layers of (tokens kept) times (numbers kept per token).
  Grouped-query attention keeps 2 x key-value heads x head width numbers. Latent attention keeps
  kv_lora_rank + qk_rope_head_dim, in vLLM and in Transformers alike (Transformers cached expanded
  keys and values until its pull request 47761 of August 2026). A sliding window of W keeps at most
  W - 1 tokens in Transformers, and W - 1 + T in vLLM while a prompt is read. vLLM hands the cache
  out in blocks.
- **Activations.** The residual stream and its normalisation in fp32, T D (4 b + 8), plus the
  largest of three, which never live at the same time:
  the last positions' logits with their fp32 copy and probabilities, B V (b + 8);
  the fused experts' rows, T K (b (4 D + 8 F) + 4 D), inputs and outputs of bases and of deltas,
  gate and up of both, and outputs in fp32, with the indices of routing, T (64 K + 16 E);
  attention: queries and keys before, while and after positions go in, values and output, with
  what the engine makes of one layer's context (:func:`_context_bytes`). The T x S scores of a head
  are never written out, which holds for the fused kernels of GPUs, not for every CPU's.
- **Runtime.** A constant: the CUDA context with its kernels, the matrix library's workspaces, and
  what the allocator cannot hand out again; in vLLM CUDA graphs besides.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from moefuse.config import FactorConfig, SizeConfig
from moefuse.errors import UserError
from moefuse.families import Family, MoeShape
from moefuse.families.base import AttentionShape, require
from moefuse.fusion.plan import Teacher, make_plan
from moefuse.fusion.plan_neurons import least_bytes, uses_neurons
from moefuse.sizes import Plan

PREFILL_TOKENS = 2048
"""Tokens of a prompt that are read at once: ``prefill_chunk_size`` in Transformers, of every
sequence; ``max_num_batched_tokens`` in vLLM, of all together."""
BLOCK_TOKENS = 16
"""Tokens in a block of vLLM's cache, its default on GPUs."""
EXPANDED_TOKENS = 65_536
"""Most tokens of latent context that vLLM expands at once, its workspace's limit."""
RUNTIME_BYTES = {"transformers": 1_000_000_000, "vllm": 2_000_000_000}
"""Assumed, not measured: about 0.5 GB of CUDA context and kernels and as much for workspaces and
fragments; vLLM's CUDA graphs take up to 1 GB more."""


@dataclass(frozen=True)
class Serving:
    """How a model is run: ``batch`` sequences of ``context`` tokens, ``itemsize`` bytes a number
    of cache and activations, ``prefill`` tokens of a prompt at once."""

    context: int
    batch: int
    engine: str
    itemsize: int
    prefill: int = PREFILL_TOKENS

    @property
    def step_tokens(self) -> int:
        """Tokens of one prefill step, of all sequences together."""
        if self.engine == "vllm":
            return min(self.prefill, self.batch * self.context)
        return self.batch * min(self.prefill, self.context)


@dataclass(frozen=True)
class Needs:
    """What running a model takes besides its weights, in bytes."""

    cache: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.cache + self.activations + self.runtime


@dataclass(frozen=True)
class Memory:
    """What running a model takes, in bytes; ``vram`` and ``free`` are None without a device."""

    vram: int | None
    weights: int
    cache: int
    activations: int
    runtime: int
    free: int | None

    @property
    def total(self) -> int:
        """All that is taken."""
        return self.weights + self.cache + self.activations + self.runtime

    def to_json(self) -> dict[str, int | None]:
        """Return plain JSON values."""
        return asdict(self)


def memory_of(weights: int, needs: Needs, vram: int | None) -> Memory:
    """Put together what a model with ``weights`` bytes takes on a device of ``vram`` bytes."""
    free = None if vram is None else vram - weights - needs.total
    return Memory(vram, weights, needs.cache, needs.activations, needs.runtime, free)


def running_needs(config: Mapping[str, Any], family: Family, serving: Serving) -> Needs:
    """Count what running a model of ``config`` takes besides its weights.

    Raises ``UserError`` for a configuration without the sizes of its attention or vocabulary.
    """
    attention = family.attention(config)
    windows = tuple(family.window(config, layer) for layer in range(family.layer_count(config)))
    vocabulary = require(config, "vocab_size")
    return Needs(
        cache=cache_bytes(attention, windows, serving),
        activations=activation_bytes(family.shape(config), attention, windows, vocabulary, serving),
        runtime=RUNTIME_BYTES[serving.engine],
    )


def cache_bytes(
    attention: AttentionShape, windows: tuple[int | None, ...], serving: Serving
) -> int:
    """Count the bytes of the key-value cache of all sequences at full context.

    ``windows`` holds every layer's sliding window in tokens, None where there is none.
    """
    tokens = sum(_kept_tokens(window, serving) for window in windows)
    return serving.batch * tokens * attention.cached * serving.itemsize


def _kept_tokens(window: int | None, serving: Serving) -> int:
    """Return how many tokens of a sequence one layer's cache has room for."""
    if serving.engine == "vllm":
        reach = _reach(window, serving)
        # A window seldom begins where a block does, which costs one block more.
        blocks = ceil(reach / BLOCK_TOKENS) + (window is not None)
        return blocks * BLOCK_TOKENS
    return serving.context if window is None else min(serving.context, window - 1)


def _reach(window: int | None, serving: Serving) -> int:
    """Return how many tokens of a sequence a prefill step attends to in one layer."""
    if window is None:
        return serving.context
    return min(serving.context, window - 1 + serving.prefill)


def activation_bytes(
    shape: MoeShape,
    attention: AttentionShape,
    windows: tuple[int | None, ...],
    vocabulary: int,
    serving: Serving,
) -> int:
    """Estimate the most bytes of activations that live at once in a prefill step.

    For the formula see the module; ``vocabulary`` is the number of logits of a position.
    """
    size, tokens = serving.itemsize, serving.step_tokens
    stream = tokens * shape.hidden * (4 * size + 8)
    logits = serving.batch * vocabulary * (size + 8)
    row = size * (4 * shape.hidden + 8 * shape.intermediate) + 4 * shape.hidden
    routing = 64 * shape.top_k + 16 * shape.experts
    experts = tokens * (shape.top_k * row + routing)
    per_head = 6 * attention.key_width + 3 * attention.value_width
    attending = tokens * attention.heads * per_head * size
    reach = max(_reach(window, serving) for window in windows)
    return stream + max(logits, experts, attending + _context_bytes(attention, reach, serving))


def _context_bytes(attention: AttentionShape, reach: int, serving: Serving) -> int:
    """Count what an engine makes of one layer's ``reach`` tokens of context while it attends.

    Transformers appends to the cache by copying it, repeats keys and values for all heads where
    there is a mask, and keeps the mask as one byte and once more as numbers. vLLM attends to its
    blocks in place. Both expand latents.
    """
    tokens = serving.batch * reach
    if serving.engine == "vllm":
        expanded = attention.cached + attention.expanded if attention.expanded else 0
        return min(tokens, EXPANDED_TOKENS) * expanded * serving.itemsize
    grouped = attention.key_value_heads < attention.heads
    repeated = attention.heads * (attention.key_width + attention.value_width) if grouped else 0
    mask = tokens * min(serving.prefill, serving.context) * (1 + serving.itemsize)
    numbers = attention.cached + attention.expanded + repeated
    return tokens * numbers * serving.itemsize + mask


def fit_to_memory(
    teacher: Teacher, vram: int, needs: Needs, size: SizeConfig, factor: FactorConfig
) -> Plan | None:
    """Plan the largest student that runs on a device of ``vram`` bytes beside its ``needs``.

    ``size`` may fix the groups or the rank, but is no budget itself. Returns None where the unfused
    teacher fits as it is. Raises ``UserError`` where not even the smallest student does.
    """
    room = vram - needs.total
    least = smallest_bytes(teacher, size, factor)
    if teacher.bytes <= room:
        return None
    if least > room:
        raise UserError(_too_small(teacher, least, vram, needs))
    return make_plan(teacher, replace(size, bytes=str(room)), factor)


def smallest_bytes(teacher: Teacher, size: SizeConfig, factor: FactorConfig) -> int:
    """Return the bytes within which some student fits, as far as ``size`` leaves the choice.

    The smallest has the fewest own neurons, or one group and rank 0.
    """
    if uses_neurons(replace(size, bytes="1")):
        return teacher.outside_bytes + least_bytes(teacher.shape, size, teacher.itemsize)
    least = replace(size, groups=size.groups or 1, rank=size.rank or 0)
    return make_plan(teacher, least, factor).bytes


def _too_small(teacher: Teacher, smallest: int, vram: int, needs: Needs) -> str:
    parts = {
        "weights outside the routed experts take": teacher.outside_bytes,
        "the smallest fused experts": smallest - teacher.outside_bytes,
        "the key-value cache": needs.cache,
        "activations": needs.activations,
        "the runtime": needs.runtime,
    }
    told = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items())
    return (
        f"--vram is {_gigabytes(vram)}, but {_gigabytes(smallest + needs.total)} are needed "
        f"at least: {told}; take a larger device, a shorter --context or a smaller --batch."
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f} GB"
