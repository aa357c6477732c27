"""The ablation: every part once, resumable, in parts that add up, its percentages right."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import write_text
from tiny import save_tiny

from moefuse.config import SizeConfig
from moefuse.evaluation.report import Row
from moefuse.fusion.allocate import FULL, LOW_BITS
from moefuse.fusion.plan_neurons import choices_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ablation

SIZES: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    teacher = tmp_path / "teacher"
    save_tiny(teacher, dtype=torch.bfloat16, **SIZES)
    return {
        "checkpoint": teacher,
        "data": str(write_text(tmp_path / "text.txt")),
        "held_out": str(write_text(tmp_path / "held-out.txt", lines=40)),
        "work": tmp_path / "work",
        "results": tmp_path / "results",
        "seeds": 1,
        "expert_bits": "4",
        "whole_bits": "8",
        "groups": "2",
        "tokens": 512,
        "sequence_length": 64,
        "held_out_tokens": 256,
        "fit_tokens": 256,
        "sensitivity_tokens": 128,
        "steps": 2,
        "batch_tokens": 64,
        "device": "cpu",
    }


def test_parts_are_measured_side_by_side_and_gathered(given: dict[str, Any]) -> None:
    ablation.main(**given, part="0/2")
    first = {path: path.stat().st_mtime_ns for path in (given["work"] / "cells").iterdir()}
    assert not given["results"].exists()
    ablation.main(**given, part="1/2")
    both = {path: path.stat().st_mtime_ns for path in (given["work"] / "cells").iterdir()}
    assert 0 < len(first) < len(both)

    ablation.main(**given)

    # Nothing was measured twice, and nothing was left.
    after = {path: path.stat().st_mtime_ns for path in (given["work"] / "cells").iterdir()}
    assert after == both
    assert {path: both[path] for path in first} == first
    result = json.loads((given["results"] / "ablation.json").read_text())
    rows = result["rows"]
    kinds = {(row["form"], row["method"], row["seed"], row["stage"]) for row in rows}
    assert len(kinds) == len(rows)
    assert rows[0]["method"] == "teacher"
    assert len({kind[:3] for kind in kinds}) == len(both) + 1
    assert result["meta"]["seeds"] == [0]
    _check_forms(rows)
    table = (given["results"] / "ablation.md").read_text()
    assert all(f"| {row['method']} |" in table for row in rows[1:])
    assert (given["results"] / "ablation.png").read_bytes().startswith(b"\x89PNG")


def _check_forms(rows: list[dict[str, Any]]) -> None:
    """Each setting does what its name says, as far as its size shows it."""
    taken = {(row["form"], row["method"]): row for row in rows if row["stage"] == "one-shot"}
    low_rank = "Bases and low-rank deltas, 2 groups"
    whole = taken[low_rank, "as it is"]
    assert whole["rank"] == 2
    assert taken[low_rank, "rank 0, not 2"]["expert_bytes"] < whole["expert_bytes"]
    assert taken[low_rank, "rank 4, not 2"]["expert_bytes"] > whole["expert_bytes"]
    assert taken[low_rank, "means, no scales"]["expert_bytes"] < whole["expert_bytes"]
    assert taken[low_rank, "with biases"]["expert_bytes"] > whole["expert_bytes"]
    own, plain = "Own neurons at 4 bpw", "Own 16-bit neurons at 8 bpw"
    assert {taken[key]["bpw"] <= 4 for key in taken if key[0] == own} == {True}
    assert len({row["kl"] for key, row in taken.items() if key[0] == own}) > 4
    assert (own, "1-bit neurons only") in taken
    assert (plain, "1-bit neurons only") not in taken
    assert (plain, "no shared neurons") in taken


def test_other_settings_are_measured_anew(given: dict[str, Any]) -> None:
    bench = _bench(given, steps=2)
    setting = ablation.Setting("form", "as it is", {"groups": 2})
    ablation.measured(bench, setting, 0)
    assert bench.path(setting, 0).exists()

    for other in (
        _bench(given, steps=3).path(setting, 0),
        bench.path(ablation.Setting("form", "as it is", {"groups": 3}), 0),
        bench.path(setting, 1),
    ):
        assert not other.exists()


def _bench(given: dict[str, Any], **more: Any) -> ablation.Bench:
    names = ("data", "tokens", "sequence_length", "fit_tokens", "batch_tokens", "device")
    values = {name: given[name] for name in names} | more
    return ablation.Bench(given["checkpoint"], given["work"], values, given["held_out"], 256)


def row(part: str, stage: str, kl: float, seed: int) -> Row:
    return Row(method=part, stage=stage, kl=kl, seed=seed, expert_bytes=1000, bpw=1.0)


def test_changes_are_against_as_it_is_and_against_means() -> None:
    parts = {
        "as it is": [row("as it is", "distilled", kl, s) for s, kl in enumerate((0.9, 1.1))],
        "bases are means": [row("bases are means", "distilled", 2.0, s) for s in (0, 1)],
        "means, no alternation": [row("means", "distilled", 3.0, s) for s in (0, 1)],
        "no distillation": [row("no distillation", "one-shot", 1.5, s) for s in (0, 1)],
    }
    for part in ("as it is", "bases are means", "means, no alternation"):
        parts[part].append(row(part, "one-shot", 4.0, 0))

    lines = {
        cells[0]: cells[1:]
        for line in ablation.table(parts).splitlines()[2:]
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }

    assert lines["as it is"][2:] == ["4.000", "", "1.000 ± 0.141", "", ""]
    assert lines["bases are means"][4:] == ["2.000 ± 0.000", "+100.0 %", ""]
    assert lines["means, no alternation"][4:] == ["3.000 ± 0.000", "+200.0 %", "+50.0 %"]
    assert lines["no distillation"][2:5] == ["1.500 ± 0.000", "-62.5 %", "1.500 ± 0.000"]


@pytest.mark.parametrize("bits", ["1", "2", "4", "16"])
def test_one_bit_width_only_is_all_that_neurons_may_have(bits: str) -> None:
    assert choices_of(SizeConfig(expert_bits=1.0, bits=bits)) == ("0", bits)
    assert choices_of(SizeConfig(params="4B", bits=bits)) == FULL


def test_without_a_bit_width_neurons_may_have_any() -> None:
    assert choices_of(SizeConfig(expert_bits=1.0)) == LOW_BITS
