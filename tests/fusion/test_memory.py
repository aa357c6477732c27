"""Memory of running a model: the cache to the byte, activations within bounds, plans that fit."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from moefuse.config import FactorConfig, SizeConfig
from moefuse.errors import UserError
from moefuse.export.assemble import experts_form
from moefuse.families import MoeShape, all_families, family_of
from moefuse.fusion.memory import (
    Needs,
    Serving,
    activation_bytes,
    fit_to_memory,
    memory_of,
    running_needs,
    smallest_bytes,
)
from moefuse.fusion.plan import Teacher, make_plan
from moefuse.modeling import kernels
from moefuse.modeling.modeling_moefuse import fused_classes

FAMILIES = sorted(all_families())
WINDOW = 6
SLIDING: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"sliding_window": WINDOW}),
    ("qwen3_moe", {"sliding_window": WINDOW, "use_sliding_window": True}),
    ("qwen3_moe", {"sliding_window": WINDOW, "use_sliding_window": False}),
    ("qwen2_moe", {"sliding_window": WINDOW, "use_sliding_window": True}),
    ("qwen2_moe", {"sliding_window": WINDOW, "use_sliding_window": False}),
    ("qwen2_moe", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    (
        "qwen2_moe",
        {
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
]
CODER_V2_LITE: dict[str, Any] = {
    **tiny_config("deepseek_v2").to_dict(),
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
QWEN3_30B: dict[str, Any] = {
    **tiny_config("qwen3_moe").to_dict(),
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
MIXTRAL_8X7B: dict[str, Any] = {
    **tiny_config("mixtral").to_dict(),
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
}
TEACHER = Teacher(
    shape=MoeShape((1, 2, 3), experts=8, top_k=2, shared_experts=1, hidden=12, intermediate=10),
    outside=5000,
    outside_bytes=10_000,
    largest_outside_layer=1500,
    embedding=1000,
    itemsize=2,
)
NEEDS = Needs(cache=3_000, activations=2_000, runtime=1_000)
PLAIN = FactorConfig()


def needs(config: dict[str, Any], serving: Serving) -> Needs:
    return running_needs(config, family_of(config), serving)


def serve(context: int, batch: int = 1, engine: str = "transformers", **other: Any) -> Serving:
    return Serving(context, batch, engine, **{"itemsize": 2, **other})


def read_prompt(model: nn.Module, context: int, batch: int, chunk: int) -> Any:
    """Fill a new cache, of the kind that the model makes, as ``generate`` does with
    ``prefill_chunk_size``."""
    cache = None
    tokens = torch.randint(2, 60, (batch, context))
    with torch.no_grad():
        for part in tokens.split(chunk, dim=1):
            given: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
            cache = model(part, **given, logits_to_keep=1).past_key_values
    return cache


HELD = ("keys", "values", "conv_states", "recurrent_states")
"""What layers of a cache hold, those of linear attention included."""


def held_bytes(cache: Any) -> int:
    """Count every tensor that a cache holds; MiniMax's has one more list."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in HELD]
    held += getattr(cache, "linear_cache", [])
    flat = [t for part in held for t in (part.values() if isinstance(part, dict) else [part])]
    return sum(t.numel() * t.element_size() for t in flat if isinstance(t, Tensor))


def fused_model(model_type: str, groups: int, rank: int, **changes: Any) -> nn.Module:
    settings = tiny_config(model_type, **changes).to_dict()
    layer = {"groups": groups, "rank": rank, "delta": "low_rank", "scale": True, "bias": False}
    layers = {str(at): layer for at in all_families()[model_type].shape(settings).layers}
    config_class, _, causal = fused_classes(model_type)
    block = {"layers": layers, **experts_form(settings, all_families()[model_type])}
    config = config_class.from_dict({**settings, "moefuse": block})
    return causal(config).eval()


# The cache.


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("context", "batch", "chunk"), [(1, 1, 1), (13, 1, 13), (22, 3, 9)])
def test_the_cache_is_the_one_that_transformers_fills(
    model_type: str, context: int, batch: int, chunk: int
) -> None:
    model = tiny_model(model_type)

    found = needs(model.config.to_dict(), serve(context, batch, itemsize=4)).cache

    assert found == held_bytes(read_prompt(model, context, batch, chunk)) > 0


