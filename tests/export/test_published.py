"""Checkpoints in the layout published in 2025, generated from its formula, imported and run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from running import run_here, write_jsonl, write_text
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moefuse.collapse import collapse
from moefuse.evaluation.loading import load_tokenizer
from moefuse.evaluation.quality import evaluate
from moefuse.export.gguf.write import export_gguf
from moefuse.export.published import import_published
from moefuse.heal import heal
from moefuse.measuring import read_held_out
from moefuse.modeling import load_fused
from moefuse.modeling.modeling_moefuse import MultiplexedExperts

G, M, R, D, F = 4, 2, 3, 32, 16
IDS_BS = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS = ["mixture", "later mixture", "lora"]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def published_layer(prefix: str, kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Return one layer's tensors in that layout, none of them zero."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    made = {
        f"{prefix}inv_mapping_dict": torch.randperm(G * M, generator=generator).view(G, M).float()
    }
    for group in range(G):
        path = f"{prefix}experts.{group}."
        made[f"{path}mask_up_proj.weight"] = random(D, M)
        for name in PROJECTIONS:
            inner, outer = (F, D) if name == "down_proj" else (D, F)
            made[f"{path}{name}.fused_layer.weight"] = random(outer, inner)
            each = () if kind == "lora" else (M,)
            made[f"{path}{name}.qa_weights"] = random(*each, R, inner)
            made[f"{path}{name}.qb_weights"] = random(*each, outer, R)
            later = (M,) if kind == "later mixture" else ()
            made[f"{path}{name}.scaling_factor"] = random(*later, outer)
            if kind == "lora":
                made[f"{path}{name}.mask_up_proj"] = random(M, R)
    return made


class Formula(nn.Module):
    """The published formula, token by token and group by group, written down plainly."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str, kind: str) -> None:
        super().__init__()
        self.t = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        self.kind = kind

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        members = self.t["inv_mapping_dict"].long().tolist()
        out = torch.zeros_like(x_TD)
        for t, (x, index, weight) in enumerate(zip(x_TD, index_TK, weight_TK, strict=True)):
            of = dict(zip(index.tolist(), weight, strict=True))
            for group in range(G):
                v = torch.stack([of.get(e, torch.tensor(0.0)) for e in members[group]])
                if v.sum() != 0:
                    out[t] += v.sum() * self.group(group, x, v)
        return out

    def group(self, group: int, x: Tensor, v: Tensor) -> Tensor:
        s = torch.where(v != 0, v, torch.tensor(-1e9)).softmax(0)
        x = x + self.t[f"experts.{group}.mask_up_proj.weight"] @ s
        inner = nn.functional.silu(self.linear(group, "gate_proj", x, s))
        return self.linear(group, "down_proj", inner * self.linear(group, "up_proj", x, s), s)

    def linear(self, group: int, name: str, u: Tensor, s: Tensor) -> Tensor:
        p = f"experts.{group}.{name}."
        a, b, scale = (self.t[p + n] for n in ("qa_weights", "qb_weights", "scaling_factor"))
        y = self.t[p + "fused_layer.weight"] @ u
        if self.kind == "lora":
            return y + scale * (b @ ((s @ self.t[p + "mask_up_proj"]) * (a @ u)))
        if self.kind == "mixture":
            return y + scale * sum(s[j] * (b[j] @ (a[j] @ u)) for j in range(M))
        mixed = [s[j] * scale[j] * (b[j] @ (a[j] @ u)) for j in range(M) if s[j] > 1e-6]
        return y + 0.1 * sum(mixed)


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., tuple[Path, nn.Module]]:
    """``published(family, kind)`` returns a checkpoint in that layout, and the model it means."""

    def make(family: str = "deepseek_v2", kind: str = "mixture") -> tuple[Path, nn.Module]:
        model: Any = save_tiny(tmp_path / "teacher", family)
        old = tmp_path / "old"
        shutil.copytree(tmp_path / "teacher", old)
        tensors = {n: t for p in old.glob("*.safetensors") for n, t in load_file(p).items()}
        kept = {n: t for n, t in tensors.items() if ".mlp.experts." not in n}
        for path in old.glob("model*"):
            path.unlink()
        generator = torch.Generator().manual_seed(1)
        for layer in (1, 2):
            prefix = f"model.layers.{layer}.mlp."
            kept |= published_layer(prefix, kind, generator)
            model.model.layers[layer].mlp.experts = Formula(kept, prefix, kind)
        save_file(kept, old / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((old / "config.json").read_text())
        config |= {
            "n_fused_experts": G,
            "fused_expert_dora_rank": R,
            "fused_expert_method": kind.removeprefix("later "),
            "auto_map": {"AutoModelForCausalLM": "modeling_of_theirs.Theirs"},
        }
        (old / "config.json").write_text(json.dumps(config))
        return old, model.eval()

    return make


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_outputs_are_the_formulas(published: Any, tmp_path: Path, family: str, kind: str) -> None:
    old, expected = published(family, kind)

    model = load_fused(import_published(old, tmp_path / "new")).eval()

    assert_close(model(IDS_BS).logits, expected(IDS_BS).logits)
    assert_close(one_by_one(model), expected(IDS_BS[:1]).logits)


def one_by_one(model: Any) -> Tensor:
    """Logits token by token with a cache, where the published code leaves adapters out."""
    cache, rows = None, []
    for at in range(IDS_BS.shape[1]):
        step: Any = model(IDS_BS[:1, at : at + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        rows.append(step.logits)
    return torch.cat(rows, 1)


def test_its_tokenizer_is_what_models_of_the_family_load(published: Any, tmp_path: Path) -> None:
    """Its settings name another class, as DeepSeek's do, which cuts text otherwise."""
    old, _ = published()
    settings = json.loads((old / "tokenizer_config.json").read_text())
    named = {**settings, "tokenizer_class": "LlamaTokenizerFast"}
    (old / "tokenizer_config.json").write_text(json.dumps(named))

    import_published(old, tmp_path / "new")

    theirs, ours = (load_tokenizer(tmp_path / name) for name in ("teacher", "new"))
    assert type(ours) is type(theirs)
    text = "  def  add(first):"
    assert ours(text).input_ids == theirs(text).input_ids


@torch.no_grad()
def test_it_loads_without_moefuses_classes(published: Any, tmp_path: Path) -> None:
    old, expected = published()
    import_published(old, tmp_path / "new")

    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", trust_remote_code=True, output_loading_info=True
    )

    assert not any(found.values())
    assert_close(model(IDS_BS).logits, expected(IDS_BS).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_packed_layers_come_out_plain(
    published: Any, tmp_path: Path, family: str, kind: str
) -> None:
    """AWQ at 4 bits: codes times scales are the layer, exactly."""
    old, expected = published(family, kind)
    tensors = load_file(old / "model.safetensors")
    names = [name for name in tensors if name.endswith("fused_layer.weight")]
    for name in names:
        packed, plain = awq(tensors.pop(name))
        stem = name.removesuffix("weight")
        tensors |= {stem + part: value for part, value in packed.items()}
        for layer in (1, 2):
            prefix = f"model.layers.{layer}.mlp."
            if name.startswith(prefix):
                expected.model.layers[layer].mlp.experts.t[name.removeprefix(prefix)] = plain
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((old / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 16,
        "zero_point": True,
        "version": "gemm",
    }
    (old / "config.json").write_text(json.dumps(config))

    model = load_fused(import_published(old, tmp_path / "new"), dtype=torch.float32).eval()

    with torch.no_grad():
        # Packed weights are fp16 or bf16, whose roundings the formula does not have.
        assert_close(model(IDS_BS).logits, expected(IDS_BS).logits, 3e-2)
        assert_close(one_by_one(model), expected(IDS_BS[:1]).logits, 3e-2)


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Pack (out, in) as AWQ does, eight neighbouring outputs to a word; return what it means."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    outer, inner = weight.shape
    scale = weight.abs().amax() / 7
    code = (weight / scale).round().clamp(-8, 7).long() + 8

    def pack(values: Tensor) -> Tensor:
        eights = values.unflatten(-1, (-1, 8))[..., order]
        word = sum(eights[..., i] << (4 * i) for i in range(8))
        return torch.where(word >= 2**31, word - 2**32, word).int()  # type: ignore[operator, arg-type]

    zeros = torch.full((inner // 16, outer), 8)
    parts = {
        "qweight": pack(code.T.contiguous()),
        "qzeros": pack(zeros),
        "scales": torch.full((inner // 16, outer), float(scale)).half(),
    }
    return parts, (code - 8) * scale.half().float()


def test_healing_works_on_it(published: Any, tmp_path: Path) -> None:
    old, _ = published()
    import_published(old, tmp_path / "new")
    values = {
        "data": str(write_text(tmp_path / "text.txt")),
        "tokens": "3K",
        "sequence_length": 32,
        "batch_size": 8,
        "train": "deltas",
        "logging_steps": 1,
    }

    result = heal(tmp_path / "new", tmp_path / "healed", values, teacher=tmp_path / "teacher")

    losses = [line["loss"] for line in result.log if "loss" in line]
    assert losses[-1] < losses[0]
    healed = load_fused(tmp_path / "healed")
    assert any(isinstance(m, MultiplexedExperts) for m in healed.modules())


def test_what_is_wrong_is_told(
    published: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old, _ = published()
    config = json.loads((old / "config.json").read_text())
    tensors = load_file(old / "model.safetensors")

    def refused(words: str, changes: dict[str, Any], without: str | None = None) -> None:
        (old / "config.json").write_text(json.dumps({**config, **changes}))
        kept = {name: tensor for name, tensor in tensors.items() if name != without}
        save_file(kept, old / "model.safetensors", metadata={"format": "pt"})
        ran = run_here(capfd, "import", old, tmp_path / "new")
        assert ran.status == 2
        assert words in ran.err
        assert not (tmp_path / "new").exists()

    refused("kind 'dora'", {"fused_expert_method": "dora"})
    refused("equal size", {"n_fused_experts": 3})
    refused("has the shape", {"fused_expert_dora_rank": 5})
    refused("lacks the tensor", {}, without="model.layers.1.mlp.inv_mapping_dict")
    ran = run_here(capfd, "import", tmp_path / "teacher", tmp_path / "new")
    assert ran.status == 2
    assert "no checkpoint of that layout" in ran.err


def test_nothing_computes_it_but_its_own_form(
    published: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old, _ = published()
    import_published(old, tmp_path / "new")
    for command, out in ((("expand",), "plain"), (("export", "gguf"), "out.gguf")):
        ran = run_here(capfd, *command, tmp_path / "new", tmp_path / out)
        assert ran.status == 2
        assert "mixed before the non-linearity" in ran.err
        assert not (tmp_path / out).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_collapsed_and_exported(published: Any, tmp_path: Path, kind: str) -> None:
    """Its own layers are the teacher, layer by layer; what is learnt is a plain model."""
    old, expected = published("deepseek_v3", kind)
    import_published(old, tmp_path / "new")
    held_out = write_jsonl(tmp_path / "held.jsonl", documents=4)
    values: dict[str, Any] = {
        "data": str(write_text(tmp_path / "text.txt")),
        "held_out": str(held_out),
        "held_out_tokens": 512,
        "tokens": 512,
        "sequence_length": 64,
        "batch_size": 4,
        "batch_tokens": 64,
        "router_steps": 20,
        "steps": 40,
    }

    rates = {"tokens": "2K", "batch_size": 4, "expert_rate": 2e-3, "rate": 1e-3}
    healing = rates if kind == "mixture" else None
    result = collapse(tmp_path / "new", tmp_path / "plain", values, healing=healing)

    assert healing is None or result.losses[1].kl < result.losses[0].kl
    assert all(error["after"] < error["before"] for error in result.errors.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.config.n_routed_experts == result.groups == G
    # What is told to be lost is lost against the formula.
    tokenizer = load_tokenizer(tmp_path / "new")
    told = read_held_out(held_out, tokenizer, 64, values["held_out_tokens"])
    lost = evaluate(
        {"plain": model.eval()},
        told.sequences,
        teacher=expected,
        documents=told.documents,
        pad_id=0,
        description=None,
    )["plain"]
    assert lost.kl == pytest.approx(result.losses[-1].kl, rel=1e-3)
    export_gguf(tmp_path / "plain", tmp_path / "out.gguf", pre_tokenizer="gpt-2")
    assert (tmp_path / "out.gguf").stat().st_size > 0
