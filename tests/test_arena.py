"""The arena: every method at the same bytes, whole, in parts, and after a kill."""

import itertools
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Ran, changes, run_elsewhere, run_here, write_text
from tiny import BOS, EOS, VOCABULARY, save_tiny, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from moefuse.arena.bench import LIKE_OURS, Bench
from moefuse.arena.cells import OURS, Cell, Wishes, contestants, is_structural, part_of
from moefuse.arena.front import best_at, last_stage, pareto_front, ratio_table, ratio_table_16_bits
from moefuse.arena.plot import AXES_POINTS, NAME_POINTS, spaced
from moefuse.arena.report import Impossible, comparison_markdown
from moefuse.arena.run import Comparison, compare
from moefuse.arena.students import distillation_of, make_contenders
from moefuse.baselines import method_names
from moefuse.comparison import DISTILLED, ONE_SHOT, index_bytes, model_with
from moefuse.errors import UserError
from moefuse.evaluation.generate import INFILL_STYLES
from moefuse.evaluation.report import read_report
from moefuse.evaluation.rows import TEACHER, Row, TaskScores
from moefuse.evaluation.run import evaluate_command, load_model
from moefuse.evaluation.tasks import prepare_tasks, run_tasks
from moefuse.pipeline import Job

VALUES: dict[str, Any] = {
    "tokens": 512,
    "sequence_length": 64,
    "batch_size": 4,
    "steps": 3,
    "batch_tokens": 64,
}
FLAGS = (
    *("--tokens", "512", "--sequence-length", "64", "--batch-size", "4"),
    *("--steps", "3", "--batch-tokens", "64", "--data", "text.txt"),
    *("--held-out", "held.txt", "--held-out-tokens", "192"),
)
FEW = ("--methods", "reap,signs", "--fractions", "0.25", "--seeds", "1", "--bits", "16,2")
STRUCTURAL = [name for name in method_names() if is_structural(name)]
MEASURED_ANEW = {"seconds": None, "peak_bytes": None}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 teacher with one MoE layer, and beside it two texts."""
    directory = tmp_path_factory.mktemp("arena")
    save_tiny(directory / "teacher", num_hidden_layers=2, dtype=torch.bfloat16)
    write_text(directory / "text.txt")
    write_text(directory / "held.txt", lines=20)
    return directory / "teacher"


def compared(teacher: Path, out: Path, wishes: Wishes, **more: Any) -> Comparison:
    values = {**VALUES, "data": str(teacher.parent / "text.txt")}
    held_out = str(teacher.parent / "held.txt")
    return compare(teacher, out, values, wishes, held_out=held_out, held_out_tokens=192, **more)


def timeless(rows: Sequence[Row]) -> list[Row]:
    return [replace(row, **MEASURED_ANEW) for row in rows]


def bench_of(teacher: Path, work: Path, quantise: str = "inside", **more: Any) -> Bench:
    def job_for(values: dict[str, Any]) -> Job:
        text = str(teacher.parent / "text.txt")
        return Job(teacher, work, {**VALUES, "data": text, **more, **values})

    job = job_for(LIKE_OURS)
    job.calibrate()
    return Bench(job, job_for, quantise)


def test_every_rival_by_name(teacher: Path, tmp_path: Path) -> None:
    found = compared(teacher, tmp_path / "out", Wishes(tuple(method_names()), (0.5,), 1, bits=(4,)))

    assert found.missing == 0
    assert found.rows[0].method == TEACHER
    assert {row.method for row in found.rows[1:]} == set(method_names())
    assert not found.impossible
    for row in found.rows[1:]:
        assert row.stage in (ONE_SHOT, DISTILLED)
        assert row.seed == 0
        assert row.tokens
        assert row.kl is not None
        assert row.kl >= 0
        assert (row.fraction == 0.5) == is_structural(row.method)
        assert row.parameters is not None
        assert row.active_parameters is not None
        assert row.active_parameters <= row.parameters
        assert row.expert_bytes is not None
        assert row.bpw == pytest.approx(8 * row.expert_bytes / (8 * 3 * 32 * 16))
    meta, rows = read_report(tmp_path / "out" / "compare.json")
    assert rows == found.rows
    assert meta["command"] == "moefuse compare"
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 10_000
    report = (tmp_path / "out" / "compare.md").read_text()
    for name in method_names():
        assert f"| {name} |" in report


@pytest.mark.parametrize("bits", [16, 4, 2])
@pytest.mark.parametrize("name", STRUCTURAL)
def test_budgets_hold_in_true_bytes(
    name: str, bits: float, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bench = bench_of(teacher, teacher.parent / "work", steps=0)
    budget = 8 * 3 * 32 * 16 * 2 // 4

    (made,) = make_contenders(bench, Cell(name, bits, 0.25, 0))

    maps = sum(index_bytes(student) for student in made.students.values())
    assert 0.5 * budget < made.footprint.bytes - maps <= budget
    assert maps <= 64 * 2
    assert made.stage == ONE_SHOT


def test_parts_make_the_whole(teacher: Path, tmp_path: Path) -> None:
    wishes = Wishes(("reap", "signs"), (0.5, 0.25), 2, bits=(16, 2))
    whole = compared(teacher, tmp_path / "whole", wishes)

    first = compared(teacher, tmp_path / "parts", wishes, part="0/2")
    assert first.missing == len(wishes.cells()) // 2
    assert not (tmp_path / "parts" / "compare.json").exists()
    second = compared(teacher, tmp_path / "parts", wishes, part="1/2")

    assert second.missing == 0
    assert timeless(second.rows) == timeless(whole.rows)
    assert (tmp_path / "parts" / "compare.md").is_file()
    assert {row.seed for row in whole.rows[1:]} == {0, 1}


def test_a_report_holds_what_earlier_commands_measured(teacher: Path, tmp_path: Path) -> None:
    first = compared(teacher, tmp_path, Wishes(("reap",), (0.5,), 1, bits=(16,)))
    both = compared(teacher, tmp_path, Wishes(("signs",), (0.5,), 1))
    kept = [row for row in timeless(both.rows) if row.method == "reap"]
    assert kept == timeless(first.rows)[1:]
    assert {row.method for row in both.rows} == {"teacher", "reap", "signs"}
    assert both.missing == 0


def test_a_killed_run_goes_on(teacher: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(teacher.parent)
    command = ("compare", "teacher", tmp_path / "out", *FEW, *FLAGS)
    assert run_elsewhere(tmp_path / "log", *command) == 0
    _, whole = read_report(tmp_path / "out" / "compare.json")
    renamed = [
        number
        for number, (kind, path) in enumerate(changes(tmp_path / "log"), start=1)
        if kind == "os.rename" and "cells" in path
    ]
    (tmp_path / "out").rename(tmp_path / "whole")

    status = run_elsewhere(tmp_path / "log", *command, die_at=renamed[1])
    assert status == -signal.SIGKILL
    done = list((tmp_path / "out" / "cells").glob("*.json"))
    assert len(done) == 1
    before = done[0].stat().st_mtime_ns
    assert run_elsewhere(tmp_path / "log", *command) == 0

    _, rows = read_report(tmp_path / "out" / "compare.json")
    assert timeless(rows) == timeless(whole)
    assert done[0].stat().st_mtime_ns == before


def test_other_settings_are_not_mixed(teacher: Path, tmp_path: Path) -> None:
    compared(teacher, tmp_path / "out", Wishes(("signs",), (0.5,), 1))
    with pytest.raises(UserError, match=r"signs-1bit-seed0.json was measured with other settings"):
        compared(teacher, tmp_path / "out", Wishes(("signs",), (0.5,), 1, quantise="after"))


def test_what_cannot_be_made_is_told(teacher: Path, tmp_path: Path) -> None:
    wishes = Wishes(("reap", "signs"), (0.05, 0.25), 1, bits=(16,))

    found = compared(teacher, tmp_path / "out", wishes)

    (impossible,) = found.impossible
    assert (impossible.method, impossible.fraction, impossible.bits) == ("reap", 0.05, 16)
    assert "hold no expert" in impossible.reason
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert stored["impossible"] == [vars(impossible)]
    assert impossible.reason in (tmp_path / "out" / "compare.md").read_text()
    again = compared(teacher, tmp_path / "out", wishes)
    assert (again.rows, again.impossible) == (found.rows, found.impossible)


def test_rounding_inside_beats_rounding_after(teacher: Path, tmp_path: Path) -> None:
    """Both begin with the same rounded student; training that knows of the rounding ends better."""
    cell = Cell("reap", 2, 0.25, 0)
    more = {"steps": 80, "batch_tokens": 256}
    kinds = {
        kind: bench_of(teacher, tmp_path / "work", kind, **more) for kind in ("inside", "after")
    }
    made = {kind: make_contenders(bench, cell) for kind, bench in kinds.items()}
    call = kinds["inside"].call(1)

    def error(kind: str, stage: int) -> float:
        student = made[kind][stage].students[1]
        output = student(call.x_TD, call.index_TK.long(), call.weight_TK)
        return float((output - call.y_TD).square().mean())

    assert error("inside", 0) == error("after", 0)
    assert error("inside", 1) < error("inside", 0)
    assert error("inside", 1) < error("after", 1)
    assert [found.footprint for found in made["inside"]] == [
        found.footprint for found in made["after"]
    ]


def test_rivals_are_distilled_against_the_loss_of_this_design(teacher: Path) -> None:
    job = bench_of(teacher, teacher.parent / "work").job
    ours = bench_of(teacher, teacher.parent / "work").job_for({"expert_bits": 8.0})

    shared = job.metric_root(1)

    assert shared is not None
    assert shared.equal(ours.metric_root(1))  # type: ignore[arg-type]


def test_fewer_bits_take_smaller_steps(teacher: Path) -> None:
    def rates(cell: Cell, quantise: str = "inside") -> tuple[float, float]:
        bench = bench_of(teacher, teacher.parent / "work", quantise, learning_rate=2e-3)
        options = distillation_of(bench, cell)
        assert options.steps == bench.job.distillation.steps
        return options.learning_rate, options.scale_learning_rate

    assert rates(Cell("reap", 2, 0.25, 0)) == (5e-4, 1e-2)
    assert rates(Cell("reap", 4, 0.25, 0)) == (1e-3, 1e-2)
    for whole in (Cell("reap", 8, 0.25, 0), Cell("reap", 16, 0.25, 0), Cell("gptq", 2, None, 0)):
        assert rates(whole) == (2e-3, 1e-2)
    assert rates(Cell("reap", 2, 0.25, 0), "after") == (2e-3, 1e-2)


def test_this_design_takes_part(teacher: Path, tmp_path: Path) -> None:
    found = compared(teacher, tmp_path / "out", Wishes(OURS, (0.5,), 1))

    assert not found.impossible
    rows = found.rows[1:]
    assert [(row.method, row.stage, row.bits) for row in rows] == [
        ("fused", ONE_SHOT, None),
        ("fused", DISTILLED, None),
        ("fused-bf16", ONE_SHOT, 16),
        ("fused-bf16", DISTILLED, 16),
    ]
    for row in rows:
        assert row.bpw is not None
        assert 4 < row.bpw <= 8 * 1.01
        assert row.active_parameters is not None
        assert row.active_parameters > 0
        assert row.advice is not None
    report = (tmp_path / "out" / "compare.md").read_text()
    assert f"| yes | {rows[1].advice} |" in report.split("## What the planner chose")[1]


# Which cells there are.


def test_cells_have_names_of_their_own() -> None:
    cells = Wishes(tuple(contestants()), (0.5, 1 / 3), 2).cells()

    assert len({cell.name for cell in cells}) == len(cells)
    assert Cell("gptq", 1.58, None, 1) in cells
    assert Cell("reap", 4, 0.5, 0) in cells
    assert Cell("fused", None, 0.5, 1) in cells
    assert Cell("fused-bf16", 16, 0.5, 1) in cells
    assert {cell.seed for cell in Wishes(("reap",), (0.5,), 2, first_seed=7).cells()} == {7, 8}


def test_every_part_has_its_own_cells() -> None:
    cells = Wishes(("reap", "gptq"), (0.5, 0.25), 3).cells()

    parts = [part_of(cells, f"{number}/4") for number in range(4)]

    assert sorted(cell.name for part in parts for cell in part) == sorted(c.name for c in cells)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert part_of(cells, None) == cells


@pytest.mark.parametrize("part", ["4/4", "1", "-1/2", "a/b", "1/", "/2"])
def test_a_part_that_is_none(part: str) -> None:
    with pytest.raises(UserError, match="--part is"):
        part_of(Wishes(("reap",), (0.5,), 1).cells(), part)


# Fronts, bests and ratios.


def made(method: str, bpw: float, kl: float, **more: Any) -> Row:
    values: dict[str, Any] = {"stage": "distilled", "seed": 0, "fraction": bpw / 16, **more}
    return Row(method=method, bpw=bpw, kl=kl, **values)


ROWS = [
    Row(method=TEACHER, bpw=16.0, kl=0.0, active_parameters=1000),
    made("fused", 1.0, 0.4, seed=0, active_parameters=900),
    made("fused", 1.0, 0.6, seed=1, active_parameters=900),
    made("fused-bf16", 1.0, 1.0, bits=16, active_parameters=800),
    made("reap", 1.0, 2.0, bits=16),
    made("reap", 0.9, 0.9, bits=4, fraction=1 / 16),
    made("reap", 1.0, 1.5, bits=2),
    made("hc-smoe", 1.0, 1.6, bits=16),
    made("reap", 2.0, 0.1, bits=4),
    made("gptq", 1.9, 0.2, bits=2, fraction=None),
    made("gptq", 1.9, 9.0, bits=2, fraction=None, stage="one-shot"),
    made("reap", 0.5, 0.01, bits=4, fraction=1 / 16, stage="one-shot"),
]


def test_the_front_holds_what_nothing_beats() -> None:
    front = pareto_front(last_stage(ROWS))

    assert [(point.method, point.bpw, point.kl) for point in front] == [
        ("reap", 0.9, 0.9),
        ("fused", 1.0, 0.5),
        ("gptq", 1.9, 0.2),
        ("reap", 2.0, 0.1),
    ]
    twins = [made("a", 1.0, 0.5), made("b", 1.0, 0.5), made("c", 1.0, 0.6), made("d", 1.1, 0.5)]
    assert [point.method for point in pareto_front(twins)] == ["a", "b"]


def test_the_best_at_a_budget() -> None:
    measured = last_stage(ROWS)

    best = best_at(measured, 1.0)

    assert {name: (point.bits, point.kl) for name, point in best.items()} == {
        "fused": (None, 0.5),
        "fused-bf16": (16, 1.0),
        "reap": (4, 0.9),
        "hc-smoe": (16, 1.6),
    }
    assert best_at(measured, 0.5) == {}
    assert best_at(measured, 1.9)["gptq"].kl == 0.2
    assert best_at([made("maps on top", 1.009, 1.0)], 1.0)
    assert not best_at([made("too large", 1.02, 1.0)], 1.0)


def test_ratios_at_equal_bytes_and_at_equal_parameters() -> None:
    by_budget = {ratio.budget: ratio for ratio in ratio_table(ROWS)}

    assert by_budget.keys() == {2.0, 1.0}
    assert by_budget[1.0].value == pytest.approx(0.9 / 0.5)
    assert by_budget[2.0].value == pytest.approx(0.1 / 0.5)
    one = by_budget[1.0].rival
    assert one is not None
    assert (one.method, one.bits) == ("reap", 4)
    (whole,) = ratio_table_16_bits(ROWS)
    assert whole.value == pytest.approx(1.6 / 1.0)
    (alone,) = ratio_table([made("reap", 1.0, 0.5)])
    assert (alone.ours, alone.value) == (None, None)


def test_names_in_the_plot_are_apart_and_below_the_title() -> None:
    crowded = spaced([300.0, 301.0, 302.0, 340.0, 345.0])
    assert spaced([10.0, 200.0]) == [10.0, 200.0]
    assert spaced([10.0, 11.0]) == [10.0, 10.0 + NAME_POINTS]
    assert max(crowded) <= AXES_POINTS and crowded == sorted(crowded)
    assert all(b - a >= NAME_POINTS - 1e-9 for a, b in itertools.pairwise(crowded))


def test_the_report_tells_all() -> None:
    impossible = [Impossible("d2-moe", 2, 1 / 32, seed, "no base fits") for seed in (0, 1)]

    text = comparison_markdown({"command": "moefuse compare"}, ROWS, impossible)

    assert "| 1 | 0.500 ± 0.141 | reap, 4-bit: 0.900 | 1.80 |" in text
    assert "| 1 | 1.000 | hc-smoe, 16-bit: 1.600 | 1.60 |" in text
    assert "| d2-moe | 2 | 0.03125 | 0, 1 | no base fits |" in text
    assert "| fused | 1.000 | 900 | 90.0% |" in text
    budget = text.split("## Budget 0.0625")[1].split("## ")[0]
    assert "| reap | 4 | **0.010** | **0.900** |" in budget
    assert "| reap | 2 | - | 1.500 |" in budget
    assert "gptq" not in budget
    assert (
        "| gptq | 2 | **9.000** | **0.200** |" in text.split("## Budget 0.125")[1].split("## ")[0]
    )


# The command.


@pytest.fixture
def run(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    monkeypatch.chdir(teacher.parent)
    return lambda *arguments: run_here(capfd, *arguments)


def test_the_command(run: Callable[..., Ran], tmp_path: Path) -> None:
    ran = run("compare", "teacher", tmp_path / "out", *FEW, *FLAGS, "--json")

    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert found == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found.keys() == {"meta", "rows", "impossible"}
    assert len(found["rows"]) == 1 + 2 * 3
    assert "reap-2bit-0.25-seed0: KL " in ran.err
    again = run("compare", "teacher", tmp_path / "out", *FEW, *FLAGS)
    assert again.status == 0, again.err
    assert "At equal true bytes" in again.out
    assert "Compare:" not in again.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--methods", "reap,nonsense"), "There is no method 'nonsense'; choose from fused, "),
        (("--methods", ","), "--methods names nothing"),
        (("--fractions", "0.5,0"), "--fractions has 0; a share lies above 0, up to 1."),
        (("--fractions", "1.5"), "--fractions has 1.5;"),
        (("--fractions", "half"), "--fractions is 'half'; give numbers with commas between."),
        (("--seeds", "0"), "--seeds is 0; it must be at least 1."),
        (("--bits", "5"), "--bits has 5; choose from 16, 8, 4, 3, 2, 1.58, 1."),
        (("--quantise", "before"), "--quantise is 'before'; choose inside or after."),
        (("--part", "2/2"), "--part is '2/2'; give a part such as 0/4, the first of four."),
        (("--held-out", "absent.txt"), "absent.txt"),
        (("--held-out-tokens", "1"), "--held-out-tokens is 1; it must be at least 2."),
        (("--tasks", "python_infil_line"), "python_infil_line is neither a task"),
        (("--tasks", ","), "--tasks names no task"),
        (("--limit", "2"), "--limit and --num-fewshot are about tasks"),
    ],
)
def test_wrong_wishes(
    flags: tuple[str, ...], told: str, run: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = run("compare", "teacher", tmp_path / "out", *FEW, *FLAGS, *flags)

    assert ran.status == 2
    assert told in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["--data", "--held-out"])
def test_another_teacher_needs_texts(missing: str, run: Callable[..., Ran], tmp_path: Path) -> None:
    place = FLAGS.index(missing)
    flags = (*FLAGS[:place], *FLAGS[place + 2 :])

    ran = run("compare", "teacher", tmp_path / "out", *FEW, *flags)

    assert ran.status == 2
    assert f"Say with {missing} what text to " in ran.err
    assert not (tmp_path / "out").exists()


# Tasks of lm-evaluation-harness; the one on filling in needs a tokenizer with tokens for it.

INFILL = "python_infill_line"
MARKERS = INFILL_STYLES[0].tokens
SCORES = {"exact_match", "exact_match_stderr", "edit_similarity", "edit_similarity_stderr"}
TASKS: dict[str, Any] = {"tasks": [INFILL], "limit": 3}


@pytest.fixture(scope="module")
def infilling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose tokenizer knows filling in, and beside it two texts."""
    directory = tmp_path_factory.mktemp("infilling")
    changes: dict[str, Any] = {"vocab_size": VOCABULARY + len(MARKERS), "num_hidden_layers": 2}
    save_tiny(directory / "teacher", dtype=torch.bfloat16, max_position_embeddings=4096, **changes)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()),
        bos_token=BOS,
        eos_token=EOS,
    )
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    tokenizer.save_pretrained(directory / "teacher")
    write_text(directory / "text.txt")
    write_text(directory / "held.txt", lines=20)
    return directory / "teacher"


