"""How plain checkpoints are judged in ExLlama, without it: it needs a GPU."""

import importlib.util
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moefuse.artifacts import read_json

PLACE = Path(__file__).parents[1] / "integrations/exllama"


@pytest.fixture(scope="module")
def prove() -> Any:
    sys.path.insert(0, str(PLACE))
    spec = importlib.util.spec_from_file_location("prove", PLACE / "prove.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prove"] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(PLACE))
    return module


@pytest.fixture
def found(prove: Any) -> Any:
    return prove.Found(
        engine="ExLlamaV3",
        version="1.6.5",
        family="mixtral",
        form="collapsed",
        tokens=480,
        equal=476,
        fp16_equal=478,
        farthest_behind=0.01,
        median_kl=2e-6,
        mean_kl=1e-4,
        fp16_median_kl=2e-6,
        fp16_mean_kl=1e-4,
        teacher_mean_kl=0.3,
        cut_alike=True,
    )


def test_what_fp16_costs_is_allowed_and_no_more(found: Any) -> None:
    assert found.holds
    assert not replace(found, equal=400).holds
    assert not replace(found, median_kl=1e-5).holds
    assert not replace(found, cut_alike=False).holds


def test_tokens_are_judged_by_the_logits_before_them(prove: Any) -> None:
    logits_TV = torch.zeros(5, 4)
    logits_TV[1, 3], logits_TV[2, 0], logits_TV[3, 2] = 2.0, 1.0, 3.0

    # After two tokens of a prompt come three: two first choices, and one that is 3 behind.
    assert prove.lag(logits_TV, [1, 1], [3, 0, 1]).tolist() == [0.0, 0.0, 3.0]
    same = prove.divergences([logits_TV], [logits_TV + 5.0])
    assert same.abs().max() < 1e-6
    assert prove.divergences([logits_TV], [-logits_TV]).max() > 1


def test_figures_of_other_cases_are_kept(
    prove: Any, found: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = ("ExLlamaV3", "mixtral", "collapsed")
    prove.write(tmp_path, {case: found})
    prove.write(tmp_path, {("ExLlamaV2", "mixtral", "collapsed"): "no | such tensor"})

    told = prove.read(tmp_path / "exllama.json")
    assert {k: v if isinstance(v, str) else asdict(v) for k, v in told.items()} == {
        case: asdict(found),
        ("ExLlamaV2", "mixtral", "collapsed"): "no | such tensor",
    }
    assert "| yes | 476 (478) of 480 |" in (tmp_path / "exllama.md").read_text()
    assert "no: no / such tensor" in capsys.readouterr().out
    assert "earlier" in read_json(tmp_path / "exllama.json")["meta"]


def test_an_errors_first_line_is_told(prove: Any) -> None:
    advice = "CUDA error: out of memory\nFor debugging consider this\n\nCompile with that"
    program = f"try:\n  {{}}[0]\nexcept KeyError:\n  raise RuntimeError({advice!r})"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert prove.reason(ran.stderr) == "RuntimeError: CUDA error: out of memory"
    assert prove.reason("loading\nKilled\n") == "Killed"
    assert prove.reason("") == ""
