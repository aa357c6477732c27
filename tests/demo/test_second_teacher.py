"""The teacher of Qwen3-MoE architecture: the forward pass that trains it, and its script."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from moefuse import inspect
from moefuse.demo import teacher_data, teacher_model, train_teacher
from moefuse.errors import UserError

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}


def untrained(**changes: Any) -> Any:
    """A tiny model whose norms' weights are not all one, as after training."""
    torch.manual_seed(0)
    model: Any = Qwen3MoeForCausalLM(teacher_model.qwen3_moe_config(**(TINY | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(3)
    return model


@pytest.mark.parametrize("dense", [[], [0]], ids=["every layer sparse", "first layer dense"])
def test_training_forward_agrees_with_transformers(dense: list[int]) -> None:
    model = untrained(mlp_only_layers=dense)
    # Transformers gives no gradient to the padding token's embedding, so it takes no part.
    rows = torch.randint(2, teacher_data.VOCAB_SIZE, (2, 33))
    loss, balance, shares = teacher_model.Objective(model, torch.float32, compiled=False)(rows)
    expected = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert balance >= 0.9 * len(shares)
    torch.testing.assert_close(shares.sum(1), torch.ones(3 - len(dense)))
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(loss, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    assert {name.split(".")[-2] for name in names} >= {"q_norm", "k_norm", "gate", "embed_tokens"}
    for name, mine, other in zip(names, ours, theirs, strict=True):
        assert other.norm() > 0, name
        assert (mine - other).norm() <= 1e-4 * other.norm(), name


def test_balance_loss_is_that_of_transformers() -> None:
    model = untrained()
    rows = torch.randint(2, teacher_data.VOCAB_SIZE, (2, 33))
    _, balance, _ = teacher_model.Objective(model, torch.float32, compiled=False)(rows)
    logits = model(rows[:, :-1], output_router_logits=True).router_logits
    shares = [F.one_hot(x.topk(3).indices, 8).float().mean((0, 1)) for x in logits]
    means = [x.softmax(-1).mean(0) for x in logits]
    expected = sum(8 * (s * m).sum() for s, m in zip(shares, means, strict=True))
    torch.testing.assert_close(balance, expected)


def test_it_fits_fifteen_megabytes_in_bf16() -> None:
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(teacher_model.qwen3_moe_config())
    assert 6_500_000 < model.num_parameters() < 7_300_000
    assert model.config.norm_topk_prob
    assert not hasattr(model.model.layers[0].mlp, "shared_experts")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `prepare` leaves it, of shuffled runs of a few tokens."""
    folder = tmp_path_factory.mktemp("work")
    generator = torch.Generator().manual_seed(0)
    documents = [
        torch.arange(5, 45).roll(int(shift)).tolist()
        for shift in torch.randint(0, 40, (60,), generator=generator)
    ]
    tokens, offsets = teacher_data.pack(documents)
    arrays = {
        "code_tokens": tokens,
        "code_offsets": offsets,
        "chat_tokens": tokens,
        "chat_offsets": offsets,
        "heldout_tokens": tokens[:600],
    }
    save_file(arrays, folder / "corpus.safetensors")
    return folder


def train(work: Path, out: Path, steps: int, architecture: str = "qwen3_moe") -> train_teacher.Run:
    """Train a tiny model of that architecture on the CPU."""
    options = f"train --work {work} --out {out} --device cpu --steps {steps}"
    options += f" --architecture {architecture} --batch 4 --length 32 --lr 0.01 --dropout 0.1"
    args = train_teacher.parser().parse_args(options.split())
    config = teacher_model.qwen3_moe_config(**TINY) if architecture == "qwen3_moe" else None
    return train_teacher.train(args, config)


def test_training_learns_resumes_and_exports(work: Path, tmp_path: Path) -> None:
    first = train(work, tmp_path, 6)
    assert first.progress.step == 6
    assert first.progress.best_heldout < math.log(teacher_data.VOCAB_SIZE) - 0.2
    weights = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    moments = first.optimizer.state_dict()["state"]

    again = train_teacher.Run(first.args, teacher_model.qwen3_moe_config(**TINY))
    assert all(torch.equal(p, weights[name]) for name, p in again.model.named_parameters())
    for index, fields in again.optimizer.state_dict()["state"].items():
        assert all(torch.equal(fields[key], moments[index][key]) for key in fields)
    second = train(work, tmp_path, 10)
    assert second.progress.step == 10
    assert second.progress.best_heldout < first.progress.best_heldout

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert exported.dtype == torch.bfloat16
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    for name, parameter in exported.named_parameters():
        trained = second.model.get_parameter(name).bfloat16()
        assert torch.equal(parameter, trained), name
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_moefuse_reads_the_export(tmp_path: Path) -> None:
    teacher_model.save_checkpoint(untrained(), tmp_path)
    facts = inspect(tmp_path)
    assert (facts.family, facts.layers, facts.moe_layers) == ("qwen3_moe", 3, 3)
    assert (facts.experts, facts.top_k, facts.shared_experts) == (8, 3, 0)
    assert (facts.hidden, facts.intermediate) == (32, 16)


def test_a_run_is_not_resumed_as_another_model(work: Path, tmp_path: Path) -> None:
    train(work, tmp_path, 1)
    with pytest.raises(UserError, match="another model"):
        train(work, tmp_path, 2, architecture="deepseek_v2")
