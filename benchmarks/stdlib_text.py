"""Text to heal the bundled teacher's students on: what it learnt from, without what is held out.

That is the standard library of whatever Python runs this, about 10 M of the teacher's tokens.

``python benchmarks/stdlib_text.py OUT.jsonl`` writes it as JSONL.
"""

import json
import sys
import sysconfig
from pathlib import Path

from moefuse.artifacts import write_text
from moefuse.corpus import Document
from moefuse.demo.teacher_data import is_heldout, read_sources


def stdlib_text() -> list[Document]:
    """Return the standard library's sources, without the modules that held-out text is from."""
    sources = read_sources(Path(sysconfig.get_paths()["stdlib"]))
    kept = {path: text for path, text in sources.items() if not is_heldout(path)}
    return [Document(text, None, path) for path, text in kept.items()]


if __name__ == "__main__":
    lines = [json.dumps({"text": document.text}) for document in stdlib_text()]
    write_text(Path(sys.argv[1]), "\n".join(lines) + "\n")
