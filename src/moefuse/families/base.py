"""What moefuse has to know about a family of Mixture-of-Experts models, as data.

A family is a Transformers ``model_type`` together with the names its published checkpoints use and
the configuration keys its sizes are kept under. Everything else in moefuse asks a :class:`Family`
and never looks at ``model_type``. A new family is a new file in this folder with one instance named
``FAMILY``; the contract test builds a tiny model of it and compares names, shapes and weights.

Letters: D hidden width, F intermediate width of one routed expert, E routed experts of a layer,
K experts chosen per token.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moefuse.errors import UserError
from moefuse.families._gguf import Gguf

Config = Mapping[str, Any]


@dataclass(frozen=True)
class MoeShape:
    """The sizes of a model's routed experts."""

    layers: tuple[int, ...]
    """Indices of the decoder layers that have routed experts, ascending."""
    experts: int
    """E."""
    top_k: int
    """K."""
    shared_experts: int
    """Experts that every token passes; 0 where there are none."""
    hidden: int
    """D."""
    intermediate: int
    """F."""
    biased: bool = False
    """Whether an expert's gate, up and down projections have biases: 2F and D numbers more."""

    @property
    def expert_numbers(self) -> int:
        """How many numbers one routed expert has."""
        biases = 2 * self.intermediate + self.hidden if self.biased else 0
        return 3 * self.hidden * self.intermediate + biases

    @property
    def layer_numbers(self) -> int:
        """How many numbers all routed experts of one layer have."""
        return self.experts * self.expert_numbers


@dataclass(frozen=True)
class ExpertsLayout:
    """How Transformers' experts module lays out its parameters, and a stacked checkpoint too.

    Without any of these ``gate_up_proj`` is E x 2F x D, gate first, and ``down_proj`` E x D x F.
    """

    transposed: bool = False
    """``gate_up_proj`` is E x D x 2F and ``down_proj`` E x F x D."""
    interleaved: bool = False
    """Gate and up take turns: the first of gate, the first of up, the second of gate, ..."""
    biased: bool = False
    """There are ``gate_up_proj_bias``, E x 2F, and ``down_proj_bias``, E x D."""


@dataclass(frozen=True)
class ExpertNames:
    """The names of one routed expert's tensors in the published checkpoint."""

    gate: str
    """F x D."""
    up: str
    """F x D."""
    down: str
    """D x F."""


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of a model's attention; ``cached`` and ``expanded`` count numbers, not bytes."""

    heads: int
    """Heads of the queries."""
    key_value_heads: int
    """Heads of the keys and values that attention multiplies with."""
    key_width: int
    """Numbers in one head's key, and in its query."""
    value_width: int
    cached: int
    """Numbers that one layer keeps of one token in the key-value cache."""
    expanded: int = 0
    """Numbers that one layer makes of one cached token whenever it attends, and drops again."""


def require(config: Config, *keys: str) -> int:
    """Return the whole number under the first of ``keys`` that the configuration has.

    Raises ``UserError`` naming the keys when none is there or the value is no positive integer.
    """
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    wanted = " or ".join(repr(key) for key in keys)
    if value is None:
        raise UserError(
            f"config.json lacks the key {wanted}, which a {config.get('model_type')} model needs; "
            "take the configuration from the model's publisher."
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json has {value!r} under {wanted}; a positive integer is needed.")
    return value


def optional(config: Config, key: str, default: int) -> int:
    """Return the whole number under ``key``, or ``default`` where there is none or null.

    Raises ``UserError`` when the value is anything else or negative.
    """
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"config.json has {value!r} under {key!r}; a whole number is needed.")
    return value


def same_in_every_layer(config: Config, key: str) -> Config:
    """Return ``config`` with one number under ``key`` where there is a list of equal ones.

    Raises ``UserError`` when the list's values differ: experts differ in nothing but weights.
    """
    values = config.get(key)
    if not isinstance(values, list) or not values:
        return config
    if any(value != values[0] for value in values):
        raise UserError(
            f"config.json has different values for different layers under {key!r}; moefuse fuses "
            "only models whose layers with experts are all alike."
        )
    return {**config, key: values[0]}


