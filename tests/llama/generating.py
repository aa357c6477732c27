"""What an engine makes of a file, in a process of its own, which may find another package first.

    python generating.py FILE PROMPTS NEW

``PROMPTS`` are token ids as JSON; prints the engine's version and its greedy tokens. What the
engine says while it loads goes to stderr.
"""

import json
import sys
from pathlib import Path

import llama_cpp
from engine import greedy, loaded


def main() -> None:
    path, prompts, new = sys.argv[1:]
    told = {"version": llama_cpp.__version__}
    with loaded(Path(path), verbose=True) as engine:
        told["tokens"] = [greedy(engine, ids, int(new)) for ids in json.loads(prompts)]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