@pytest.mark.parametrize(("model_type", "changes"), SLIDING)
@pytest.mark.parametrize("context", [3, WINDOW - 1, WINDOW, 20])
def test_a_sliding_window_limits_the_cache_as_in_transformers(
    model_type: str, changes: dict[str, Any], context: int
) -> None:
    config = {**tiny_config(model_type).to_dict(), **changes}
    if model_type == "qwen2_moe" and "layer_types" not in changes:
        del config["layer_types"]
    model = tiny_model(model_type, **changes)

    expected = held_bytes(read_prompt(model, context, 2, 4))

    assert needs(config, serve(context, 2, itemsize=4)).cache == expected
    saved = model.config.to_dict()
    assert needs(saved, serve(context, 2, itemsize=4)).cache == expected


def test_a_head_may_be_wider_than_its_share_of_the_hidden_width() -> None:
    model = tiny_model("qwen3_moe", head_dim=24)

    found = needs(model.config.to_dict(), serve(7, itemsize=4)).cache

    assert found == held_bytes(read_prompt(model, 7, 1, 7))


def test_a_cache_in_half_precision_takes_half() -> None:
    model = tiny_model("deepseek_v2").to(torch.bfloat16)

    found = needs(model.config.to_dict(), serve(9, 2, itemsize=2)).cache

    assert found == held_bytes(read_prompt(model, 9, 2, 9))


@pytest.mark.parametrize("model_type", ["deepseek_v2", "mixtral"])
def test_a_student_has_its_teachers_cache(model_type: str) -> None:
    student = fused_model(model_type, groups=2, rank=2)

    found = needs(tiny_config(model_type).to_dict(), serve(9, 2, itemsize=4)).cache

    assert found == held_bytes(read_prompt(student, 9, 2, 9))


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize(
    ("config", "per_token"),
    [
        (CODER_V2_LITE, 27 * (512 + 64) * 2),
        (QWEN3_30B, 48 * 2 * 4 * 128 * 2),
        (MIXTRAL_8X7B, 32 * 2 * 8 * 128 * 2),
    ],
)
def test_bytes_of_a_token_of_published_models(
    config: dict[str, Any], per_token: int, engine: str
) -> None:
    assert needs(config, serve(4096, 3, engine)).cache == 3 * 4096 * per_token


def test_vllm_hands_out_whole_blocks() -> None:
    sixteen = needs(QWEN3_30B, serve(16, engine="vllm")).cache

    assert needs(QWEN3_30B, serve(1, engine="vllm")).cache == sixteen
    assert needs(QWEN3_30B, serve(17, engine="vllm")).cache == 2 * sixteen


