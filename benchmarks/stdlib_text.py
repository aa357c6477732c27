"""Text to heal the bundled teacher's students on: what it learnt from, without what is held out.

That is the standard library of whatever Python runs this, about 10 M of the teacher's tokens.

``python benchmarks/stdlib_text.py OUT.jsonl`` writes it as JSONL.
"""

import json
import sys
import sysconfig
from pathlib import Path

from moefuse.artifacts import write_text
from moefuse.demo.teacher_data import is_heldout, read_sources


def stdlib_sources() -> dict[str, str]:
    """Return the standard library's sources by path, without what held-out text is from."""
    sources = read_sources(Path(sysconfig.get_paths()["stdlib"]))
    return {path: text for path, text in sources.items() if not is_heldout(path)}


if __name__ == "__main__":
    lines = [json.dumps({"text": text}) for text in stdlib_sources().values()]
    write_text(Path(sys.argv[1]), "\n".join(lines) + "\n")
