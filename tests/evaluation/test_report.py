import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefuse.errors import UserError
from moefuse.evaluation import report
from moefuse.evaluation.report import Row, markdown_table, read_report, write_report
from moefuse.evaluation.tables import COLUMNS, human_bytes

TEACHER = Row(
    method="teacher", groups=64, expert_bytes=28_800_000, cross_entropy=1.7534, perplexity=5.774
)


def row(method: str, groups: int | None, stage: str | None, kl: float, **more: Any) -> Row:
    size = None if groups is None else groups * 1_000_000
    values = {"expert_bytes": size, "agreement": 0.75, **more}
    return Row(method=method, groups=groups, stage=stage, kl=kl, **values)


def test_the_schema_is_the_contract() -> None:
    names = [field.name for field in fields(Row)]
    assert names == [
        *("method", "groups", "rank", "bits", "seed", "stage", "tokens", "parameters"),
        *("active_parameters", "expert_bytes", "total_bytes", "kl", "cross_entropy"),
        *(
            "perplexity",
            "agreement",
            "seconds",
            "peak_bytes",
            "intervals",
            "tasks",
            "bpw",
            "fraction",
            "advice",
            "healed_tokens",
        ),
    ]
    assert set(COLUMNS) == set(names) - {"intervals", "tasks", "advice"}


def test_one_line_a_size_and_one_column_a_method_and_stage() -> None:
    rows = [
        TEACHER,
        row("fused", 8, "distilled", 0.5961),
        row("fused", 8, "one-shot", 1.036),
        row("reap", 8, "one-shot", 1.131, expert_bytes=8_850_000),
        row("reap", 8, "distilled", 0.646, agreement=None),
        row("fused", 16, "one-shot", 0.0001),
    ]
    assert markdown_table(rows) == (
        "| Fused experts | Expert bytes | fused, one-shot | reap, one-shot | fused, distilled "
        "| reap, distilled |\n"
        "| ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| 16 | 16 MB | 1.0e-04 (75.0%) | - | - | - |\n"
        "| 8 | 8 MB to 8.85 MB | **1.036** (75.0%) | 1.131 (75.0%) | **0.596** (75.0%) "
        "| 0.646 |\n"
        "\n"
        "Teacher (64 experts a layer): 28.8 MB of experts, cross-entropy 1.753, perplexity 5.77.\n"
    )


def test_seeds_become_a_mean_and_a_spread() -> None:
    rows = [row("fused", 8, None, kl, seed=seed) for seed, kl in enumerate([0.5, 0.6, 0.7])]
    rows += [row("reap", 8, None, 0.55, seed=0), row("reap", 8, None, 0.75, seed=1)]
    assert markdown_table(rows).splitlines() == [
        "| Fused experts | Expert bytes | fused | reap |",
        "| ---: | ---: | ---: | ---: |",
        "| 8 | 8 MB | **0.600** ± 0.100 (75.0%) | 0.650 ± 0.141 (75.0%) |",
    ]


def test_settings_that_share_a_cell_are_not_taken_for_seeds() -> None:
    rows = [
        row("fused", 8, None, 0.5, rank=8),
        row("fused", 8, None, 0.4, rank=16),
        row("quantized", None, None, 0.01, bits=3.0, expert_bytes=3_000_000),
        row("quantized", None, None, 0.002, bits=4.5, expert_bytes=4_500_000),
    ]
    assert markdown_table(rows).splitlines()[2:] == [
        "| - | 3 MB to 4.5 MB | - | 3-bit: 0.010 (75.0%)<br>4.5-bit: **0.002** (75.0%) |",
        "| 8 | 8 MB | R = 8: 0.500 (75.0%)<br>R = 16: **0.400** (75.0%) | - |",
    ]


def test_lines_by_equal_bytes() -> None:
    rows = [
        row("fused", 4, None, 0.6, expert_bytes=8_930_000),
        row("reap", 12, None, 0.65, expert_bytes=8_850_000),
        row("reap", 6, None, 0.9, expert_bytes=4_400_000),
    ]
    assert markdown_table(rows, by="expert_bytes").splitlines() == [
        "| Expert bytes | fused | reap |",
        "| ---: | ---: | ---: |",
        "| 8.85 MB to 8.93 MB | G = 4: **0.600** (75.0%) | G = 12: 0.650 (75.0%) |",
        "| 4.4 MB | - | G = 6: 0.900 (75.0%) |",
    ]


def test_tables_of_little() -> None:
    assert markdown_table([]) == "\n"
    assert markdown_table([Row(method="fused", groups=2)]) == "\n"
    assert markdown_table([Row(method="teacher", perplexity=2.0)]) == "Teacher: perplexity 2.00.\n"
    assert markdown_table([Row(method="a", kl=0.5)]).splitlines()[2] == "| - | - | 0.500 |"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (14.4e9, "14.4 GB")],
)
def test_sizes_as_people_write_them(size: float, text: str) -> None:
    assert human_bytes(size) == text


# Files

FINITE = st.floats(allow_nan=False, allow_infinity=False)
ROWS = st.builds(
    Row,
    method=st.text(min_size=1, max_size=9),
    groups=st.none() | st.integers(1, 256),
    bits=st.none() | FINITE,
    stage=st.none() | st.sampled_from(["one-shot", "distilled", "healed"]),
    kl=st.none() | FINITE,
    intervals=st.none() | st.dictionaries(st.text(max_size=5), st.tuples(FINITE, FINITE)),
)


@settings(max_examples=40)
@given(st.lists(ROWS, max_size=3))
def test_reports_come_back_as_they_were(rows: list[Row]) -> None:
    text = json.dumps(report.report_json({"command": "x"}, rows), allow_nan=False)
    assert [report.row_from_json(item) for item in json.loads(text)["rows"]] == rows


def test_a_report_is_three_files(tmp_path: Path) -> None:
    rows = [TEACHER, row("fused", 8, "one-shot", 0.5, intervals={"kl": (0.4, 0.6)})]
    rows.append(row("fused", 4, "one-shot", 0.7, perplexity=math.inf))
    meta = {"command": "moefuse eval", "data": {"name": "a.txt", "tokens": 5}, "nothing": None}
    write_report(tmp_path / "new", meta, rows)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "quality.png",
        "report.json",
        "report.md",
    ]
    found_meta, found = read_report(tmp_path / "new" / "report.json")
    assert found_meta == meta
    assert found[:2] == rows[:2]
    assert asdict(found[2]) == {**asdict(rows[2]), "perplexity": None}
    page = (tmp_path / "new" / "report.md").read_text()
    assert markdown_table(rows).strip() in page
    assert "quality.png" in page
    assert "0.500 [0.400, 0.600]" in page
    assert "- data: name `a.txt`, tokens 5\n" in page and "nothing" not in page


def test_a_report_without_anything_to_compare_has_no_picture(tmp_path: Path) -> None:
    write_report(tmp_path, {}, [Row(method="fused", perplexity=4.0)])
    assert not (tmp_path / "quality.png").exists()
    assert "quality.png" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"meta": {}, "rows": [{"method": "a", "odd": 1}]}', "\0"]
)
def test_what_is_no_report_is_told(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match="is no moefuse report"):
        read_report(tmp_path)
