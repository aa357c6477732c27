"""Text to heal the bundled teacher's students on for long: Python that it has not learnt by heart.

The sources of installed packages, all dependencies of this project, and of the standard library
without what is held out, in the mixture of plain, fill-in-the-middle and chat texts that the
teacher learnt from. Files named as a held-out module are left out, whatever package they are from.

``python benchmarks/package_text.py OUT.jsonl --megabytes 100`` writes it as JSONL.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from stdlib_text import stdlib_sources
from transformers import AutoTokenizer

from moefuse import demo
from moefuse.demo.teacher_data import HELDOUT_MODULES, read_sources, shipped_texts, write_lines

PACKAGES = ("torch", "transformers", "scipy", "numpy", "sympy", "networkx", "matplotlib")


def package_sources() -> dict[str, str]:
    """Return the sources, by path; of equal texts one."""
    found = stdlib_sources()
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        for path, text in read_sources(Path(spec.submodule_search_locations[0])).items():
            parts = {part.strip("_") for part in Path(path).with_suffix("").parts}
            if not parts & HELDOUT_MODULES:
                found[f"{package}/{path}"] = text
    return found


def main(
    out: Annotated[Path, typer.Argument(help="Where the text goes.")],
    megabytes: Annotated[int, typer.Option(help="How much of it, at most.")] = 100,
    seed: int = 0,
) -> None:
    """Write the text as JSONL."""
    tokenizer = AutoTokenizer.from_pretrained(demo.teacher_path())
    write_lines(out, shipped_texts(package_sources(), tokenizer, megabytes * 10**6, seed))


if __name__ == "__main__":
    typer.run(main)
