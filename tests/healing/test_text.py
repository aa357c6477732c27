"""Packed text: every token once, pieces that do not see each other, the assistant's words."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from numeric import assert_close
from tiny import TEXT, tiny_model, tiny_tokenizer

from moefuse.corpus import Document
from moefuse.errors import UserError
from moefuse.families import all_families
from moefuse.healing.text import PackedRows, PackedText, pack

LENGTH = 16


def texts(*sizes: int) -> list[Document]:
    """Documents that begin at different places of the tokenizer's text, so that all differ."""
    return [Document((TEXT * 9)[7 * n :][:size], None, f"text {n}") for n, size in enumerate(sizes)]


SOME = texts(30, 5, 90, 12, 40, 7, 25, 18)


def pieces(text: PackedText) -> list[tuple[int, slice]]:
    """Return every piece, padding too, as a row and where in it."""
    found = []
    for row, position_S in enumerate(text.position_NS):
        starts = [*(position_S == 0).nonzero().flatten().tolist(), len(position_S)]
        found += [(row, slice(start, end)) for start, end in pairwise(starts)]
    return found


def real_pieces(text: PackedText) -> list[list[int]]:
    return [
        text.ids_NS[row, where].tolist()
        for row, where in pieces(text)
        if text.counted_NS[row, where].any()
    ]


def packed(documents: list[Document], **changes: Any) -> PackedText:
    settings = {"sequence_length": LENGTH, "tokens": 10_000, "seed": 0, **changes}
    return pack(documents, tiny_tokenizer(), **settings)


# Packing


def test_every_token_is_there_once() -> None:
    text = packed(SOME)

    wanted = []
    for document in SOME:
        ids_T = torch.tensor(tiny_tokenizer()(document.text)["input_ids"])
        wanted += [part.tolist() for part in ids_T.split(LENGTH) if len(part) > 1]
    assert sorted(real_pieces(text)) == sorted(wanted)
    assert text.tokens == sum(len(piece) - 1 for piece in wanted)
    assert text.ids_NS.shape == (text.rows, LENGTH)
    kinds = (text.ids_NS.dtype, text.position_NS.dtype, text.counted_NS.dtype)
    assert kinds == (torch.int32, torch.int32, torch.bool)


def test_a_piece_counts_up_to_its_last_token() -> None:
    text = packed(SOME)

    for row, where in pieces(text):
        counted_T = text.counted_NS[row, where]
        if counted_T.any():
            assert counted_T[:-1].all()
            assert not counted_T[-1]
        assert torch.equal(text.position_NS[row, where], torch.arange(len(counted_T)).int())


def test_rows_are_full_where_pieces_allow() -> None:
    text = packed(texts(*range(2, 160)), sequence_length=48)

    padding = text.ids_NS.numel() - sum(map(len, real_pieces(text)))
    assert padding < 0.05 * text.ids_NS.numel()


def test_pieces_apart_are_the_same_pieces() -> None:
    shared, apart = packed(SOME), packed(SOME, apart=True)

    assert sorted(real_pieces(apart)) == sorted(real_pieces(shared))
    assert apart.tokens == shared.tokens
    assert apart.rows == len(real_pieces(apart)) > shared.rows
    assert (apart.position_NS[:, 0] == 0).all()


def test_the_seed_alone_decides_the_order() -> None:
    first, again, other = packed(SOME), packed(SOME), packed(SOME, seed=1)

    assert first.fingerprint() == again.fingerprint()
    assert torch.equal(first.ids_NS, again.ids_NS)
    assert first.fingerprint() != other.fingerprint()
    assert sorted(real_pieces(first)) == sorted(real_pieces(other))


@pytest.mark.parametrize("tokens", [2, 40, 41, 57])
def test_no_more_tokens_than_wanted(tokens: int) -> None:
    some = packed(SOME, tokens=tokens)

    assert tokens - 1 <= sum(map(len, real_pieces(some))) <= tokens
    assert some.fingerprint() == packed(SOME, tokens=tokens).fingerprint()


def test_a_fingerprint_hears_of_every_part() -> None:
    text = packed(SOME)
    parts = [text.ids_NS, text.position_NS, text.counted_NS]
    for number, part in enumerate(parts):
        changed = part.clone()
        changed[0, 0] = not part[0, 0] if part.dtype == torch.bool else part[0, 0] + 1
        other = PackedText(*parts[:number], changed, *parts[number + 1 :])
        assert other.fingerprint() != text.fingerprint()


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(UserError, match="gives two tokens or more"):
        packed([Document("d", None, "here")])
    with pytest.raises(UserError, match="predicts nothing"):
        packed(SOME, sequence_length=1)


def test_rows_as_a_data_set() -> None:
    text = packed(SOME)
    rows = PackedRows(text)

    assert len(rows) == text.rows
    item = rows[1]
    assert {name: (part.dtype, part.shape) for name, part in item.items()} == {
        "input_ids": (torch.int64, (LENGTH,)),
        "position_ids": (torch.int64, (LENGTH,)),
        "counted": (torch.bool, (LENGTH,)),
        "row": (torch.int64, ()),
    }
    assert int(item["row"]) == 1
    assert torch.equal(item["input_ids"], text.ids_NS[1].long())


