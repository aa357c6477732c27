import json
import random
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import run_here
from tiny import TEXT, save_tiny, tiny_config, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from moefuse import demo
from moefuse.demo.teacher_data import is_heldout
from moefuse.errors import UserError
from moefuse.evaluation import run
from moefuse.evaluation.generate import INFILL_STYLES, Decoding, InfillMarkers, infill
from moefuse.evaluation.loading import load_model
from moefuse.evaluation.local_tasks import harness
from moefuse.evaluation.local_tasks.make_items import FOLDER, make_items, to_jsonl
from moefuse.evaluation.local_tasks.scoring import completes_function, edit_similarity, same_line
from moefuse.evaluation.report import read_report, write_report
from moefuse.evaluation.rows import Row
from moefuse.evaluation.run import evaluate_command
from moefuse.evaluation.tables import listing, markdown_table
from moefuse.evaluation.tasks import prepare_tasks
from moefuse.modeling import fused_classes

OWN = ("python_infill_line", "python_function_parses")
# What ``compare`` needs to get as far as its tasks.
COMPARED = (
    "--data",
    "text.txt",
    "--held-out",
    "text.txt",
    "--tokens",
    "32",
    "--sequence-length",
    "8",
)

# A task as people write one: a YAML file with the Python file that it names beside it.

CHOICES = """
    task: which_word
    custom_dataset: !function which_word.documents
    output_type: multiple_choice
    test_split: test
    doc_to_text: "{{text}}"
    doc_to_choice: choices
    doc_to_target: answer
    metric_list:
      - metric: acc
        aggregation: mean
        higher_is_better: true
"""
DOCUMENTS = """
    from datasets import Dataset

    def documents(**_):
        return {{"test": Dataset.from_list({items!r})}}
"""


def items(count: int = 12) -> list[dict[str, Any]]:
    draw = random.Random(0)
    words = ["first", "second", "return", "line", "print", "total", "done"]
    return [
        {
            "text": " ".join(draw.choices(words, k=4)),
            "choices": draw.sample(words, k=2),
            "answer": draw.randrange(2),
        }
        for _ in range(count)
    ]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "which_word.py").write_text(textwrap.dedent(DOCUMENTS).format(items=items()))
    path = folder / "which_word.yaml"
    path.write_text(textwrap.dedent(CHOICES))
    return path