def every_layer(config: Config, layer: int) -> bool:  # noqa: ARG001
    """Tell that every decoder layer has routed experts."""
    return True


def after_leading_dense(default: int) -> Callable[[Config, int], bool]:
    """Return the rule of models whose first ``first_k_dense_replace`` layers are dense."""

    def rule(config: Config, layer: int) -> bool:
        return layer >= optional(config, "first_k_dense_replace", default)

    return rule


def at_sparse_steps(config: Config, layer: int) -> bool:
    """Tell whether ``layer`` is sparse by ``decoder_sparse_step`` and ``mlp_only_layers``."""
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise UserError(f"config.json has {dense!r} under 'mlp_only_layers'; a list is needed.")
    step = optional(config, "decoder_sparse_step", 1) or 1
    return layer not in dense and (layer + 1) % step == 0


def no_shared_experts(config: Config) -> int:  # noqa: ARG001
    """Tell that no expert is shared."""
    return 0


def counted_shared_experts(config: Config) -> int:
    """Return the number under ``n_shared_experts``."""
    return optional(config, "n_shared_experts", 0)


def grouped_query_attention(config: Config) -> AttentionShape:
    """Read the attention of models that cache a key and a value for every key-value head.

    ``num_key_value_heads`` defaults to the query's heads and ``head_dim`` to an even split of the
    hidden width, as in Transformers (grouped-query attention, arXiv:2305.13245).
    """
    heads = require(config, "num_attention_heads")
    key_value_heads = optional(config, "num_key_value_heads", 0) or heads
    width = optional(config, "head_dim", 0) or require(config, "hidden_size") // heads
    return AttentionShape(heads, key_value_heads, width, width, cached=2 * key_value_heads * width)


