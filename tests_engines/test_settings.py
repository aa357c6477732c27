"""What the plugin sets where CUDA graphs would be captured."""

from types import SimpleNamespace
from typing import Any

import pytest

from moefuse.errors import UserError
from moefuse.export.vllm_plugin.settings import EagerSettings, GpuSettings

LOW_RANK = {"delta": "low_rank", "neurons": None}


def config_of(layers: list[dict[str, Any]], family: str = "mixtral", **others: Any) -> Any:
    """Return what vLLM hands to the settings, as far as they look."""
    numbered = {str(number): layer for number, layer in enumerate(layers)}
    block = {"format": 1, "teacher_model_type": family, "layers": numbered}
    hf_config = SimpleNamespace(moefuse=block, **others)
    return SimpleNamespace(model="out", hf_config=hf_config, enforce_eager=False)


@pytest.mark.parametrize("family", ["minimax", "phimoe", "qwen3_5_moe_text"])
def test_families_that_vllm_does_not_run_are_refused_by_name(family: str) -> None:
    with pytest.raises(UserError, match=f"out cannot be served by vLLM: it is of family {family}"):
        GpuSettings.verify_and_update_model_config(config_of([LOW_RANK], family))


@pytest.mark.parametrize(
    ("layers", "eager"),
    [
        ([LOW_RANK, LOW_RANK], False),
        ([LOW_RANK, {"delta": "low_rank_8_bits", "neurons": None}], False),
        ([LOW_RANK, {"delta": "low_rank", "neurons": {"2": 4}}], True),
        ([{"delta": "multiplexed_lora", "neurons": None}], True),
    ],
)
def test_graphs_are_done_without_where_sizes_are_asked_for(
    layers: list[dict[str, Any]], eager: bool
) -> None:
    by_vllm, by_aphrodite = config_of(layers), config_of(layers)
    GpuSettings.verify_and_update_model_config(by_vllm)
    EagerSettings.verify_and_update_model_config(by_aphrodite)

    assert by_vllm.enforce_eager is eager
    assert by_aphrodite.enforce_eager


def test_quantised_bases_are_served_without_graphs() -> None:
    config = config_of([LOW_RANK], quantization_config={"quant_method": "compressed-tensors"})
    GpuSettings.verify_and_update_model_config(config)

    assert config.enforce_eager
