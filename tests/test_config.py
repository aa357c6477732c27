"""Settings: flags, YAML and defaults are one thing, checked where they are made."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefuse import config
from moefuse.config import (
    AssembleConfig,
    CalibrateConfig,
    ComputeConfig,
    DistillConfig,
    FactorConfig,
    GroupConfig,
    SizeConfig,
    build,
    fields_of,
    parse_bytes,
    parse_count,
    read_yaml,
)
from moefuse.devices import WORKING
from moefuse.errors import UserError
from moefuse.grouping.assign import GROUPINGS
from moefuse.modeling.modeling_moefuse import DELTA_KINDS

STAGES = (
    ComputeConfig,
    CalibrateConfig,
    SizeConfig,
    GroupConfig,
    FactorConfig,
    DistillConfig,
    AssembleConfig,
)
FIELDS = fields_of(STAGES)


def _owner(name: str) -> type:
    return next(s for s in STAGES if name in {field.name for field in dataclasses.fields(s)})


def test_nothing_given_is_the_default() -> None:
    for stage in STAGES:
        assert build(stage, {}) == stage()
        assert build(stage, dict.fromkeys(FIELDS)) == stage()


def test_each_stage_takes_its_own() -> None:
    values = {"groups": 3, "rank": 2, "steps": 7, "grouping": "weight"}

    assert build(SizeConfig, values) == SizeConfig(groups=3, rank=2)
    assert build(DistillConfig, values) == DistillConfig(steps=7)
    assert build(GroupConfig, values) == GroupConfig(grouping="weight")
    assert build(FactorConfig, values) == FactorConfig()


def test_lists_of_choices_are_those_of_the_code() -> None:
    assert set(config.GROUPINGS) == set(GROUPINGS)
    assert set(config.DTYPES) == {"auto", *WORKING}
    few_bits = {f"low_rank_{bits}_bits" for bits in config.DELTA_BITS if bits != "16"}
    assert {*config.DELTA_KINDS, *few_bits} == set(DELTA_KINDS)


def test_defaults_make_sense_and_have_help() -> None:
    for stage in STAGES:
        given = {field.name: field.default for field in dataclasses.fields(stage)}
        assert build(stage, given) == stage()
    assert all(field.metadata["help"].endswith(".") for field in FIELDS.values())


@pytest.mark.parametrize(
    "name", [n for n, f in FIELDS.items() if f.metadata["at_least"] is not None]
)
def test_the_smallest_is_allowed_and_less_is_not(name: str) -> None:
    smallest = FIELDS[name].metadata["at_least"]

    assert getattr(build(_owner(name), {name: smallest}), name) == smallest
    with pytest.raises(UserError, match=f"is -?[0-9.]+; it must be at least {smallest}"):
        build(_owner(name), {name: smallest - 1})


@pytest.mark.parametrize(
    "name", [n for n, f in FIELDS.items() if f.metadata["at_most"] is not None]
)
def test_the_largest_is_allowed_and_more_is_not(name: str) -> None:
    largest = FIELDS[name].metadata["at_most"]

    assert getattr(build(_owner(name), {name: largest}), name) == largest
    with pytest.raises(UserError, match=f"it must be at most {largest}"):
        build(_owner(name), {name: largest + 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value: float) -> None:
    for name, field in FIELDS.items():
        if field.type is float:
            with pytest.raises(UserError, match="it must be a finite number"):
                build(_owner(name), {name: value})


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("groups", 2.0, "--groups is 2.0; it must be a whole number."),
        ("groups", "2", "--groups is '2'; it must be a whole number."),
        ("steps", True, "--steps is True; it must be a whole number."),
        ("damping", True, "--damping is True; it must be a number."),
        ("damping", "1", "--damping is '1'; it must be a number."),
        ("align", 0, "--align is 0; it must be true or false."),
        ("data", 3, "--data is 3; it must be text."),
        ("max_shard", ["4GB"], "--max-shard is"),
        ("grouping", "Output", "--grouping is 'Output'; choose from coactivation, output"),
        ("dtype", "bf16", "--dtype is 'bf16'; choose from auto, float32"),
    ],
)
def test_wrong_kinds(name: str, value: Any, match: str) -> None:
    with pytest.raises(UserError) as raised:
        build(_owner(name), {name: value})
    assert str(raised.value).startswith(match)


def test_a_files_whole_number_is_a_flags_number() -> None:
    """Otherwise the same job would have two fingerprints and look for its artifacts in vain."""
    found = build(FactorConfig, {"damping": 1})

    assert found == FactorConfig(damping=1.0)
    assert isinstance(found.damping, float)


def test_settings_that_exclude_each_other() -> None:
    build(FactorConfig, {"base": "mean", "scale": False})
    with pytest.raises(UserError, match="--base neurons needs scales"):
        build(FactorConfig, {"base": "neurons", "scale": False})


def test_no_two_stages_share_a_name() -> None:
    with pytest.raises(AssertionError, match="groups"):
        fields_of((SizeConfig, SizeConfig))


# YAML.


def _read(path: Path, text: str) -> dict[str, Any]:
    (path / "job.yaml").write_text(text, encoding="utf-8")
    return read_yaml(path / "job.yaml", STAGES)


def test_yaml_reads_names_with_dashes_too(tmp_path: Path) -> None:
    text = "groups: 3\nbatch-tokens: 64\nheld_back: 0.1\nparams: 4B\nalign: false\nrank: null\n"

    assert _read(tmp_path, text) == {
        "groups": 3,
        "batch_tokens": 64,
        "held_back": 0.1,
        "params": "4B",
        "align": False,
        "rank": None,
    }


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("groupz: 1", "has the key 'groupz', which is no setting of this command; it knows device"),
        ("1: 2", "has the key '1'"),
        ("[1]", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: [", "cannot be read"),
        ("a: !!python/name:os.system x", "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)
def test_wrong_yaml_is_one_sentence(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as raised:
        _read(tmp_path, text)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


def test_a_key_of_another_command(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("steps: 3")

    with pytest.raises(UserError, match="'steps', which is no setting of this command"):
        read_yaml(tmp_path / "job.yaml", (ComputeConfig, CalibrateConfig))


def test_yaml_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"data: \xff\xfe")

    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "job.yaml", STAGES)


# Sizes.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4B", 4_000_000_000),
        ("4b", 4_000_000_000),
        (" 350 M ", 350_000_000),
        ("1.5e9", 1_500_000_000),
        ("12K", 12_000),
        ("2T", 2_000_000_000_000),
        ("7", 7),
    ],
)
def test_counts(text: str, value: int) -> None:
    assert parse_count(text, "--params") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6GB", 6_000_000_000),
        ("6G", 6_000_000_000),
        ("500 mb", 500_000_000),
        ("6e9", 6_000_000_000),
        ("12kB", 12_000),
        ("100", 100),
        ("100B", 100),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text, "--bytes") == value


WRONG = ["", "B", "GB", "-4B", "0", "0.2", "4X", "four", "nan", "inf", "1e400", "1_0G!"]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_size(text: str) -> None:
    for parse in (parse_count, parse_bytes):
        with pytest.raises(UserError, match=r"--flag is .* which is not a"):
            parse(text, "--flag")


@given(st.integers(1, 10**17))
def test_whole_numbers_are_themselves(number: int) -> None:
    assert parse_count(str(number), "--params") == round(float(number))


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    for parse in (parse_count, parse_bytes):
        try:
            assert 1 <= parse(text, "--flag") < 10**18
        except UserError as error:
            assert "--flag" in str(error)