@pytest.fixture
def student(tmp_path: Path) -> str:
    """A fused checkpoint with random weights."""
    path = tmp_path / "student"
    config_class, _, causal = fused_classes("deepseek_v2")
    options = tiny_config().to_dict()
    options.pop("model_type")
    layer = {"groups": 3, "rank": 4, "delta": "low_rank", "scale": True, "bias": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = causal(config_class(**options, moefuse={"layers": {"1": layer, "2": layer}}))
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def right_answers(path: str) -> list[float]:
    """1 for every item whose right answer is the likelier one, token by token."""
    model, tokenizer = load_model(path)
    found = []
    for item in items():
        sums = []
        for choice in item["choices"]:
            ids = tokenizer(f"{item['text']} {choice}").input_ids
            start = len(tokenizer(item["text"]).input_ids)
            with torch.no_grad():
                logits_TV = model(torch.tensor([ids])).logits[0].float()
            log_TV = logits_TV.log_softmax(-1)
            sums.append(sum(log_TV[t - 1, ids[t]].item() for t in range(start, len(ids))))
        found.append(float(sums.index(max(sums)) == item["answer"]))
    return found


# What is measured.


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_local_file_on_a_fused_checkpoint(student: str, task: Path, batch_size: int) -> None:
    expected = right_answers(student)
    assert 0 < sum(expected) < len(expected)

    report = evaluate_command(student, tasks=[str(task)], batch_size=batch_size)

    (row,) = report.rows
    error = statistics.stdev(expected) / len(expected) ** 0.5
    assert row.tasks == {
        "which_word": {
            "acc": pytest.approx(statistics.mean(expected)),
            "acc_stderr": pytest.approx(error),
        }
    }
    assert (row.tokens, row.cross_entropy, row.kl, report.meta["data"]) == (None,) * 4
    assert row.parameters and row.total_bytes
    assert report.meta["tasks"]["items"] == {"which_word": 12}


def test_infilling_is_what_generate_fills_in() -> None:
    path = str(demo.teacher_path())
    report = evaluate_command(
        path, tasks=["python_infill_line"], limit=3, batch_size=1, dtype="float32"
    )

    model, tokenizer = load_model(path, dtype="float32")
    pairs = []
    for item in told_items("python_infill_line")[:3]:
        decoding = Decoding(max_new_tokens=48)
        text = infill(
            model, tokenizer, item["prefix"], item["suffix"], decoding, write=lambda _: None
        )
        pairs.append((text.split("\n")[0], item["line"]))
    assert report.rows[0].tasks is not None
    scores = report.rows[0].tasks["python_infill_line"]
    assert scores["exact_match"] == statistics.mean(same_line(*pair) for pair in pairs)
    likeness = statistics.mean(edit_similarity(*pair) for pair in pairs)
    assert scores["edit_similarity"] == pytest.approx(likeness)
    assert 0 < likeness < 1


def test_own_tasks_on_an_ordinary_checkpoint_from_the_command_line(
    tiny_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("eval", tiny_checkpoint(), "--tasks", "python_function_parses", "--limit", "2")
    ran = run_here(capfd, *arguments, "--num-fewshot", "3", "--json")

    assert ran.status == 0, ran.err
    report = json.loads(ran.out)
    scores = report["rows"][0]["tasks"]["python_function_parses"]
    assert scores.keys() == {"parses", "parses_stderr"}
    assert 0 <= scores["parses"] <= 1
    assert report["meta"]["tasks"]["items"] == {"python_function_parses": 2}
    # The task fixes zero examples, and says so.
    assert report["meta"]["tasks"]["num_fewshot"] == {"python_function_parses": 0}


def test_a_teacher_brings_text_and_is_measured_too(
    student: str, task: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    teacher = str(tiny_checkpoint())
    options: dict[str, Any] = {"tasks": [str(task)], "limit": 9, "num_fewshot": 1}

    report = evaluate_command(student, teacher, str(tmp_path / "text.txt"), **options)

    first, second = report.rows
    assert (first.method, first.kl) == ("teacher", 0.0)
    assert second.kl is not None and second.kl > 0
    assert first.tasks == evaluate_command(teacher, **options).rows[0].tasks
    assert second.tasks == evaluate_command(student, **options).rows[0].tasks
    assert report.meta["tasks"]["num_fewshot"] == {"which_word": 1}
    assert report.meta["tasks"]["items"] == {"which_word": 9}
    write_report(tmp_path / "report", report.meta, report.rows)
    assert read_report(tmp_path / "report") == (report.meta, report.rows)


def test_without_tasks_nothing_changes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    report = evaluate_command(str(tiny_checkpoint()), data=str(tmp_path / "text.txt"))
    assert (report.rows[0].tasks, report.meta["tasks"]) == (None, None)
    assert report.rows[0].cross_entropy is not None


def test_the_callers_random_numbers_are_left_alone(student: str, task: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluate_command(student, tasks=[str(task)], limit=1)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


# Which tasks are meant.


def named(wanted: list[str]) -> set[str]:
    return set(prepare_tasks(wanted, load_model(demo.teacher_path())[1]).loaded["tasks"])


def test_tasks_with_commas_or_again_and_only_once(task: Path) -> None:
    assert named([f"{OWN[0]}, {OWN[1]}", str(task), OWN[0], ""]) == {*OWN, "which_word"}


def test_a_folder_is_all_tasks_below_it(task: Path) -> None:
    other = task.parent / "below" / "other.yaml"
    other.parent.mkdir()
    (other.parent / "which_word.py").write_bytes(task.with_suffix(".py").read_bytes())
    other.write_text(task.read_text().replace("task: which_word", "task: other"))
    assert named([str(task.parent)]) == {"which_word", "other"}


def test_a_group_file_finds_its_tasks_beside_it(task: Path, student: str) -> None:
    group = task.with_name("group.yaml")
    group.write_text(
        "group: words\ntask: [which_word]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    scores = evaluate_command(student, tasks=[str(group)]).rows[0].tasks
    assert scores is not None and scores.keys() == {"words", "which_word"}
    assert scores["words"]["acc"] == pytest.approx(scores["which_word"]["acc"])


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run, "load_model", refuse)


@pytest.mark.usefixtures("unloadable")
def test_an_unknown_name_is_told_with_close_ones(
    tiny_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    ran = run_here(capfd, "eval", tiny_checkpoint(), "--tasks", "python_infil_line,helaswag")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert "python_infil_line is neither a task" in ran.err
    assert "did you mean python_infill_line" in ran.err


@pytest.mark.usefixtures("unloadable")
def test_bad_requests_are_told_before_a_model_is_loaded(
    tiny_checkpoint: Callable[..., Path], task: Path, tmp_path: Path
) -> None:
    model = str(tiny_checkpoint())

    def refused(match: str, tasks: list[str], **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            evaluate_command(model, tasks=tasks, **options)

    refused("about tasks", [], limit=3)
    refused("about tasks", [], num_fewshot=3)
    refused("names no task", [" , "])
    refused("limit of 0", [OWN[1]], limit=0)
    refused("-1 examples", [OWN[1]], num_fewshot=-1)
    refused("no tokens for filling in the middle", [OWN[0]])
    (tmp_path / "empty").mkdir()
    refused("holds no task", [str(tmp_path / "empty")])


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"which_word.documents": "missing.documents"}, "cannot be prepared .*missing"),
        ({"which_word.documents": "which_word.absent"}, "cannot be prepared .*absent"),
        ({"output_type: multiple_choice": "output_type: odd"}, "cannot be prepared .*odd"),
        ({"task: which_word": "tsk: which_word"}, "cannot be prepared .*Unknown config"),
        (
            {"custom_dataset: !function which_word.documents": "dataset_path: nobody/nothing"},
            "cannot be prepared .*nobody/nothing",
        ),
        ({"output_type:": "unsafe_code: true\noutput_type:"}, "HF_ALLOW_CODE_EVAL=1"),
    ],
)
def test_a_task_that_cannot_run_is_told_before_a_model_is_loaded(
    tiny_checkpoint: Callable[..., Path], task: Path, changes: dict[str, str], match: str
) -> None:
    (old, new) = next(iter(changes.items()))
    assert old in task.read_text()
    task.write_text(task.read_text().replace(old, new))
    with pytest.raises(UserError, match=match):
        evaluate_command(str(tiny_checkpoint()), tasks=[str(task)])


def test_code_runs_with_consent(student: str, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task.write_text(task.read_text() + "unsafe_code: true\n")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    scores = evaluate_command(student, tasks=[str(task)], limit=1).rows[0].tasks
    assert scores is not None and scores["which_word"].keys() == {"acc", "acc_stderr"}


@pytest.mark.parametrize("command", [("eval", "model"), ("compare", "model", "out", *COMPARED)])
def test_without_the_extra_only_tasks_are_missed(command: tuple[str, ...], tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    program = """
        import sys

        class NoHarness:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "lm_eval":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, NoHarness())
        from moefuse.cli import main
        from moefuse.evaluation.run import evaluate_command

        report = evaluate_command("model", data="text.txt")
        assert report.rows[0].perplexity > 1
        sys.argv = ["moefuse", *sys.argv[1:], "--tasks", "python_function_parses"]
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert 'pip install "moefuse[tasks]"' in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# The items of the own tasks.


def told_items(task: str) -> list[dict[str, str]]:
    with (FOLDER / f"{task}.jsonl").open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def test_items_are_made_again_with_the_same_bytes() -> None:
    made = make_items()
    assert made.keys() == set(OWN)
    for task, found in made.items():
        assert to_jsonl(found) == (FOLDER / f"{task}.jsonl").read_text("utf-8")


def test_items_are_held_out_many_and_small() -> None:
    with demo.calibration_path().open(encoding="utf-8") as handle:
        seen = "\0".join(json.loads(line)["text"] for line in handle)
    lines, functions = map(told_items, OWN)
    assert (len(lines), len(functions)) == (200, 100)
    assert sum((FOLDER / f"{task}.jsonl").stat().st_size for task in OWN) < 150_000
    assert all(is_heldout(item["source"]) for item in lines + functions)
    for item in lines:
        assert item["prefix"][-100:] + item["line"] + item["suffix"][:50] not in seen
    for item in functions:
        assert item["prompt"] + item["rest"] not in seen


def test_the_truth_scores_one_and_silence_zero() -> None:
    lines, functions = map(told_items, OWN)
    for item in lines:
        right = harness.score_line(item, [item["line"]])
        assert right == {"exact_match": 1.0, "edit_similarity": 1.0}
        assert harness.score_line(item, [""]) == {"exact_match": 0.0, "edit_similarity": 0.0}
    for item in functions:
        assert harness.score_function(item, [item["rest"]]) == {"parses": 1.0}
        assert harness.score_function(item, ["\n"]) == {"parses": 0.0}


@pytest.mark.parametrize("style", INFILL_STYLES, ids=lambda style: style.before_prefix)
def test_prompts_have_the_tokenizers_own_markers(style: InfillMarkers) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    tokenizer.add_tokens(list(style.tokens), special_tokens=True)
    (item, *_) = harness.infill_documents(infill_tokenizer=tokenizer)["test"]
    first, second, third = style.tokens
    assert item["prompt"] == f"{first}{item['prefix']}{second}{item['suffix']}{third}"
    ids = tokenizer(item["prompt"]).input_ids
    assert [i for i in ids if i in tokenizer.convert_tokens_to_ids(list(style.tokens))] == (
        tokenizer.convert_tokens_to_ids([first, second, third])
    )


PROMPT = "def area(width, height):\n    side = 0\n"


@pytest.mark.parametrize(
    ("completion", "parses"),
    [
        ("    return width * height\n", True),
        ("    return width * height", True),
        ("    return width * height\n\nclass (\n", True),
        ("    return width\n    return (hei", True),
        ("    if width:\n        return 1\n    return 0\n", True),
        ("", False),
        ("\n\n", False),
        ("    # nothing\n", False),
        ("area(1, 2)\n", False),
        ("    retur width * height\n    return 0\n", False),
        ("    return (width *\n    return 0\n    return 1\n", False),
        ("      return width\n", False),
        ("    return '\0'\n    return 0\n    return 0\n", False),
        ("    return '\\d'\n", True),
    ],
)
def test_what_counts_as_a_completed_function(completion: str, parses: bool) -> None:
    assert completes_function(PROMPT, completion) is parses


def test_what_counts_as_the_same_line() -> None:
    assert same_line("    return x  ", "    return x")
    assert not same_line("return x", "    return x")
    assert edit_similarity("  abcd", "abxx") == 0.5


# How scores are shown.


def test_scores_are_listed_with_their_errors() -> None:
    scores = {"t": {"acc": 0.5, "acc_stderr": 0.25, "em,loose": 0.125, "em_stderr,loose": None}}
    rows = [Row(method="teacher", tasks=scores), Row(method="fused", kl=0.5)]
    assert listing(rows) == (
        ["Method", "KL", "t acc", "t em,loose"],
        [["teacher", "-", "0.500 ± 0.250", "0.125"], ["fused", "0.500", "-", "-"]],
    )
    assert "Teacher" not in markdown_table(rows)