def scores_of(bench: Bench, cell: Cell) -> TaskScores:
    """Make a cell's last student anew and run the task on it, without the arena."""
    students = make_contenders(bench, cell)[-1].students
    student = model_with(bench.teacher, bench.job.reader.family, students)
    _, tokenizer = load_model(bench.job.reader.directory)
    prepared = prepare_tasks([INFILL], tokenizer, limit=3)
    return run_tasks(prepared, student, tokenizer, batch_size=4)[0]


def test_tasks_are_measured_on_the_last_students(infilling: Path, tmp_path: Path) -> None:
    out, wishes = tmp_path / "out", Wishes(("reap", "signs"), (0.25,), 1, bits=(16,))

    found = compared(infilling, out, wishes, **TASKS)

    alone = evaluate_command(str(infilling), batch_size=4, dtype="float32", **TASKS)
    teacher, *students = found.rows
    assert teacher.tasks == alone.rows[0].tasks
    last = [row for row in students if row.stage == DISTILLED]
    assert [row.tasks for row in students if row.stage == ONE_SHOT] == [None, None]
    bench = bench_of(infilling, tmp_path / "work")
    assert [row.tasks for row in last] == [scores_of(bench, cell) for cell in wishes.cells()]
    likeness = [(row.tasks or {})[INFILL]["edit_similarity"] for row in (teacher, *last)]
    assert len(set(likeness)) == 3
    assert found.meta["tasks"] == alone.meta["tasks"]
    assert read_report(out / "compare.json")[1] == found.rows
    budget = (out / "compare.md").read_text().split("## Budget 0.25")[1].split("## ")[0]
    assert f"| distilled | {INFILL} exact_match | {INFILL} edit_similarity | Expert bytes" in budget
    line = next(line for line in budget.splitlines() if line.startswith("| reap |"))
    assert line.split(" | ")[4:6] == ["0.000", f"{likeness[1]:.3f}"]


