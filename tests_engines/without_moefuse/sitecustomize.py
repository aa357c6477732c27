"""On PYTHONPATH: no process, and none that it starts, can import moefuse."""

import sys


class _NoMoefuse:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "moefuse":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _NoMoefuse)  # type: ignore[arg-type]
