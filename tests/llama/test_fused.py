"""Fused students in the patched engine: bases stored once, tokens equal to Transformers'."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import torch
from engine import expected, greedy, loaded, logits, prompts, save
from numeric import assert_close
from running import write_text
from students import unsettle
from test_engine import FAMILIES as EVERY_FAMILY
from test_engine import losses
from together import Together

from moefuse import demo
from moefuse.corpus import load_documents, tokenize
from moefuse.evaluation.loading import load_tokenizer
from moefuse.export.gguf.write import export_gguf
from moefuse.export.student_reader import StudentReader
from moefuse.modeling import load_fused
from moefuse.pipeline import fuse
from moefuse.sizes import layer_bytes

NEW = 24
STOCK = Path(__file__).parents[2] / "build/llama.cpp/stock"
QUICKLY = {"tokens": 2048, "sequence_length": 128, "batch_size": 8, "steps": 0}
FORMS: dict[str, dict[str, Any]] = {
    "deltas": {"groups": 8, "rank": 8},
    "no deltas": {"groups": 4, "rank": 0},
    "one group": {"groups": 1, "rank": 4},
    "scale and bias": {"groups": 3, "rank": 4, "scale": True, "bias": True},
}
FAMILIES = {case: given for case, given in EVERY_FAMILY.items() if "yarn" not in case}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fused")


def student_of(home: Path, form: str) -> Path:
    """Return a student of the bundled, really trained teacher."""
    out = home / form
    if not out.exists():
        settings = {"data": str(demo.calibration_path()), **QUICKLY, **FORMS[form]}
        fuse(demo.teacher_path(), out, settings)
        if "bias" in settings:
            unsettle(out)
    return out


def file_of(home: Path, form: str, quant: str = "F32") -> Path:
    """Return its GGUF file."""
    out = home / f"{form}-{quant}.gguf"
    if not out.exists():
        export_gguf(student_of(home, form), out, quant=quant, pre_tokenizer="qwen2")
    return out


@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_are_transformers(form: str, home: Path) -> None:
    model = load_fused(student_of(home, form), dtype=torch.float32)
    given = prompts(20, model.config.vocab_size)
    with loaded(file_of(home, form)) as engine:
        assert_close(logits(engine, given[0]), model(torch.tensor([given[0]])).logits[0])
        for ids in given:
            assert greedy(engine, ids, NEW) == expected(model, ids, NEW)


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_shares_bases(case: str, tokenizer: Any, tmp_path: Path) -> None:
    family, changes = FAMILIES[case]
    save(tmp_path / "teacher", family, tokenizer, **changes)
    settings = {"data": str(write_text(tmp_path / "text.txt")), "batch_size": 4, **QUICKLY}
    settings |= {"sequence_length": 64, "groups": 3, "rank": 2, "scale": True, "bias": True}
    fuse(tmp_path / "teacher", tmp_path / "student", settings)
    unsettle(tmp_path / "student")

    export_gguf(tmp_path / "student", tmp_path / "f32.gguf")

    model = load_fused(tmp_path / "student")
    with loaded(tmp_path / "f32.gguf") as engine:
        for ids in prompts(5, len(tokenizer)):
            assert_close(logits(engine, ids), model(torch.tensor([ids])).logits[0], 1e-3)
            assert greedy(engine, ids, NEW) == expected(model, ids, NEW)


def test_sequences_decoded_together_are_as_alone(home: Path) -> None:
    path = file_of(home, "deltas")
    given = prompts(8, 4096)
    with loaded(path) as engine:
        alone = [greedy(engine, ids, NEW) for ids in given]
    with Together(path, len(given), 64, threads=2) as engine:
        assert engine.greedy(given, NEW) == alone


def test_bytes_are_the_plans(home: Path) -> None:
    """Experts take the plan's bytes but for the map of groups, which has 4 bytes an expert, not 8.

    The rest takes the checkpoint's, and 2 more for each number of norms and routers, in F32 here.
    """
    student = StudentReader.of(student_of(home, "scale and bias"))
    path = file_of(home, "scale and bias", "F16")
    tensors = gguf.GGUFReader(path).tensors
    experts = sum(int(t.n_bytes) for t in tensors if "_exps" in t.name)
    planned = sum(layer_bytes(student.shape, plan, 2) for plan in student.plans.values())
    maps = 4 * student.shape.experts * len(student.plans)
    assert experts == planned - maps

    stored = sum(int(t.n_bytes) for t in tensors)
    floats = sum(int(t.n_elements) for t in tensors if t.tensor_type.name == "F32")
    assert stored == student.total_bytes - maps + 2 * floats
    header = gguf.GGUFReader(path).data_offset
    assert 0 <= path.stat().st_size - header - stored < 32 * len(tensors), "what aligns tensors"


@pytest.mark.parametrize(("quant", "most"), [("F16", 0.001), ("Q8_0", 0.005), ("Q4_K_M", 0.05)])
def test_quantised_bases_predict_held_out_text_alike(
    quant: str, most: float, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(home, "deltas", quant)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.1.ffn_gate_up_exps.delta_b"] == kinds["blk.1.ffn_down_exps.delta_a"] == "F16"
    model = load_fused(student_of(home, "deltas"), dtype=torch.float32)
    documents = load_documents(demo.heldout_path())
    windows = tokenize(documents, load_tokenizer(demo.teacher_path()), 256, limit_tokens=4096)
    told, exact = [], []
    with loaded(path) as engine, torch.no_grad():
        for ids_T in windows:
            told.append(losses(logits(engine, ids_T.tolist()), ids_T))
            exact.append(losses(model(ids_T[None]).logits[0], ids_T))
    ratio = math.exp(float(torch.cat(told).mean() - torch.cat(exact).mean()))
    with capsys.disabled():
        print(f"fused, {quant}: perplexity x {ratio:.4f}, {path.stat().st_size} bytes")
    assert abs(ratio - 1) < most


def test_bases_of_k_quants_are_chosen_by_group(tokenizer: Any, tmp_path: Path) -> None:
    """Rows of 256, which Q4_K takes: the same logits as from the numbers that it stands for.

    A token has all eight experts in two groups, so it asks for each base four times, and no
    rounding makes it choose others.
    """
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts_per_tok": 8}
    wide["num_hidden_layers"] = 1
    save(tmp_path / "teacher", "qwen3_moe", tokenizer, norm_topk_prob=True, **wide)
    settings = {"data": str(write_text(tmp_path / "text.txt")), **QUICKLY}
    fuse(tmp_path / "teacher", tmp_path / "student", {**settings, "groups": 2, "rank": 8})
    export_gguf(tmp_path / "student", tmp_path / "small.gguf", quant="Q4_K_M")
    requantize(tmp_path / "small.gguf", tmp_path / "f32.gguf")

    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    assert kinds["blk.0.ffn_gate_up_exps.weight"] == "Q4_K"
    given = prompts(3, len(tokenizer))
    with loaded(tmp_path / "small.gguf") as small, loaded(tmp_path / "f32.gguf") as whole:
        for ids in given:
            # Q4_K's products round what they multiply to 8 bits; so far off is the teacher's too.
            assert_close(logits(small, ids), logits(whole, ids), 0.1)


def requantize(source: Path, target: Path) -> None:
    """Write what a quantised file stands for, in F32."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    paths = (str(source).encode(), str(target).encode())
    assert llama_cpp.llama_model_quantize(*paths, llama_cpp.ctypes.byref(options)) == 0


