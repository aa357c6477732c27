"""Trying a checkpoint out by hand: completing, filling in the middle, chatting.

Text appears while it is made. Decoding is greedy unless a temperature is given, so that two
checkpoints can be compared on the same prompt.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from moefuse.errors import UserError
from moefuse.evaluation.loading import load_model, pad_id
from moefuse.infill import INFILL_STYLES, InfillMarkers, infill_markers

__all__ = [
    "GREEDY",
    "INFILL_STYLES",
    "Decoding",
    "InfillMarkers",
    "complete",
    "generate_command",
    "infill",
    "infill_markers",
    "print_text",
]

Message = dict[str, str]
Write = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this share of the probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"{self.max_new_tokens} new tokens are no text; give 1 or more.")
        if self.temperature < 0:
            raise UserError(f"The temperature is {self.temperature}; give 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}; give a share above 0 and up to 1.")


GREEDY = Decoding()


def print_text(text: str) -> None:
    """Write ``text`` to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class _Streamer(TextStreamer):
    """Hands over text as soon as it is certain."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        super().__init__(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        if text:
            self.write(text)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    decoding: Decoding = GREEDY,
    *,
    write: Write = print_text,
) -> str:
    """Go on with ``prompt``; pieces go to ``write`` as they come, all of it is returned.

    The special tokens around the prompt are those that the tokenizer adds of itself. Raises
    ``UserError`` for a prompt without a single token.
    """
    return _generate(model, tokenizer, _encode(tokenizer, prompt), decoding, write)


def infill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    suffix: str,
    decoding: Decoding = GREEDY,
    *,
    write: Write = print_text,
) -> str:
    """Return what belongs between ``prefix`` and ``suffix``; pieces go to ``write`` as they come.

    Raises ``UserError`` where the tokenizer has no tokens for it.
    """
    markers = infill_markers(tokenizer)
    ids = _encode(tokenizer, markers.prompt(prefix, suffix))
    # A model that opens the next example has finished this one.
    stops = cast(list[int], tokenizer.convert_tokens_to_ids(list(markers.tokens)))
    return _generate(model, tokenizer, ids, decoding, write, stops)


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    decoding: Decoding = GREEDY,
    *,
    write: Write = print_text,
) -> str:
    """Answer the last of ``messages`` (each with ``role`` and ``content``), through the template.

    Raises ``UserError`` where the tokenizer has no chat template or the template refuses.
    """
    if tokenizer.chat_template is None:
        raise UserError("The tokenizer has no chat template; use --prompt instead.")
    try:
        encoded = tokenizer.apply_chat_template(
            cast(Any, list(messages)), add_generation_prompt=True, return_dict=True
        )
    except Exception as error:  # a template is a program; it raises what it likes
        raise UserError(f"The chat template refuses these messages: {error}.") from error
    return _generate(model, tokenizer, cast(Any, encoded)["input_ids"], decoding, write)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast(list[int], tokenizer(text, verbose=False)["input_ids"])


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    decoding: Decoding,
    write: Write,
    stops: Sequence[int] = (),
) -> str:
    if not ids:
        raise UserError("The prompt is empty; give at least one character.")
    ids_BS = torch.tensor([ids], device=model.device)
    ends = [*_end_ids(model, tokenizer), *stops]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(decoding.seed)
        output_BS = cast(Any, model).generate(
            ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            streamer=_Streamer(tokenizer, write),
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=pad_id(tokenizer),
            **_sampling(decoding),
        )
    return cast(str, tokenizer.decode(output_BS[0, len(ids) :], skip_special_tokens=True))


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    known = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [*known, tokenizer.eos_token_id] if isinstance(end, int)})


def _sampling(decoding: Decoding) -> dict[str, Any]:
    """Say everything about sampling, so that no default of the checkpoint's own slips in."""
    if decoding.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": 0,
    }


def generate_command(
    model: str,
    *,
    prompt: str | None = None,
    infill_around: tuple[str, str] | None = None,
    chat_message: str | None = None,
    decoding: Decoding = GREEDY,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Do what ``moefuse generate`` does: load ``model`` and write text to standard output.

    Exactly one of ``prompt``, ``infill_around`` (prefix, suffix) and ``chat_message`` is given. An
    empty ``chat_message`` starts a conversation on the terminal. Raises ``UserError`` otherwise,
    before anything is loaded.
    """
    given = [choice is not None for choice in (prompt, infill_around, chat_message)]
    if sum(given) != 1:
        raise UserError(
            "Say what to generate with exactly one of --prompt TEXT, --infill PREFIX SUFFIX "
            "and --chat MESSAGE."
        )
    if chat_message == "" and not sys.stdin.isatty():
        raise UserError("--chat needs a message where there is no terminal to converse on.")
    options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded, tokenizer = load_model(model, **options)
    if prompt is not None:
        complete(loaded, tokenizer, prompt, decoding)
    elif infill_around is not None:
        infill(loaded, tokenizer, *infill_around, decoding)
    elif chat_message:
        chat(loaded, tokenizer, [{"role": "user", "content": chat_message}], decoding)
    else:
        _converse(loaded, tokenizer, decoding)
    print_text("\n")


def _converse(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> None:
    """Answer lines from the terminal until an empty one, end of file or Ctrl-C."""
    messages: list[Message] = []
    while line := _ask():
        messages.append({"role": "user", "content": line})
        answer = chat(model, tokenizer, messages, decoding)
        messages.append({"role": "assistant", "content": answer})
        print_text("\n")


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
