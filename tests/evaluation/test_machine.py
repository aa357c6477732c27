import json
import re
from pathlib import Path

import pytest

from moefuse.evaluation import machine
from moefuse.evaluation.machine import machine_meta


def test_meta_tells_versions_and_no_places() -> None:
    command = (
        "moefuse eval /home/me/a/student --teacher=/data/t ~/x.txt org/data s/rel --out '/o u'"
    )
    meta = machine_meta(command, data={"name": "x"}, extra=1)
    assert meta["command"] == ("moefuse eval student --teacher=t x.txt org/data s/rel --out 'o u'")
    assert {"python", "torch", "transformers", "moefuse", "cpu", "cores", "date"} <= set(meta)
    assert meta["device"] == "cpu" and meta["data"] == {"name": "x"} and meta["extra"] == 1
    text = json.dumps(meta)
    assert str(Path.home()) not in text and str(Path(machine.__file__).parent) not in text


def test_the_commit_is_moefuses_own_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = machine._commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "src/moefuse/evaluation/machine.py"))
    assert machine._commit() is None
    (tmp_path / ".git").mkdir()
    assert machine._commit() is None


def test_a_machine_without_cpu_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPU_FACTS", tmp_path / "missing")
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")
    assert machine._cpu() == "arm"


def test_an_absent_package_has_no_version() -> None:
    assert machine._version("no-such-package-here") is None