LOCAL: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "mixtral": {"sliding_window": 4},
}
CASES = [(name, {}) for name in sorted(all_families())] + sorted(LOCAL.items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("model_type", "changes"), CASES)
@torch.no_grad()
def test_a_piece_computes_as_if_it_were_alone(
    model_type: str, changes: dict[str, Any], attention: str
) -> None:
    family = all_families()[model_type]
    if family.writes_scores and attention != "eager":
        pytest.skip("Transformers has no other attention for the family")
    text = packed(SOME, apart=family.one_piece_a_row)
    assert text.rows > 1
    if family.one_piece_a_row:
        assert len(real_pieces(text)) == text.rows
    else:
        assert len(real_pieces(text)) > text.rows
    model = tiny_model(model_type, attn_implementation=attention, **changes)
    ids_NS, position_NS = text.ids_NS.long(), text.position_NS.long()

    together_NSV = model(input_ids=ids_NS, position_ids=position_NS, use_cache=False).logits

    for row, where in pieces(text):
        if family.one_piece_a_row and not text.counted_NS[row, where].any():
            continue  # padding, of which nothing is asked
        alone_TV = model(input_ids=ids_NS[row : row + 1, where], use_cache=False).logits[0]
        assert_close(together_NSV[row, where], alone_TV)


# Conversations

MESSAGES = [
    {"role": "system", "content": "print"},
    {"role": "user", "content": "add line"},
    {"role": "assistant", "content": "return first"},
    {"role": "user", "content": "second"},
    {"role": "assistant", "content": "done"},
]
SAID = "return first\ndone\n"
MARKED = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "assistant: {% generation %}{{ message['content'] }}\n{% endgeneration %}{% else %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Earlier answers are left out, as some templates do with what a model thought.
FORGETFUL = (
    "{% for message in messages %}{{ message['role'] }}:{% if loop.last %}{{ message['content'] }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def with_template(template: str | None) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template if template is not None else tokenizer.chat_template
    return tokenizer


def chat(messages: list[dict[str, Any]] = MESSAGES) -> Document:
    return Document(None, messages, "chat.jsonl, line 3")


def said(text: PackedText, tokenizer: Any) -> str:
    """Return what the predictions that count are of."""
    predicted = text.ids_NS.roll(-1, dims=1)[text.counted_NS]
    return tokenizer.decode(predicted)


@pytest.mark.parametrize("template", [None, MARKED], ids=["split", "marked"])
def test_what_the_assistant_said_counts(template: str | None) -> None:
    tokenizer = with_template(template)

    text = pack([chat()], tokenizer, 256, tokens=1000, seed=0)

    assert said(text, tokenizer) == SAID
    rendered = tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert real_pieces(text)[0][: len(rendered)] == rendered


@pytest.mark.parametrize("template", [None, MARKED], ids=["split", "marked"])
def test_a_token_across_the_border_counts(template: str | None) -> None:
    """The prompt ends with the space that the answer's first token begins with."""
    tokenizer = with_template(template)
    messages = [*MESSAGES[:2], {"role": "assistant", "content": "line first"}]
    before, whole = (
        tokenizer.apply_chat_template(part, add_generation_prompt=part != messages)["input_ids"]
        for part in (messages[:2], messages)
    )
    assert whole[: len(before)] != before

    text = pack([chat(messages)], tokenizer, 256, tokens=1000, seed=0)

    assert said(text, tokenizer) == " line first\n"


def test_templates_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(UserError, match=r"chat.jsonl, line 3: .* message 3 .*generation"):
        pack([chat()], with_template(FORGETFUL), 256, tokens=1000, seed=0)
    with pytest.raises(UserError, match="line 3: the assistant speaks first"):
        pack([chat(MESSAGES[2:])], with_template(None), 256, tokens=1000, seed=0)


def test_without_a_template_or_an_answer_nothing_can_be_learnt() -> None:
    tokenizer = with_template("")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        pack([chat()], tokenizer, 256, tokens=1000, seed=0)
    with pytest.raises(UserError, match="gives two tokens or more"):
        pack([chat(MESSAGES[:2])], with_template(None), 256, tokens=1000, seed=0)


def test_a_long_conversation_is_cut_and_its_questions_alone_are_left_out() -> None:
    tokenizer = with_template(None)
    ids = tokenizer.apply_chat_template(MESSAGES)["input_ids"]

    text = pack([chat()], tokenizer, 8, tokens=1000, seed=0)

    kept = real_pieces(text)
    parts = [part.tolist() for part in torch.tensor(ids).split(8)]
    assert all(piece in parts for piece in kept)
    assert len(kept) < len(parts)


def test_text_and_conversations_together() -> None:
    text = packed([chat(), *SOME], sequence_length=64)

    assert text.tokens > packed(SOME, sequence_length=64).tokens