def test_tasks_go_on_where_they_were(infilling: Path, tmp_path: Path) -> None:
    out, wishes = tmp_path / "out", Wishes(("reap", "signs"), (0.25,), 1, bits=(16,))
    first = compared(infilling, out, wishes, part="0/2", **TASKS)
    assert first.missing == 1
    (measured,) = (out / "work").glob("tasks-*.json")
    (done,) = (out / "cells").glob("*.json")
    before = [path.stat().st_mtime_ns for path in (measured, done)]

    found = compared(infilling, out, wishes, **TASKS)

    assert found.missing == 0
    assert [path.stat().st_mtime_ns for path in (measured, done)] == before
    assert list((out / "work").glob("tasks-*.json")) == [measured]
    assert found.rows[0].tasks == read_report(measured)[1][0].tasks
    assert timeless(found.rows) == timeless(
        compared(infilling, tmp_path / "whole", wishes, **TASKS).rows
    )
    asked = {"names": [INFILL], "limit": 3, "num_fewshot": None}
    assert json.loads(done.read_text())["settings"]["tasks"] == asked
    for other in ({}, {**TASKS, "limit": 2}, {**TASKS, "num_fewshot": 0}):
        with pytest.raises(UserError, match="was measured with other settings"):
            compared(infilling, out, wishes, **other)


