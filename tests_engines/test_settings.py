"""What the plugin sets where CUDA graphs would be captured."""

from types import SimpleNamespace
from typing import Any

import pytest

from moefuse.export.vllm_plugin.settings import EagerSettings, GpuSettings

LOW_RANK = {"delta": "low_rank", "neurons": None}


@pytest.mark.parametrize(
    ("layers", "eager"),
    [
        ([LOW_RANK, LOW_RANK], False),
        ([LOW_RANK, {"delta": "low_rank", "neurons": {"2": 4}}], True),
        ([{"delta": "multiplexed_lora", "neurons": None}], True),
    ],
)
def test_graphs_are_done_without_where_sizes_are_asked_for(
    layers: list[dict[str, Any]], eager: bool
) -> None:
    def config() -> Any:
        block = {"format": 1, "layers": {str(n): layer for n, layer in enumerate(layers)}}
        hf_config = SimpleNamespace(moefuse=block)
        return SimpleNamespace(model="out", hf_config=hf_config, enforce_eager=False)

    by_vllm, by_aphrodite = config(), config()
    GpuSettings.verify_and_update_model_config(by_vllm)
    EagerSettings.verify_and_update_model_config(by_aphrodite)

    assert by_vllm.enforce_eager is eager
    assert by_aphrodite.enforce_eager
