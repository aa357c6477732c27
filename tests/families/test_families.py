"""The contract of a family, checked against the module that Transformers builds."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from numeric import assert_close
from running import write_text
from tiny import save_tiny, tiny_config

from moefuse.checkpoint.native import to_native
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.errors import UserError
from moefuse.families import (
    ExpertsLayout,
    MoeShape,
    all_families,
    collect,
    family_of,
    unsupported_families,
)
from moefuse.modeling.native import experts_of
from moefuse.pipeline import fuse

FAMILIES = sorted(all_families())
SPARSE = {
    "deepseek_v2": (1, 2),
    "deepseek_v3": (1, 2),
    "ernie4_5_moe": (1, 2),
    "glm4_moe": (1, 2),
    "gpt_oss": (0, 1, 2),
    "granitemoe": (0, 1, 2),
    "minimax": (0, 1, 2),
    "phimoe": (0, 1, 2),
    "qwen3_5_moe_text": (0, 1, 2),
    "hunyuan_v1_moe": (0, 1, 2),
    "mixtral": (0, 1, 2),
    "olmoe": (0, 1, 2),
    "qwen2_moe": (1, 2),
    "qwen3_moe": (0, 1, 2),
}
SHARED = {
    "deepseek_v2": 2,
    "deepseek_v3": 1,
    "ernie4_5_moe": 2,
    "glm4_moe": 1,
    "hunyuan_v1_moe": 1,
    "qwen2_moe": 1,
    "qwen3_5_moe_text": 1,
}


def layout_of(experts: Any) -> ExpertsLayout:
    """Return the layout that Transformers itself says an experts module has."""
    return ExpertsLayout(experts.is_transposed, not experts.is_concatenated, experts.has_bias)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_contract(model_type: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, model_type)

    reader = CheckpointReader.open(tmp_path)

    assert reader.shape == MoeShape(
        layers=SPARSE[model_type],
        experts=8,
        top_k=2,
        shared_experts=SHARED.get(model_type, 0),
        hidden=32,
        intermediate=16,
        biased=model_type == "gpt_oss",
    )
    for layer, module in enumerate(model.get_submodule(reader.family.layers_path)):
        stored = reader.read_layer(layer, experts=False)
        wanted = {
            name: tensor
            for name, tensor in module.state_dict().items()
            if not (layer in reader.shape.layers and ".experts." in name)
        }
        assert stored.keys() == wanted.keys()
        assert all(torch.equal(stored[name], wanted[name]) for name in wanted)
    for layer in reader.shape.layers:
        moe = model.get_submodule(reader.family.moe_path(layer))
        experts = moe.get_submodule(reader.family.experts_name)
        moe.get_submodule(reader.family.router_name)
        native = to_native(reader.read_experts(layer), reader.family.layout)
        parameters = dict(experts.named_parameters())
        assert native.keys() == parameters.keys()
        assert all(torch.equal(native[name], parameters[name]) for name in native)
        assert reader.family.layout == layout_of(experts)
        x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        read = experts_of(experts, reader.family, reader.config)
        assert read.biases is not None or not read.gating.up_offset, "gains need biases then"
        for expert in range(8):
            chosen_T1 = torch.full((5, 1), expert)
            alone = experts(x_TD, chosen_T1, torch.ones(5, 1))
            assert_close(read.run(expert, x_TD), alone)
    outside = {name: reader.read(name) for name in reader.outside_names()}
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in outside.items())
    layers = reader.family.layers_path + "."
    assert outside.keys() == {name for name in state if not name.startswith(layers)}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_classes_exist_and_belong_together(model_type: str) -> None:
    family = all_families()[model_type]

    config_class = getattr(transformers, family.config_class)
    causal_lm = getattr(transformers, family.causal_lm)
    base_model = getattr(transformers, family.base_model)

    assert config_class.model_type == model_type
    assert causal_lm.config_class is base_model.config_class is config_class
    assert family.layer_prefix(3) == family.layers_path + ".3."
    assert family.moe_path(3) == f"model.layers.3.{family.moe_name}"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_expert_count_can_be_changed(model_type: str) -> None:
    family = all_families()[model_type]
    config = tiny_config(model_type).to_dict()

    changed = family.with_expert_count(config, 4)

    assert family.shape(changed).experts == 4
    assert family.shape(config).experts == 8
    rebuilt = getattr(transformers, family.config_class).from_dict(changed)
    assert family.shape(rebuilt.to_dict()).experts == 4


def test_qwen3_is_read_in_both_spellings() -> None:
    config = tiny_config("qwen3_moe").to_dict()
    count = config.pop("num_local_experts")
    published = {**config, "num_experts": count}

    family = family_of(published)

    assert family.shape(published).experts == 8
    assert family.with_expert_count(published, 2)["num_experts"] == 2
    assert "num_local_experts" not in family.with_expert_count(published, 2)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1,)),
        ({"mlp_only_layers": [0, 2]}, (1, 3)),
        ({"mlp_only_layers": None, "decoder_sparse_step": None}, (0, 1, 2, 3)),
    ],
)
def test_sparse_steps_are_those_of_transformers(
    changes: dict[str, Any], layers: tuple[int, ...]
) -> None:
    config = {**tiny_config("qwen3_moe", num_hidden_layers=4).to_dict(), **changes}
    given = {key: value for key, value in changes.items() if value is not None}

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            tiny_config("qwen3_moe", num_hidden_layers=4, **given)
        )

    assert family_of(config).shape(config).layers == layers
    built = model.get_submodule("model.layers")
    assert layers == tuple(i for i, layer in enumerate(built) if hasattr(layer.mlp, "experts"))


@pytest.mark.parametrize(
    ("model_type", "leading"),
    [("deepseek_v2", 0), ("deepseek_v3", 3), ("glm4_moe", 1)],
)
def test_leading_dense_layers_default_as_in_transformers(model_type: str, leading: int) -> None:
    config = tiny_config(model_type, num_hidden_layers=5).to_dict()
    del config["first_k_dense_replace"]

    assert family_of(config).shape(config).layers == tuple(range(leading, 5))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "top_k"])
def test_missing_keys_are_named(model_type: str, key: str) -> None:
    key = all_families()[model_type].top_k_key if key == "top_k" else key
    config = tiny_config(model_type).to_dict()
    del config[key]

    with pytest.raises(UserError, match=f"lacks the key '{key}'"):
        family_of(config).shape(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_missing_sizes_of_the_family_are_named(model_type: str) -> None:
    family = all_families()[model_type]
    config = tiny_config(model_type).to_dict()
    spelled = (family.experts_count_key, *family.experts_count_aliases)
    without_count = {key: value for key, value in config.items() if key not in spelled}
    without_width = {k: value for k, value in config.items() if k != family.intermediate_key}

    with pytest.raises(UserError, match=f"lacks the key '{family.experts_count_key}'"):
        family.shape(without_count)
    with pytest.raises(UserError, match=f"lacks the key '{family.intermediate_key}'"):
        family.shape(without_width)


@pytest.mark.parametrize("value", ["32", 0, -1, 3.5, True, [32]])
def test_senseless_values_are_named(value: object) -> None:
    config = {**tiny_config().to_dict(), "hidden_size": value}

    with pytest.raises(UserError, match="'hidden_size'; a positive integer is needed"):
        family_of(config).shape(config)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("deepseek_v2", "first_k_dense_replace", "1"),
        ("deepseek_v3", "n_shared_experts", -1),
        ("qwen3_moe", "decoder_sparse_step", 1.5),
        ("qwen2_moe", "mlp_only_layers", 3),
    ],
)
def test_senseless_optional_values_are_named(model_type: str, key: str, value: object) -> None:
    config = {**tiny_config(model_type).to_dict(), key: value}

    with pytest.raises(UserError, match=f"under '{key}'; a (whole number|list) is needed"):
        family_of(config).shape(config)


def test_more_chosen_than_there_are() -> None:
    config = {**tiny_config().to_dict(), "num_experts_per_tok": 9}

    with pytest.raises(UserError, match="chooses 9 experts per token"):
        family_of(config).shape(config)


@pytest.mark.parametrize("changes", [{"n_routed_experts": None}, {"first_k_dense_replace": 3}])
def test_dense_members_of_a_family_are_told(changes: dict[str, Any]) -> None:
    config = {**tiny_config().to_dict(), **changes}

    with pytest.raises(UserError, match="no layer with routed experts"):
        family_of(config).shape(config)


def test_dense_models_are_told() -> None:
    with pytest.raises(UserError, match="'llama' is a dense model"):
        family_of({"model_type": "llama", "hidden_size": 8})


def test_unknown_families_are_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'jetmoe' is not supported yet; .*deepseek_v2.*qwen3_moe"):
        family_of({"model_type": "jetmoe", "num_local_experts": 8})


def test_a_configuration_without_a_model_type_is_told() -> None:
    with pytest.raises(UserError, match="lacks the key 'model_type'"):
        family_of({"hidden_size": 8})


def test_fused_checkpoints_are_told() -> None:
    with pytest.raises(UserError, match="already fused"):
        family_of({"model_type": "deepseek_v2", "moefuse": {}})


def test_duplicates_raise() -> None:
    family = all_families()["olmoe"]

    with pytest.raises(RuntimeError, match="both called 'olmoe'"):
        collect([family, family])


def test_callers_cannot_change_the_list() -> None:
    all_families().clear()

    assert sorted(all_families()) == FAMILIES


def test_sizes_may_be_given_layer_by_layer_where_they_are_alike() -> None:
    config = tiny_config("hunyuan_v1_moe").to_dict()
    family = family_of(config)

    assert family.shape({**config, "moe_topk": [2, 2, 2]}).top_k == 2
    with pytest.raises(UserError, match="different values for different layers under 'moe_topk'"):
        family.shape({**config, "moe_topk": [2, 1, 2]})


@pytest.mark.parametrize("model_type", sorted(unsupported_families()))
def test_a_family_that_cannot_be_fused_is_told_with_the_reason(model_type: str) -> None:
    reason = unsupported_families()[model_type]

    with pytest.raises(UserError, match=f"'{model_type}' is not supported: {re.escape(reason)}; "):
        family_of({"model_type": model_type, "num_local_experts": 8})


def test_the_page_lists_what_the_code_knows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    supported, unsupported = page.split("## Not supported")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", unsupported, flags=re.MULTILINE)

    assert re.findall(r"^\| `(\w+)` \|", supported, flags=re.MULTILINE) == FAMILIES
    assert rows == sorted(unsupported_families().items())


def test_no_family_is_both() -> None:
    assert not all_families().keys() & unsupported_families().keys()


def test_every_family_can_be_made_tiny(tiny_checkpoint: Callable[..., Path]) -> None:
    assert sorted(SPARSE) == FAMILIES
    assert (tiny_checkpoint("olmoe") / "tokenizer.json").is_file()


def test_bases_of_neurons_serve_gpt_oss_better_than_means(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Its random experts differ, its neurons have biases, and their clamps are met."""
    teacher, text = tiny_checkpoint("gpt_oss"), write_text(tmp_path / "text.txt")
    values = {"groups": 3, "rank": 4, "data": str(text), "tokens": 1024, "sequence_length": 64}

    means, neurons = (
        fuse(teacher, tmp_path / base, {**values, "steps": 0, "base": base}).errors
        for base in ("mean", "neurons")
    )

    for layer, error in neurons.items():
        assert error["after"] < 0.8 * means[layer]["after"]
