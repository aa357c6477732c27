import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moefuse.errors import UserError
from moefuse.evaluation import generate
from moefuse.evaluation.generate import (
    INFILL_STYLES,
    Decoding,
    InfillMarkers,
    chat,
    complete,
    generate_command,
    infill,
    infill_markers,
)

SHORT = Decoding(max_new_tokens=24)
PROMPT = "def add(first"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    # Room for the infill markers; no end, so that every answer has its full length.
    made = tiny_model(vocab_size=80, seed=3, eos_token_id=None)
    made.lm_head.weight.data[[0, 1]] = 0  # type: ignore[union-attr,index]
    return made


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return copy.deepcopy(tiny_tokenizer())


def mark(tokenizer: PreTrainedTokenizerFast, style: InfillMarkers) -> None:
    tokenizer.add_tokens(list(style.tokens), special_tokens=True)


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """The plain loop, without a cache."""
    grown = list(ids)
    with torch.no_grad():
        for _ in range(count):
            grown.append(int(model(torch.tensor([grown])).logits[0, -1].argmax()))
    return grown[len(ids) :]


def test_streamed_text_is_the_greedy_continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    pieces: list[str] = []
    found = complete(model, tokenizer, PROMPT, SHORT, write=pieces.append)
    ids = tokenizer(PROMPT).input_ids
    assert found == tokenizer.decode(greedy(model, ids, 24), skip_special_tokens=True)
    assert "".join(pieces) == found
    output = model.generate(  # type: ignore[operator]
        torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=1
    )
    assert found == tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_pieces_come_while_tokens_are_made(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    events: list[str] = []
    hook = model.register_forward_hook(lambda *_: events.append("step"))
    found = complete(model, tokenizer, PROMPT, Decoding(max_new_tokens=80), write=events.append)
    hook.remove()
    first = next(number for number, event in enumerate(events) if event != "step")
    assert " " in found or "\n" in found
    assert "step" in events[first:]


def test_text_goes_to_standard_output(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    found = complete(model, tokenizer, PROMPT, SHORT)
    assert capsys.readouterr().out == found


def test_the_end_of_a_text_ends_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(model, tokenizer(PROMPT).input_ids, 24)
    stop = expected[5]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [stop])
    found = complete(model, tokenizer, PROMPT, SHORT, write=lambda _: None)
    assert found == tokenizer.decode(expected[: expected.index(stop) + 1])


def test_a_seed_decides_what_is_drawn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    def draw(seed: int, **options: float) -> str:
        decoding = Decoding(max_new_tokens=24, seed=seed, **options)  # type: ignore[arg-type]
        return complete(model, tokenizer, PROMPT, decoding, write=lambda _: None)

    before = torch.get_rng_state()
    assert draw(1, temperature=2.0) == draw(1, temperature=2.0) != draw(2, temperature=2.0)
    assert torch.equal(torch.get_rng_state(), before)
    likeliest = complete(model, tokenizer, PROMPT, SHORT, write=lambda _: None)
    assert draw(1, temperature=2.0, top_p=1e-6) == likeliest


@pytest.mark.parametrize("style", INFILL_STYLES, ids=lambda style: style.before_prefix)
def test_infill_puts_the_suffix_before_the_hole_is_filled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    style: InfillMarkers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mark(tokenizer, style)
    asked: list[list[int]] = []
    real: Any = model.generate

    def spy(ids_BS: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.append(ids_BS[0].tolist())
        return real(ids_BS, **options)

    monkeypatch.setattr(model, "generate", spy)
    infill(model, tokenizer, "def add(", "return first", SHORT, write=lambda _: None)
    before, between, after = (tokenizer.convert_tokens_to_ids(token) for token in style.tokens)
    prefix, suffix = tokenizer("def add(").input_ids, tokenizer("return first").input_ids
    assert asked == [[before, *prefix, between, *suffix, after]]


def test_infill_stops_where_the_next_example_begins(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark(tokenizer, INFILL_STYLES[0])
    stops: list[int] = []
    real: Any = model.generate

    def spy(ids_BS: torch.Tensor, **options: Any) -> torch.Tensor:
        stops.extend(options["eos_token_id"])
        return real(ids_BS, **options)

    monkeypatch.setattr(model, "generate", spy)
    infill(model, tokenizer, "def", "add", SHORT, write=lambda _: None)
    assert stops == [1, *tokenizer.convert_tokens_to_ids(list(INFILL_STYLES[0].tokens))]


def test_infill_needs_markers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no tokens for filling in the middle"):
        infill(model, tokenizer, "a", "b")
    tokenizer.add_tokens(list(INFILL_STYLES[1].tokens[:2]), special_tokens=True)
    with pytest.raises(UserError, match="no tokens for filling in the middle"):
        infill_markers(tokenizer)
    mark(tokenizer, INFILL_STYLES[1])
    assert infill_markers(tokenizer) == INFILL_STYLES[1]


def test_chat_uses_the_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "print line"}]
    found = chat(model, tokenizer, messages, SHORT, write=lambda _: None)
    ids = tokenizer("<s>user: print line\nassistant: ").input_ids
    assert found == tokenizer.decode(greedy(model, ids, 24), skip_special_tokens=True)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="refuses these messages: no"):
        chat(model, tokenizer, messages)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        chat(model, tokenizer, messages)


def test_an_empty_prompt_is_told(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        complete(model, tokenizer, "")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_new_tokens": 0}, "0 new tokens"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top-p is 0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
    ],
)
def test_bad_decoding_is_told(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Decoding(**options)


# The command


@pytest.fixture
def path(tiny_checkpoint: Callable[..., Path]) -> str:
    return str(tiny_checkpoint())


@pytest.mark.parametrize(
    "options", [{}, {"prompt": "a", "chat_message": "b"}, {"prompt": "", "infill_around": ("", "")}]
)
def test_exactly_one_kind_of_text(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="exactly one of"):
        generate_command("never/loaded", **options)


def test_the_command_completes_and_answers(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate_command(path, prompt="def", decoding=SHORT)
    first = capsys.readouterr().out
    generate_command(path, chat_message="def", decoding=SHORT)
    second = capsys.readouterr().out
    assert first.endswith("\n") and second.endswith("\n") and first != second
    with pytest.raises(UserError, match="filling in the middle"):
        generate_command(path, infill_around=("a", "b"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_conversation_remembers(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[str]] = []

    def answer(_model: Any, _tokenizer: Any, messages: Any, _decoding: Any) -> str:
        heard.append([message["content"] for message in messages])
        return f"answer {len(heard)}"

    def lines() -> Iterator[str]:
        yield from ["one", "two"]
        raise EOFError

    said = lines()
    monkeypatch.setattr(generate, "chat", answer)
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    monkeypatch.setattr("sys.stdin", Terminal())
    generate_command(path, chat_message="", decoding=SHORT)
    assert heard == [["one"], ["one", "answer 1", "two"]]


def test_a_conversation_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    with pytest.raises(UserError, match="--chat needs a message"):
        generate_command("never/loaded", chat_message="")