def latent_attention(config: Config) -> AttentionShape:
    """Read DeepSeek's multi-head latent attention (arXiv:2405.04434, section 2.1).

    Cached are the latent of ``kv_lora_rank`` numbers and the one positional key of
    ``qk_rope_head_dim`` that all heads share. Whenever a layer attends, the latents of the whole
    context become every head's unpositioned key and value (one tensor) and its complete key.
    """
    heads = require(config, "num_attention_heads")
    unpositioned, rope, value, latent = (
        require(config, key)
        for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    return AttentionShape(
        heads,
        key_value_heads=heads,
        key_width=unpositioned + rope,
        value_width=value,
        cached=latent + rope,
        expanded=heads * (unpositioned + value + unpositioned + rope),
    )


def plain_gating(config: Config) -> dict[str, Any] | None:  # noqa: ARG001
    """Tell that neurons are ``act(gate) * up`` with the activation of Transformers' module."""
    return None


def unscaled(config: Config) -> float:  # noqa: ARG001
    """Tell that something is taken as it is."""
    return 1.0


def factor_under(key: str) -> Callable[[Config], float]:
    """Return what reads the positive number under ``key``, 1 where there is none.

    It raises ``UserError`` for anything else.
    """

    def factor(config: Config) -> float:
        value = config.get(key)
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise UserError(
                f"config.json has {value!r} under {key!r}; a positive number is needed."
            )
        return float(value)

    return factor


def no_window(config: Config, layer: int) -> int | None:  # noqa: ARG001
    """Tell that a layer attends to the whole context."""
    return None


def stated_window(config: Config, layer: int) -> int | None:  # noqa: ARG001
    """Return the ``sliding_window`` of models where it holds for every layer once it is given."""
    return optional(config, "sliding_window", 0) or None


def switched_window(config: Config, layer: int) -> int | None:
    """Return ``sliding_window`` where ``use_sliding_window`` turns it on, else None."""
    return stated_window(config, layer) if config.get("use_sliding_window") else None


def no_state(config: Config, layer: int) -> int:  # noqa: ARG001
    """Tell that a layer caches what it attends to, and nothing else."""
    return 0


def kind_of_layer(config: Config, layer: int) -> str | None:
    """Return what ``layer_types`` calls a layer, None where there is no such list.

    Raises ``UserError`` for anything but a list with an entry for every layer.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) <= layer:
        raise UserError(
            f"config.json has {kinds!r} under 'layer_types'; a list with an entry for every layer "
            "is needed."
        )
    return kinds[layer]


def is_linear(config: Config, layer: int, *, default: bool) -> bool:
    """Tell whether a layer has linear attention, by ``layer_types`` if there is one."""
    kind = kind_of_layer(config, layer)
    return default if kind is None else kind == "linear_attention"


def listed_window(config: Config, layer: int) -> int | None:
    """Return ``sliding_window`` of layers that ``layer_types`` calls sliding, by default every
    second one, beginning with the first."""
    kind = kind_of_layer(config, layer)
    slides = layer % 2 == 0 if kind is None else kind == "sliding_attention"
    return stated_window(config, layer) if slides else None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: its Transformers classes, its configuration keys and its tensor names."""

    model_type: str
    causal_lm: str
    """Name of the Transformers class with the language-model head."""
    base_model: str
    """Name of the Transformers class without it."""
    config_class: str
    experts_count_key: str
    """Configuration key that holds E in published checkpoints."""
    experts_count_aliases: tuple[str, ...] = ()
    """Other spellings of that key that Transformers writes or accepts."""
    top_k_key: str = "num_experts_per_tok"
    """Configuration key that holds K in published checkpoints."""
    intermediate_key: str = "moe_intermediate_size"
    has_experts: Callable[[Config, int], bool] = every_layer
    """Tells whether a layer has routed experts."""
    shared_experts: Callable[[Config], int] = no_shared_experts
    attention: Callable[[Config], AttentionShape] = grouped_query_attention
    """Reads the sizes of the attention."""
    window: Callable[[Config, int], int | None] = no_window
    """Tells how many last tokens a layer attends to, its own included; None: all of them."""
    state: Callable[[Config, int], int] = no_state
    """Tells how many numbers a layer with linear attention keeps of a sequence, however long it is,
    in the place of a cache; 0 for other layers."""
    layers_path: str = "model.layers"
    moe_name: str = "mlp"
    """Child of a decoder layer, in Transformers, that holds router and experts."""
    experts_name: str = "experts"
    layout: ExpertsLayout = ExpertsLayout()
    gating: Callable[[Config], dict[str, Any] | None] = plain_gating
    """Tells how gate and up make a neuron's value: a ``kind`` in ``modeling_moefuse.GATINGS`` with
    its arguments, or None for the plain one."""
    router_name: str = "gate"
    router_weight: str = "weight"
    """Parameter of the router, E x D, that makes logits."""
    router_bias: str | None = None
    """Parameter of the router, E, that is added to its logits, if there is one."""
    router_returns: tuple[str, str, str] = ("logits", "weights", "index")
    """In which order the router returns its logits, the routing weights and the chosen experts."""
    shared_prefix: str = "shared_expert"
    """How the names of the shared experts' modules in the MoE module start."""
    attention_names: tuple[str, ...] = ("self_attn",)
    """Children of a decoder layer, whichever it has, that mix tokens."""
    logit_scale: Callable[[Config], float] = unscaled
    """What the head's output is multiplied by."""
    experts_scale: Callable[[Config], float] = unscaled
    """What a decoder layer multiplies its MoE module's output by before it adds it."""
    writes_scores: bool = False
    """Whether Transformers has no fused attention for the family and holds all heads' scores."""
    one_piece_a_row: bool = False
    """Whether pieces of text cannot share a row: attention keeps a state from token to token, or
    Transformers' mask does not tell pieces apart."""
    disk_moe_name: str = "mlp"
    """What published checkpoints call ``moe_name``."""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """What published checkpoints call an expert's gate, up and down projections."""
    stacked: tuple[str, str] | None = None
    """What published checkpoints call the tensors, below ``disk_moe_name``, in which all experts'
    gate and up, and down, lie stacked as in ``layout``; None where every expert has its own."""
    rename: tuple[tuple[str, str], ...] = ()
    """Pairs (regular expression on a checkpoint's name, replacement) that give module names."""
    publish: tuple[tuple[str, str], ...] = ()
    """The same the other way: pairs on a module's name that give what published checkpoints say."""

    text_prefix: str | None = None
    """What names begin with instead of ``model.`` where the text model was published as a part of
    one that reads more than text; Transformers loads both."""
    unserved: str | None = None
    """Why vLLM does not serve the family's students; None where it does."""
    gguf: Gguf | None = None
    """How llama.cpp runs the family; None where no file for it is written."""

    unused: tuple[str, ...] = ()
    """How the names of published tensors start that Transformers does not load."""

    def shape(self, config: Config) -> MoeShape:
        """Read the sizes of the routed experts from a ``config.json``.

        Raises ``UserError`` when a key is missing or when no layer has routed experts.
        """
        layers = tuple(i for i in range(self.layer_count(config)) if self.has_experts(config, i))
        experts = self._experts(config)
        if not layers or experts < 2:
            raise UserError(
                f"This {self.model_type} configuration has no layer with routed experts, so there "
                "is nothing to fuse; moefuse works on Mixture-of-Experts models."
            )
        top_k = require(same_in_every_layer(config, self.top_k_key), self.top_k_key)
        if top_k > experts:
            raise UserError(
                f"config.json chooses {top_k} experts per token ({self.top_k_key!r}) of only "
                f"{experts} ({self.experts_count_key!r})."
            )
        return MoeShape(
            layers=layers,
            experts=experts,
            top_k=top_k,
            shared_experts=self.shared_experts(config),
            hidden=require(config, "hidden_size"),
            intermediate=require(config, self.intermediate_key),
            biased=self.layout.biased,
        )

    def _experts(self, config: Config) -> int:
        spelled = (self.experts_count_key, *self.experts_count_aliases)
        named = [config[key] for key in spelled if key in config]
        # Null and 0 are how a family that also has dense models says "dense".
        if named and not any(named):
            return 0
        return require(config, *spelled)

    def layer_count(self, config: Config) -> int:
        """Return how many decoder layers the model has, dense ones included."""
        return require(config, "num_hidden_layers")

    def with_expert_count(self, config: Config, experts: int) -> dict[str, Any]:
        """Return a copy of ``config`` whose layers have ``experts`` routed experts.

        It says so by the key that published checkpoints have, which some engines insist on, and by
        whatever other spelling is there: Transformers saves one of its own for some families.
        """
        present = [key for key in self.experts_count_aliases if key in config]
        return {**config, **dict.fromkeys((self.experts_count_key, *present), experts)}

    def with_fewer_experts(self, config: Config, experts: int) -> dict[str, Any]:
        """Return a copy of ``config`` with ``experts`` routed experts a layer, all in one pool.

        A token chooses at most all of them. Limits to groups of experts (``n_group``,
        ``topk_group``; arXiv:2405.04434, section 2.2.2) are lifted, because so few experts need
        not divide into them.
        """
        top_k = min(require(same_in_every_layer(config, self.top_k_key), self.top_k_key), experts)
        lifted: dict[str, Any] = {key: 1 for key in ("n_group", "topk_group") if config.get(key)}
        if config.get("topk_method") == "group_limited_greedy":
            lifted["topk_method"] = "greedy"
        return {**self.with_expert_count(config, experts), self.top_k_key: top_k, **lifted}

    def layer_prefix(self, layer: int) -> str:
        """Return what every tensor name of a decoder layer starts with: ``"model.layers.3."``."""
        return f"{self.layers_path}.{layer}."

    def layer_of(self, name: str) -> int | None:
        """Return the decoder layer that a tensor name belongs to, or None."""
        found = self._layer_pattern.match(name)
        return int(found[1]) if found else None

    @cached_property
    def _layer_pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.layers_path) + r"\.(\d+)\.")

    def moe_path(self, layer: int) -> str:
        """Return the path of the module that holds router and experts: ``"model.layers.3.mlp"``."""
        return self.layer_prefix(layer) + self.moe_name

    def experts_path(self, layer: int) -> str:
        """Return the path of the module of a layer's experts: ``"model.layers.3.mlp.experts"``."""
        return f"{self.moe_path(layer)}.{self.experts_name}"

    def experts_prefix(self, layer: int) -> str:
        """Return what the names of a layer's routed experts start with in the checkpoint."""
        return f"{self.layer_prefix(layer)}{self.disk_moe_name}.{self.experts_name}."

    def expert_names(self, layer: int, expert: int) -> ExpertNames:
        """Return the checkpoint's names for one routed expert's tensors."""
        prefix = f"{self.experts_prefix(layer)}{expert}."
        gate, up, down = (f"{prefix}{projection}.weight" for projection in self.projections)
        return ExpertNames(gate=gate, up=up, down=down)

    def stacked_names(self, layer: int) -> dict[str, str]:
        """Return the checkpoint's names of stacked experts by those of the native parameters."""
        assert self.stacked is not None
        prefix = f"{self.layer_prefix(layer)}{self.disk_moe_name}."
        native = ("gate_up_proj", "down_proj")
        names = {own: prefix + name for own, name in zip(native, self.stacked, strict=True)}
        if self.layout.biased:
            names |= {f"{own}_bias": f"{name}_bias" for own, name in names.items()}
        return names

    def expert_tensors(self, layer: int, shape: MoeShape) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors in which a layer's routed experts are published."""
        E, D, F = shape.experts, shape.hidden, shape.intermediate
        if self.stacked is None:
            names = (self.expert_names(layer, expert) for expert in range(E))
            shapes = {n: (F, D) for name in names for n in (name.gate, name.up)}
            downs = (self.expert_names(layer, expert).down for expert in range(E))
            return shapes | dict.fromkeys(downs, (D, F))
        turned = self.layout.transposed
        shapes = {
            "gate_up_proj": (E, D, 2 * F) if turned else (E, 2 * F, D),
            "down_proj": (E, F, D) if turned else (E, D, F),
            "gate_up_proj_bias": (E, 2 * F),
            "down_proj_bias": (E, D),
        }
        return {name: shapes[own] for own, name in self.stacked_names(layer).items()}

    def routed_prefixes(self, layer: int) -> tuple[str, ...]:
        """Return what the names of a layer's routed experts start with in the checkpoint."""
        if self.stacked is None:
            return (self.experts_prefix(layer),)
        prefix = f"{self.layer_prefix(layer)}{self.disk_moe_name}."
        return tuple(prefix + name.removesuffix("weight") for name in self.stacked)

    def within_whole(self, name: str) -> str:
        """Return what a whole model's checkpoint calls the tensor ``name`` of its text model."""
        return re.sub(r"^model\.", self.text_prefix, name) if self.text_prefix else name

    def within_text(self, name: str) -> str:
        """Return what the text model alone calls the tensor ``name`` of a whole model."""
        if self.text_prefix and name.startswith(self.text_prefix):
            return f"model.{name.removeprefix(self.text_prefix)}"
        return name

    def module_name(self, name: str) -> str:
        """Return what Transformers calls the tensor that the checkpoint calls ``name``."""
        for pattern, replacement in self.rename:
            name = re.sub(pattern, replacement, name)
        return name

    def published_name(self, name: str) -> str:
        """Return what published checkpoints call the tensor that Transformers calls ``name``.

        Routed experts, which Transformers stacks, have names of their own: ``expert_names``.
        """
        for pattern, replacement in self.publish:
            name = re.sub(pattern, replacement, name)
        return name
