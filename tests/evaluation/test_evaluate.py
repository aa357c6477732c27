import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import TEXT, save_tiny, tiny_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from moefuse import demo
from moefuse.errors import UserError
from moefuse.evaluation.report import read_report, write_report
from moefuse.evaluation.rows import TEACHER, Row
from moefuse.evaluation.run import Quality, evaluate, evaluate_command

LENGTHS = (9, 2, 17, 5, 13)


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    return tiny_model(seed=0), tiny_model(seed=1)


@pytest.fixture(scope="module")
def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(64, (length,), generator=generator) for length in LENGTHS]


def close(left: Quality, right: Quality) -> None:
    assert (left.tokens, left.documents) == (right.tokens, right.documents)
    for name in ("cross_entropy", "perplexity", "kl", "agreement"):
        assert getattr(left, name) == pytest.approx(getattr(right, name), rel=1e-5, abs=1e-7)
    assert left.intervals.keys() == right.intervals.keys()
    for name, interval in left.intervals.items():
        assert interval == pytest.approx(right.intervals[name], rel=1e-5, abs=1e-7)


def test_one_at_a_time_and_without_padding_is_the_truth(
    models: tuple[nn.Module, nn.Module], sequences: list[Tensor]
) -> None:
    teacher, student = models
    losses, divergences, same = [], [], []
    with torch.no_grad():
        for ids in sequences:
            log_p = log_softmax(teacher(ids[None]).logits[0, :-1].double(), -1)
            log_q = log_softmax(student(ids[None]).logits[0, :-1].double(), -1)
            losses.append(cross_entropy(log_q, ids[1:], reduction="none"))
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
            same.append((log_p.argmax(-1) == log_q.argmax(-1)).double())
    found = evaluate({"s": student}, sequences, teacher=teacher, batch_size=3, pad_id=0)["s"]
    assert found.tokens == sum(LENGTHS) - len(LENGTHS)
    assert found.documents == len(LENGTHS)
    assert found.cross_entropy == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.cross_entropy))
    assert found.kl == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert found.agreement == pytest.approx(torch.cat(same).mean().item())


@pytest.mark.parametrize(("batch_size", "pad_id"), [(1, 0), (2, 63), (5, 7)])
def test_batch_size_and_padding_change_nothing(
    models: tuple[nn.Module, nn.Module], sequences: list[Tensor], batch_size: int, pad_id: int
) -> None:
    teacher, student = models
    expected = evaluate({"s": student}, sequences, teacher=teacher, batch_size=3, pad_id=1)
    found = evaluate(
        {"s": student}, sequences, teacher=teacher, batch_size=batch_size, pad_id=pad_id
    )
    close(found["s"], expected["s"])


def test_a_teacher_among_the_models_runs_once(
    models: tuple[nn.Module, nn.Module], sequences: list[Tensor]
) -> None:
    calls: list[None] = []
    hook = models[0].register_forward_hook(lambda *_: calls.append(None))
    both = {"teacher": models[0], "student": models[1]}
    found = evaluate(both, sequences, teacher=models[0], batch_size=5, pad_id=0)
    hook.remove()
    assert len(calls) == 1
    assert (found["teacher"].kl, found["teacher"].agreement) == (0.0, 1.0)
    assert found["student"].kl is not None and found["student"].kl > 0


def test_an_equal_model_has_no_divergence(
    models: tuple[nn.Module, nn.Module], sequences: list[Tensor]
) -> None:
    found = evaluate({"twin": tiny_model(seed=0)}, sequences, teacher=models[0], pad_id=0)["twin"]
    assert (found.kl, found.agreement) == (0.0, 1.0)
    assert found.intervals["kl"] == (0.0, 0.0)


def test_without_a_teacher(models: tuple[nn.Module, nn.Module], sequences: list[Tensor]) -> None:
    found = evaluate({"s": models[1]}, sequences, pad_id=0)["s"]
    assert (found.kl, found.agreement) == (None, None)
    assert set(found.intervals) == {"cross_entropy", "perplexity"}
    low, high = found.intervals["perplexity"]
    assert low < found.perplexity < high


def test_documents_are_what_is_resampled(
    models: tuple[nn.Module, nn.Module], sequences: list[Tensor]
) -> None:
    def measure(documents: list[int] | None) -> Quality:
        return evaluate({"s": models[1]}, sequences, documents=documents, pad_id=0)["s"]

    own, two, one = measure(None), measure([3, 3, 3, 8, 8]), measure([4] * 5)
    assert (own.documents, two.documents, one.documents) == (5, 2, 1)
    assert two.intervals != own.intervals == one.intervals
    single = evaluate({"s": models[1]}, sequences[:1], pad_id=0)["s"]
    assert single.intervals == {}