def test_tasks_from_the_command_line(
    infilling: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(infilling.parent)
    flags = ("--tasks", INFILL, "--limit", "1", "--num-fewshot", "3", "--steps", "0", "--json")

    ran = run_here(capfd, "compare", "teacher", "told", *FEW, *FLAGS, *flags)

    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert {row["stage"] for row in found["rows"]} == {None, ONE_SHOT}
    assert all(row["tasks"][INFILL].keys() == SCORES for row in found["rows"])
    # The task fixes zero examples, and says so.
    assert found["meta"]["tasks"]["num_fewshot"] == {INFILL: 0}
    assert found["meta"]["tasks"]["items"] == {INFILL: 1}


def test_cells_without_tasks_know_of_none(teacher: Path, tmp_path: Path) -> None:
    found = compared(teacher, tmp_path / "out", Wishes(("signs",), (0.5,), 1))

    stored = json.loads((tmp_path / "out" / "cells" / "signs-1bit-seed0.json").read_text())
    assert "tasks" not in stored
    assert "tasks" not in stored["settings"]
    assert [row.tasks for row in found.rows] == [None] * 3
    assert found.meta["tasks"] is None
    assert "asks" not in (tmp_path / "out" / "compare.md").read_text()
    assert not list((tmp_path / "out" / "work").glob("tasks-*"))


def test_seeds_of_a_task_are_averaged() -> None:
    def scored(seed: int, score: float) -> Row:
        return made("reap", 1.0, 0.5, seed=seed, tasks={"t": {"acc": score, "acc_stderr": 0.1}})

    rows = [*ROWS, scored(0, 0.25), scored(1, 0.75)]

    text = comparison_markdown({"command": "moefuse compare"}, rows, [])

    budget = text.split("## Budget 0.0625")[1].split("## ")[0]
    assert "| Method | Bits | one-shot | distilled | t acc | Expert bytes |" in budget
    assert "Scores of tasks are those of the last stage's students" in budget
    assert "| reap | - | - | **0.500** ± 0.000 | 0.500 ± 0.354 | - |" in budget
    assert "| fused | - | - | **0.500** ± 0.141 | - | - |" in budget
