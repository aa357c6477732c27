"""The model card: what it tells, that the hub can read it, and that a later stage can add to it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from moefuse.cards import (
    CardRecord,
    Distilled,
    Healed,
    Measured,
    Metrics,
    Text,
    metrics_of,
    read_record,
    with_stage,
    write_card,
)
from moefuse.errors import UserError
from moefuse.evaluation.quality import Quality
from moefuse.export.card import render_card
from moefuse.export.record import PLOT, RECORD, Base, Form, Size

HELD_OUT = Text("held.jsonl", 12_000, 20, 512)
TEACHER = Metrics("teacher", 1.75, 5.75, intervals={"cross_entropy": (1.7, 1.8)})
DISTILLED = Metrics(
    "distilled",
    1.9,
    6.7,
    0.2312,
    0.7961,
    {"kl": (0.21, 0.25), "agreement": (0.78, 0.81), "cross_entropy": (1.8, 2.0)},
)
HEALED = replace(DISTILLED, stage="healed", kl=0.11, intervals={"kl": (0.1, 0.12)})
LICENCE = {
    "license": "other",
    "license_name": "deepseek-license",
    "license_link": "LICENSE-MODEL",
    "language": ["en", "zh"],
}
RECORD_OF_DELTAS = CardRecord(
    name="student",
    base=Base("org/moe", "org/moe", "0" * 40, LICENCE),
    form=Form(experts=64, top_k=6, layers=26, groups=8, rank=16),
    original=Size(15_706_000_000, 2_400_000_000, 28_790_000_000, 31_400_000_000),
    student=Size(3_333_000_000, 1_900_000_000, 4_040_000_000, 6_670_000_000),
    calibrated=Text("org/code:python:train", 131_072, sequence_length=512),
    distilled=Distilled(
        400, {"1": {"before": 0.5, "after": 0.25}, "2": {"before": 0.3, "after": 0.2}}
    ),
    measured=Measured(HELD_OUT, (TEACHER, DISTILLED)),
)
OF_NEURONS = Form(
    experts=8,
    top_k=2,
    layers=2,
    neurons={"1": 40, "4": 20},
    shared=3,
    kept=0.25,
    mean_bits=2.5,
    energy_lost=0.1,
    advice="prune and quantise",
)


def words(record: CardRecord) -> str:
    return " ".join(render_card(record).split())


def test_front_matter_is_what_the_hub_reads() -> None:
    data = ModelCard(render_card(RECORD_OF_DELTAS)).data.to_dict()

    assert data["base_model"] == "org/moe"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["datasets"] == ["org/code"]
    assert {key: data[key] for key in LICENCE} == LICENCE
    (index,) = data["model-index"]
    (result,) = index["results"]
    assert (index["name"], result["dataset"]["name"]) == ("student", "held.jsonl")
    kl = next(metric for metric in result["metrics"] if metric["type"] == "kl_divergence")
    assert (kl["value"], kl["args"]) == (0.2312, {"interval_95": [0.21, 0.25]})


def test_it_tells_everything_that_was_asked_for() -> None:
    told = words(RECORD_OF_DELTAS)

    for fact in (
        "64 routed experts of each layer fused into 8 shared base experts (G) plus one delta of "
        "rank 16 (R)",
        "| parameters | 15.706 B | 3.333 B |",
        "| bytes in all | 31.40 GB | 6.67 GB |",
        "131,072 tokens of org/code:python:train, in sequences of 512",
        "400 steps a layer",
        "0.4000 one-shot, 0.2250 in the end; the worst layer is 1 with 0.2500",
        "12,000 tokens of 20 documents of held.jsonl",
        "| original | 0 | 1 | 1.7500 [1.7000, 1.8000] | 5.7500 |",
        "0.2312 [0.2100, 0.2500] | 0.7961 [0.7800, 0.8100]",
        "(quality.png)",
        "AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)",
        'moefuse.load("student")',
        "vllm serve student --trust-remote-code",
        "not yet tested",
        "Not healed",
        f"commit `{'0' * 40}`",
        "That of the original, org/moe: deepseek-license (LICENSE-MODEL)",
    ):
        assert fact in told, fact


def test_own_neurons() -> None:
    told = words(replace(RECORD_OF_DELTAS, form=OF_NEURONS))

    assert "to 60 neurons of their own (by bits of a number: 40 at 1, 20 at 4)" in told
    assert "at most 3 a layer that its experts share" in told
    assert "25.0% of the original's neurons are kept; 2.50 bits a number on average" in told
    assert "prune and quantise" in told
    assert "rank" not in told and "base experts" not in told


def test_what_is_not_known_is_said() -> None:
    record = replace(
        RECORD_OF_DELTAS,
        base=Base("my moe"),
        measured=None,
        unmeasured="no text was held out",
        distilled=Distilled(0, {}),
    )
    told, data = words(record), ModelCard(render_card(record)).data.to_dict()

    assert "Not measured (no text was held out). To see how far" in told
    assert "moefuse eval student --teacher my moe --data TEXT" in told
    assert "quality.png" not in told
    assert "The card of my moe names no licence" in told
    assert "Layer distillation: none" in told
    assert not {"base_model", "license", "model-index", "model_name"} & data.keys()


def test_front_matter_survives_awkward_names() -> None:
    name = 'it\'s: "a" #1 {model}'
    record = replace(RECORD_OF_DELTAS, name=name, calibrated=Text("a: b.txt", 5))

    data = ModelCard(render_card(record)).data.to_dict()

    assert data["model-index"][0]["name"] == name


def test_a_later_stage_adds_what_it_did(tmp_path: Path) -> None:
    write_card(tmp_path, RECORD_OF_DELTAS)
    record = read_record(tmp_path)
    assert record == RECORD_OF_DELTAS
    before = (tmp_path / PLOT).read_bytes()

    healed = Healed(Text("org/text:all:train:text", 10_000_000), "forward KL", "deltas", 500)
    measured = with_stage(record.measured, HELD_OUT, [HEALED])
    write_card(tmp_path, replace(record, name="better", healed=healed, measured=measured))

    again = read_record(tmp_path)
    assert again.healed == healed
    assert again.measured is not None
    assert [stage.stage for stage in again.measured.stages] == ["teacher", "distilled", "healed"]
    card = (tmp_path / "README.md").read_text()
    told = " ".join(card.split())
    assert "500 steps on 10,000,000 tokens of org/text:all:train:text" in told
    assert "loss: forward KL; trained: deltas." in told
    assert "Not healed" not in told and "healed end to end | 0.1100 [0.1000, 0.1200]" in told
    data = ModelCard(card).data.to_dict()
    assert data["datasets"] == ["org/code", "org/text"]
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.11
    assert (tmp_path / PLOT).read_bytes() != before


def test_figures_on_another_text_do_not_stand_beside() -> None:
    other = Text("other.txt", 5)

    measured = with_stage(RECORD_OF_DELTAS.measured, other, [TEACHER, HEALED])

    assert measured == Measured(other, (TEACHER, HEALED))


def test_a_stage_measured_again_keeps_its_place() -> None:
    newer = replace(DISTILLED, kl=0.1)

    measured = with_stage(RECORD_OF_DELTAS.measured, HELD_OUT, [newer])

    assert measured.stages == (TEACHER, newer)


def test_healed_but_not_measured_since() -> None:
    healed = Healed(Text("a.txt", 10), "forward KL", "everything", 5, {"learning rate": 1e-4})
    told = words(replace(RECORD_OF_DELTAS, healed=healed))

    assert "Healed since it was measured" in told
    assert "trained: everything; learning rate 0.0001." in told


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_card(tmp_path / name, RECORD_OF_DELTAS)

    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted([RECORD, PLOT, "README.md"])
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_without_figures_an_old_plot_goes(tmp_path: Path) -> None:
    write_card(tmp_path, RECORD_OF_DELTAS)

    write_card(tmp_path, replace(RECORD_OF_DELTAS, measured=None))

    assert not (tmp_path / PLOT).exists()


def test_infinite_figures_are_left_out(tmp_path: Path) -> None:
    inf = float("inf")
    quality = Quality(9, 2, 800.0, inf, 1.0, 0.5, {"kl": (0.5, 1.5), "perplexity": (2.0, inf)})

    metrics = metrics_of("distilled", quality)

    assert (metrics.perplexity, metrics.intervals) == (None, {"kl": (0.5, 1.5)})
    write_card(tmp_path, replace(RECORD_OF_DELTAS, measured=Measured(HELD_OUT, (metrics,))))
    json.loads((tmp_path / RECORD).read_text(), parse_constant=pytest.fail)


def test_the_teachers_figures_are_its_own() -> None:
    quality = Quality(9, 2, 1.0, 2.7, 0.0, 1.0, {"kl": (0.0, 0.0), "cross_entropy": (0.9, 1.1)})

    metrics = metrics_of("teacher", quality)

    assert metrics == Metrics("teacher", 1.0, 2.7, intervals={"cross_entropy": (0.9, 1.1)})


def test_a_single_sequence_has_no_intervals() -> None:
    bare = replace(DISTILLED, intervals={})
    told = words(replace(RECORD_OF_DELTAS, measured=Measured(HELD_OUT, (bare,))))

    assert "the text is a single sequence" in told


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: "[]",
        lambda value: "{",
        lambda value: json.dumps({"version": 1}),
        lambda value: json.dumps({**value, "measured": 3}),
        lambda value: json.dumps({**value, "base": {}}),
    ],
)
def test_a_damaged_record_is_told(damage: Any, tmp_path: Path) -> None:
    text = damage(RECORD_OF_DELTAS.to_json())
    (tmp_path / RECORD).write_text(text)

    with pytest.raises(UserError, match="is no record of a model card"):
        read_record(tmp_path)


def test_no_record_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no moefuse_card\.json"):
        read_record(tmp_path)


def test_fields_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    value = RECORD_OF_DELTAS.to_json()
    value["base"]["colour"] = "blue"
    (tmp_path / RECORD).write_text(json.dumps(value))

    assert read_record(tmp_path) == RECORD_OF_DELTAS