def test_vllm_keeps_the_window_and_what_is_being_read() -> None:
    config = {**MIXTRAL_8X7B, "sliding_window": 4096}
    block = 16 * 32 * 2 * 8 * 128 * 2

    short, long = (needs(config, serve(context, engine="vllm")).cache for context in (1024, 32_768))

    assert short == (1024 // 16 + 1) * block
    assert long == ((4095 + 2048 + 15) // 16 + 1) * block
    assert needs(config, serve(32_768)).cache == 4095 * block // 16


@pytest.mark.parametrize(
    ("model_type", "changes", "told"),
    [
        ("deepseek_v2", {"kv_lora_rank": None}, "lacks the key 'kv_lora_rank'"),
        ("mixtral", {"num_attention_heads": None}, "lacks the key 'num_attention_heads'"),
        ("mixtral", {"sliding_window": "4096"}, "'4096' under 'sliding_window'"),
        ("qwen2_moe", {"layer_types": ["full_attention"]}, "an entry for every layer is needed"),
        ("olmoe", {"vocab_size": 0}, "0 under 'vocab_size'"),
    ],
)
def test_sizes_that_are_missing_or_senseless_are_named(
    model_type: str, changes: dict[str, Any], told: str
) -> None:
    config = {**tiny_config(model_type).to_dict(), **changes}

    with pytest.raises(UserError, match=told):
        needs(config, serve(8))


# Activations.


def peak_beside_weights(model: nn.Module, context: int, batch: int, chunk: int) -> int:
    """Return the most bytes that the allocator had handed out while a prompt was read."""
    read_prompt(model, context, batch, chunk)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        read_prompt(model, context, batch, chunk)
    events = measured.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("context", "chunk", "hidden"),
    [pytest.param(128, 128, 128, id="experts"), pytest.param(768, 16, 32, id="attention")],
)
def test_activations_are_bounded_by_the_formula_and_of_its_size(
    model_type: str,
    context: int,
    chunk: int,
    hidden: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Heads of one width for keys and values: a CPU fuses attention for no others.
    changes: dict[str, Any] = {"hidden_size": hidden, "max_position_embeddings": 1024}
    if model_type.startswith("deepseek"):
        changes["v_head_dim"] = 16
    model = fused_model(model_type, groups=8, rank=8, **changes)
    config = tiny_config(model_type, **changes).to_dict()
    counted = needs(config, Serving(context, 2, "transformers", 4, prefill=chunk))

    measured = {}
    for way in ("plain", "auto"):
        monkeypatch.setattr(kernels, "_setting", way)
        measured[way] = peak_beside_weights(model, context, 2, chunk) - counted.cache

    # The formula is of the plain way, which takes the most and needs nothing installed.
    assert measured["auto"] <= measured["plain"] <= counted.activations <= 2.5 * measured["plain"]


def test_logits_of_many_sequences_can_be_the_largest() -> None:
    family, config = family_of(QWEN3_30B), QWEN3_30B
    windows = (None,) * 48

    def found(vocabulary: int) -> int:
        shape, attention = family.shape(config), family.attention(config)
        return activation_bytes(shape, attention, windows, vocabulary, serve(1, 64))

    assert found(10**7) - found(2 * 10**6) == 64 * (10**7 - 2 * 10**6) * (2 + 8)


def test_a_longer_prompt_is_read_in_chunks() -> None:
    short, long = (needs(MIXTRAL_8X7B, serve(context)) for context in (2048, 2049))

    assert long.activations / short.activations < 1.001
    assert needs(MIXTRAL_8X7B, serve(2048, 4, "vllm")).activations == pytest.approx(
        needs(MIXTRAL_8X7B, serve(2048, 1, "vllm")).activations
    ), "vLLM's step is of all sequences together"


# What fits.


def fit(vram: int, **size: Any) -> Any:
    return fit_to_memory(TEACHER, vram, NEEDS, SizeConfig(**size), PLAIN)


@given(
    st.integers(20_000, 36_000),
    st.sampled_from([{}, {"groups": 2}, {"groups": 5}, {"rank": 3}, {"form": "low-rank"}]),
)
@settings(max_examples=40, deadline=None)
def test_a_student_fits_its_device_and_is_what_the_planner_makes_of_the_rest(
    vram: int, size: dict[str, Any]
) -> None:
    room = vram - NEEDS.total
    least = smallest_bytes(TEACHER, SizeConfig(**size), PLAIN)
    if TEACHER.bytes <= room:
        assert fit(vram, **size) is None
        return
    if least > room:
        with pytest.raises(UserError, match="are needed at least"):
            fit(vram, **size)
        return

    plan = fit(vram, **size)

    assert plan == make_plan(TEACHER, SizeConfig(**size, bytes=str(room)), PLAIN)
    memory = memory_of(plan.bytes, NEEDS, vram)
    assert memory.total + (memory.free or 0) == vram
    assert (memory.free or 0) >= 0


def test_the_teacher_is_left_alone_as_soon_as_it_fits() -> None:
    enough = TEACHER.bytes + NEEDS.total

    assert TEACHER.bytes == 10_000 + 3 * 8 * 3 * 12 * 10 * 2
    assert fit(enough) is None
    assert fit(enough - 1).bytes <= TEACHER.bytes - 1


@pytest.mark.parametrize("form", ["low-rank", "neurons"])
def test_the_least_memory_is_enough_and_one_byte_less_is_told(form: str) -> None:
    least = smallest_bytes(TEACHER, SizeConfig(form=form), PLAIN) + NEEDS.total
    layer = fit(least, form=form).layers[1]

    if form == "low-rank":
        assert (layer.groups, layer.rank) == (1, 0)
    else:
        assert sum(layer.neurons.values()) >= 1
    with pytest.raises(UserError) as error:
        fit(least - 1, form=form)
    told = str(error.value)
    assert told.endswith(".") and "\n" not in told
    for part in ("outside the routed experts", "key-value cache", "activations", "runtime"):
        assert part in told


def test_a_wish_beyond_the_teacher_is_told_even_where_the_teacher_fits() -> None:
    with pytest.raises(UserError, match="--groups is 9, but a layer has only 8 experts"):
        fit(10**9, groups=9)