def test_a_version_to_come_is_refused(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "later.gguf"
    path.write_bytes(file_of(home, "no deltas").read_bytes())
    field = gguf.GGUFReader(path, "r+").fields["moefuse.version"]
    field.parts[field.data[0]][0] = 2

    ran = in_a_process(path, [[1, 2]])
    assert ran.returncode == 1
    assert "fused experts of version 2 are unknown" in ran.stderr


# Beside the stock engine.


def in_stock(path: Path, given: list[list[int]]) -> subprocess.CompletedProcess[str]:
    if not STOCK.is_dir():
        pytest.skip("make llama-cpp has not built the stock engine")
    return in_a_process(path, given, STOCK)


def in_a_process(
    path: Path, given: list[list[int]], *packages: Path
) -> subprocess.CompletedProcess[str]:
    """Let ``generating.py`` load a file, with ``packages`` in front of all others."""
    script = Path(__file__).with_name("generating.py")
    found = os.pathsep.join(map(str, (*packages, script.parents[1], *filter(None, sys.path))))
    return subprocess.run(
        [sys.executable, script, path, json.dumps(given), str(NEW)],
        env={**os.environ, "PYTHONPATH": found},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_stock_engine_refuses_fused_files(form: str, home: Path) -> None:
    ran = in_stock(file_of(home, form), [[1, 2]])
    assert ran.returncode == 1
    assert "'blk.1.ffn_down_exps.weight' has wrong shape" in ran.stderr
    assert (
        f"expected     64,    160,     64, got     64,    160, {FORMS[form]['groups']:6}"
        in ran.stderr
    )


def test_the_stock_engine_refuses_as_many_groups_as_experts(tokenizer: Any, tmp_path: Path) -> None:
    """Bases have the shapes that it looks for there, but the map of groups is left over."""
    save(tmp_path / "teacher", "deepseek_v2", tokenizer)
    settings = {"data": str(write_text(tmp_path / "text.txt")), **QUICKLY, "groups": 8, "rank": 0}
    fuse(tmp_path / "teacher", tmp_path / "student", settings)
    export_gguf(tmp_path / "student", tmp_path / "f32.gguf")

    ran = in_stock(tmp_path / "f32.gguf", [[1, 2]])
    assert ran.returncode == 1
    assert "wrong number of tensors" in ran.stderr


@pytest.mark.parametrize("case", FAMILIES)
def test_plain_files_give_the_same_tokens_in_both(
    case: str, tokenizer: Any, tmp_path: Path
) -> None:
    family, changes = FAMILIES[case]
    save(tmp_path / "plain", family, tokenizer, **changes)
    export_gguf(tmp_path / "plain", tmp_path / "f32.gguf")
    given = prompts(5, len(tokenizer))

    ran = in_stock(tmp_path / "f32.gguf", given)

    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["version"] == "0.3.36"
    assert llama_cpp.__version__ == "0.3.36+moefuse.1"
    with loaded(tmp_path / "f32.gguf") as engine:
        assert told["tokens"] == [greedy(engine, ids, NEW) for ids in given]
