"""What counts as right in the local tasks: pure functions of text."""

import ast
import difflib
import io
import warnings


def same_line(found: str, wanted: str) -> bool:
    """Say whether a filled-in line is the hidden one; blanks at its end do not count."""
    return found.rstrip() == wanted.rstrip()


def edit_similarity(found: str, wanted: str) -> float:
    """Return how alike two lines are, 0 to 1, blanks around them left out.

    Twice the characters in common blocks over the characters of both (Ratcliff and Obershelp).
    """
    matcher = difflib.SequenceMatcher(None, found.strip(), wanted.strip(), autojunk=False)
    return matcher.ratio()


def completes_function(prompt: str, completion: str) -> bool:
    """Say whether ``prompt``, the beginning of a function, becomes a whole one that parses.

    ``prompt`` is an unindented ``def`` with its first statement. Of ``completion`` counts what
    belongs to the function, the lines up to the first that is neither blank nor indented. It must
    add a statement, and all of it must parse; only its last line, which a limit of tokens may have
    cut, may be left out.
    """
    lines = _indented(completion)
    before = _statements(prompt)
    sources = (prompt + "".join(lines), prompt + "".join(lines[:-1]))
    return any(_statements(source) > before for source in sources)


def parse(source: str) -> ast.Module | None:
    """Return the syntax tree of Python source, or None where it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd escapes in strings, which parse all the same
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return None


def source_lines(text: str) -> list[str]:
    """Return the lines of ``text`` with their ends, counted as Python's parser counts them."""
    return list(io.StringIO(text))


def _indented(text: str) -> list[str]:
    kept = []
    for line in source_lines(text):
        if line.strip() and not line[0].isspace():
            break
        kept.append(line)
    return kept


def _statements(source: str) -> int:
    """Return how many statements Python source has, 0 where it does not parse."""
    tree = parse(source)
    return 0 if tree is None else sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
