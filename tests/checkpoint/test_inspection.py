import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import (
    CODER_V2_LITE,
    DEEPSEEK_V3,
    in_fp8,
    published,
    with_prediction_layer,
    write_layout,
)
from rich.console import Console

from moefuse.checkpoint.headers import read_headers
from moefuse.checkpoint.inspection import (
    Inspection,
    fusion_costs,
    inspect_checkpoint,
    render_inspection,
)
from moefuse.families import MoeShape
from moefuse.families.mixtral import FAMILY as MIXTRAL


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    directory = tmp_path_factory.mktemp("lite")
    write_layout(directory, CODER_V2_LITE, published(CODER_V2_LITE), shards=4)
    return inspect_checkpoint(directory)


def _billions(number: int) -> str:
    return f"{number / 1e9:.3f}"


def test_lite_has_the_published_sizes(lite: Inspection) -> None:
    parts = {part.name: part.parameters for part in lite.parts}

    assert _billions(parts["routed experts"]) == "14.395"
    assert _billions(lite.parameters - parts["routed experts"]) == "1.312"
    assert _billions(lite.parameters) == "15.706"
    assert lite.bytes == 2 * lite.parameters
    assert sum(parts.values()) == lite.parameters
    assert parts["embeddings"] == 2 * 102400 * 2048
    assert parts["dense MLP"] == 3 * 2048 * 10944
    assert parts["shared experts"] == 26 * 3 * 2048 * 2 * 1408
    assert parts["routers"] == 26 * 64 * 2048
    assert lite.active_parameters == lite.parameters - parts["routed experts"] * 58 // 64


def test_lite_has_the_published_facts(lite: Inspection) -> None:
    assert (lite.family, lite.layers, lite.moe_layers, lite.dense_layers) == (
        "deepseek_v2",
        27,
        26,
        1,
    )
    assert (lite.experts, lite.top_k, lite.shared_experts) == (64, 6, 2)
    assert (lite.hidden, lite.intermediate) == (2048, 1408)
    assert lite.context == 163840
    assert lite.rope == "yarn, factor 40, from 4096 tokens"
    assert lite.quantization is None
    assert lite.dtypes == {"BF16": lite.bytes}


@pytest.mark.parametrize(
    ("groups", "rank", "expected"),
    [
        (16, 0, "4.910"),
        (16, 8, "5.021"),
        (16, 32, "5.353"),
        (8, 0, "3.111"),
        (8, 8, "3.222"),
        (8, 32, "3.554"),
        (4, 0, "2.211"),
        (4, 8, "2.322"),
        (4, 32, "2.654"),
        (2, 0, "1.761"),
        (2, 8, "1.872"),
        (2, 32, "2.204"),
    ],
)
def test_lite_costs_what_the_design_says(
    lite: Inspection, groups: int, rank: int, expected: str
) -> None:
    (cost,) = [c for c in lite.costs if (c.groups, c.rank) == (groups, rank)]

    assert _billions(cost.parameters) == expected
    assert cost.bytes == 2 * cost.parameters


def test_one_rank_on_every_expert_costs_13_84_million(lite: Inspection) -> None:
    at = {(cost.groups, cost.rank): cost.parameters for cost in lite.costs}

    assert f"{(at[8, 8] - at[8, 0]) / 8 / 1e6:.2f}" == "13.84"


def test_costs_leave_out_what_makes_no_sense() -> None:
    shape = MoeShape(layers=(0,), experts=8, top_k=2, shared_experts=0, hidden=64, intermediate=32)

    costs = fusion_costs(1000, shape)

    assert {cost.groups for cost in costs} == {4, 2, 1}
    assert {cost.rank for cost in costs} == {0, 8}


def test_671_billion_parameters_are_inspected_in_seconds(tmp_path: Path) -> None:
    layout = with_prediction_layer(published(DEEPSEEK_V3), layers=61, hidden=7168)
    write_layout(tmp_path, DEEPSEEK_V3, in_fp8(layout), shards=163)

    start = time.perf_counter()
    headers = read_headers(tmp_path)
    seconds = time.perf_counter() - start
    found = inspect_checkpoint(tmp_path)

    print(f"{len(headers.tensors)} tensors in 163 shards: {seconds:.2f} s")
    assert seconds < 8
    assert _billions(found.parameters) == "671.026"
    parts = {part.name: part for part in found.parts}
    assert 11e9 < parts["multi-token prediction (not loaded)"].parameters < 14e9
    assert found.quantization == "fp8"
    assert list(found.dtypes) == ["F8_E4M3", "BF16", "F32"]
    assert found.bytes < 1.02 * found.parameters


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_parts_add_up_for_other_families(
    tiny_checkpoint: Callable[..., Path], model_type: str
) -> None:
    directory = tiny_checkpoint(model_type)

    found = inspect_checkpoint(directory)

    headers = read_headers(directory)
    assert found.parameters == sum(tensor.numel for tensor in headers.tensors.values())
    assert found.bytes == headers.total_bytes == sum(part.bytes for part in found.parts)
    assert {"embeddings", "attention", "routed experts", "routers"} <= {p.name for p in found.parts}


def test_inspection_is_json(lite: Inspection) -> None:
    told = json.loads(json.dumps(lite.to_json()))

    assert told["experts"] == 64
    assert told["parts"][0]["name"] == "embeddings"
    assert told["costs"][0].keys() == {"groups", "rank", "parameters", "bytes"}


def test_rendering_shows_what_people_ask_for(lite: Inspection) -> None:
    console = Console(width=120)

    with console.capture() as captured:
        console.print(render_inspection(lite))

    text = captured.get()
    for expected in ("deepseek_v2", "15.706 B", "14.395 B", "3.222 B", "rank 128", "yarn"):
        assert expected in text


def test_square_brackets_in_a_path_are_no_markup(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tiny_checkpoint("mixtral").rename(tmp_path / "[bold]x")
    console = Console(width=200)

    with console.capture() as captured:
        console.print(render_inspection(inspect_checkpoint(directory)))

    assert "[bold]x" in captured.get()


def test_a_checkpoint_in_a_format_that_is_not_read_is_still_shown(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral",
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "quantization_config": {"quant_method": "hqq", "bits": 4},
    }
    prefix = MIXTRAL.experts_prefix(0)
    write_layout(tmp_path, config, {f"{prefix}0.w1.qweight": ("F32", (4, 16))}, shards=1)

    found = inspect_checkpoint(tmp_path)

    assert found.quantization == "hqq"
    assert found.parameters == 4 * 3 * 32 * 16


def test_a_plain_checkpoint_is_inspected_without_torch(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """It takes a second to import, four times as long as everything else that inspecting does."""
    program = (
        "import sys; from moefuse.checkpoint.inspection import inspect_checkpoint; "
        "inspect_checkpoint(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, tiny_checkpoint()], check=True)