def test_modes_and_gradients_are_left_alone(
    models: tuple[nn.Module, nn.Module], sequences: list[Tensor]
) -> None:
    model = tiny_model(seed=2).train()
    frozen = next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    seen: list[bool] = []
    hook = model.register_forward_hook(lambda module, *_: seen.append(module.training))
    evaluate({"s": model}, sequences, teacher=models[0], pad_id=0)
    hook.remove()
    assert [module.training for module in model.modules()] == modes
    assert not any(seen) and not frozen.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_models_own_dtype(sequences: list[Tensor]) -> None:
    teacher = tiny_model(seed=0).bfloat16()
    found = evaluate({"fp32": tiny_model(seed=0)}, sequences, teacher=teacher, pad_id=0)["fp32"]
    assert found.kl is not None and 0 < found.kl < 0.1


class Constant(nn.Module):
    """Gives the same logits for every token."""

    def __init__(self, logits_V: Tensor) -> None:
        super().__init__()
        self.logits_V = logits_V

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits_V.expand(*input_ids.shape, -1))


def test_bad_input_is_told(sequences: list[Tensor]) -> None:
    even = Constant(torch.zeros(64))
    with pytest.raises(UserError, match="no text to evaluate"):
        evaluate({"even": even}, [], pad_id=0)
    with pytest.raises(UserError, match="wide knows 65 words and the teacher 64"):
        evaluate({"wide": Constant(torch.zeros(65))}, sequences, teacher=even, pad_id=0)
    with pytest.raises(UserError, match="broken gives logits that are no numbers"):
        evaluate({"broken": Constant(torch.full((64,), torch.nan))}, sequences, pad_id=0)


def test_a_hopeless_model_still_gives_a_report(sequences: list[Tensor], tmp_path: Path) -> None:
    logits_V = torch.zeros(64)
    logits_V[sequences[0][1]] = 1e5
    found = evaluate({"sure": Constant(logits_V)}, sequences, pad_id=0)["sure"]
    assert found.perplexity == math.inf
    write_report(tmp_path, {}, [Row(method="sure", perplexity=found.perplexity)])
    assert read_report(tmp_path)[1][0].perplexity is None


# The command


@pytest.fixture
def pair(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[str, str, str]:
    save_tiny(tmp_path / "other", seed=1)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": TEXT[cut:]}) + "\n" for cut in (0, 3, 7, 20)))
    return str(tmp_path / "other"), str(tiny_checkpoint()), str(text)


def test_the_command_measures_model_and_teacher(pair: tuple[str, str, str], tmp_path: Path) -> None:
    model, teacher, data = pair
    found = evaluate_command(model, teacher, data, sequence_length=20, batch_size=3, tokens=None)
    first, second = found.rows
    assert (first.method, second.method) == (TEACHER, "other")
    assert (first.kl, first.agreement) == (0.0, 1.0)
    assert second.kl is not None and second.kl > 0
    assert second.parameters == sum(p.numel() for p in tiny_model().parameters())
    # Two of the layers have routed experts: 8 of 3 * 32 * 16 numbers, of which a token passes 2.
    assert second.expert_bytes == 2 * 8 * 3 * 32 * 16 * 4
    assert second.active_parameters == second.parameters - 2 * 6 * 3 * 32 * 16
    assert second.total_bytes == 4 * second.parameters
    assert found.meta["data"]["documents"] == 4
    assert str(tmp_path) not in json.dumps(found.to_json())
    terminal = io.StringIO()
    Console(file=terminal, width=100).print(found.table())
    assert "Cross-entropy" in terminal.getvalue() and "other" in terminal.getvalue()
    write_report(tmp_path / "report", found.meta, found.rows)
    assert read_report(tmp_path / "report") == (found.meta, found.rows)


def test_different_tokenizers_cannot_be_compared(pair: tuple[str, str, str]) -> None:
    model, teacher, data = pair
    tokenizer = Path(model, "tokenizer.json")
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(UserError, match="different tokenizers"):
        evaluate_command(model, teacher, data)


def test_without_data_the_bundled_text_serves_models_of_the_bundled_teacher(
    pair: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, teacher, data = pair
    monkeypatch.setattr(demo, "teacher_path", lambda: tmp_path / "missing")
    with pytest.raises(UserError, match="--data"):
        evaluate_command(model)
    monkeypatch.setattr(demo, "teacher_path", lambda: Path(teacher))
    monkeypatch.setattr(demo, "heldout_path", lambda: Path(data))
    (row,) = evaluate_command(model, sequence_length=32).rows
    assert (row.method, row.kl) == ("other", None)
