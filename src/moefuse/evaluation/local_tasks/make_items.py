"""Makes the items of the local tasks from the bundled held-out text.

``python -m moefuse.evaluation.local_tasks.make_items`` writes both files anew, with the same bytes
every time. Only documents that parse as Python are used, so that a hidden line is known to be a
whole statement and a function to be whole. Contexts are short, so that a small model on a CPU
needs seconds and every tokenizer's context suffices.
"""

import ast
import json
import random
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moefuse import demo
from moefuse.artifacts import write_text
from moefuse.demo.teacher_data import EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from moefuse.evaluation.local_tasks.scoring import completes_function, parse, source_lines

Item = dict[str, str]

FOLDER = Path(__file__).resolve().parent
SEED = 0
LINES, LINES_OF_A_DOCUMENT = 200, 2
FUNCTIONS, FUNCTIONS_OF_A_DOCUMENT = 100, 3
PREFIX_CHARACTERS, SUFFIX_CHARACTERS = 320, 160
LINE_CHARACTERS = range(12, 61)
PROMPT_CHARACTERS = range(20, 321)
# 128 new tokens, the task's limit, hold this much code even in a small vocabulary.
REST_CHARACTERS = range(10, 241)
# Statements that end where they begin: no block follows them.
SIMPLE = (
    ast.Assert,
    ast.Assign,
    ast.AugAssign,
    ast.Delete,
    ast.Expr,
    ast.Import,
    ast.ImportFrom,
    ast.Raise,
    ast.Return,
)


def make_items() -> dict[str, list[Item]]:
    """Return the items of each local task by its name; a pure function of the held-out text.

    A ``python_infill_line`` item has ``prefix``, ``line``, ``suffix`` (text, lines whole) and
    ``source`` (the file it is from); a ``python_function_parses`` item has ``prompt``, ``rest``
    and ``source``.
    """
    documents = [
        (record["source"], text, tree)
        for record in _heldout()
        if (text := _code(record)) and (tree := parse(text)) is not None
    ]
    lines = [list(_hidden_lines(*document)) for document in documents]
    functions = [list(_functions(*document)) for document in documents]
    return {
        "python_infill_line": _choose(lines, LINES, LINES_OF_A_DOCUMENT, "line"),
        "python_function_parses": _choose(functions, FUNCTIONS, FUNCTIONS_OF_A_DOCUMENT, "prompt"),
    }


def _heldout() -> Iterator[dict[str, str]]:
    with demo.heldout_path().open(encoding="utf-8") as handle:
        yield from map(json.loads, handle)


def _code(record: dict[str, str]) -> str | None:
    """Return a held-out document as the source it was cut from, or None for a conversation."""
    text = record["text"]
    if record["kind"] == "plain":
        return textwrap.dedent(text)
    if record["kind"] != "fim":
        return None
    prefix, rest = text.removeprefix(FIM_BEGIN).split(FIM_HOLE)
    suffix, middle = rest.split(FIM_END)
    return textwrap.dedent(prefix + middle.removesuffix(EOS) + suffix)


def _hidden_lines(source: str, text: str, tree: ast.Module) -> Iterator[Item]:
    lines = source_lines(text)
    for node in ast.walk(tree):
        if not isinstance(node, SIMPLE) or _is_text(node):
            continue
        line = lines[node.lineno - 1].rstrip("\n")
        whole = line.isascii() and line[node.col_offset : node.end_col_offset] == line.strip()
        prefix = _last_lines(lines[: node.lineno - 1])
        suffix = _first_lines(lines[node.lineno :])
        if whole and len(line.strip()) in LINE_CHARACTERS and prefix and suffix:
            yield {"prefix": prefix, "line": line, "suffix": "\n" + suffix, "source": source}


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _first_lines(lines: list[str]) -> str:
    kept = ""
    for line in lines:
        if len(kept) + len(line) > SUFFIX_CHARACTERS:
            break
        kept += line
    return kept


def _last_lines(lines: list[str]) -> str:
    kept = ""
    for line in reversed(lines):
        if len(kept) + len(line) > PREFIX_CHARACTERS:
            break
        kept = line + kept
    return kept


def _functions(source: str, text: str, tree: ast.Module) -> Iterator[Item]:
    lines = source_lines(text)
    owners = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    for node in (statement for owner in owners for statement in owner.body):
        if not isinstance(node, ast.FunctionDef) or not isinstance(node.body[0], SIMPLE):
            continue
        shown = (node.body[0].end_lineno or node.lineno) - node.lineno + 1
        whole = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        prompt = "".join(source_lines(whole)[:shown])
        rest = whole.removeprefix(prompt)
        fits = len(prompt) in PROMPT_CHARACTERS and len(rest) in REST_CHARACTERS
        if fits and completes_function(prompt, rest):
            yield {"prompt": prompt, "rest": rest, "source": source}


def _choose(documents: list[list[Item]], count: int, of_a_document: int, key: str) -> list[Item]:
    """Return ``count`` items drawn at random, no two with the same ``key``."""
    draw = random.Random(SEED)
    drawn = [(number, item) for number, items in enumerate(documents) for item in items]
    draw.shuffle(drawn)
    taken: Counter[int] = Counter()
    chosen: dict[str, Item] = {}
    for number, item in drawn:
        if len(chosen) < count and taken[number] < of_a_document and item[key] not in chosen:
            chosen[item[key]] = item
            taken[number] += 1
    return list(chosen.values())


def to_jsonl(items: Iterable[dict[str, Any]]) -> str:
    """Return JSON Lines, one object a line, ending with a newline."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def main() -> None:
    """Write both files beside this module."""
    for task, items in make_items().items():
        write_text(FOLDER / f"{task}.jsonl", to_jsonl(items))


if __name__ == "__main__":
    main()
