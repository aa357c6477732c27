"""The loss in chunks: the plain one's numbers and gradients, and never all logits at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from tiny import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, TrainingArguments

from moefuse.config import HealConfig
from moefuse.families import all_families
from moefuse.healing import losses
from moefuse.healing.losses import losses_in_place_of_logits
from moefuse.healing.sources import LiveTeacher
from moefuse.healing.text import PackedRows, PackedText
from moefuse.healing.trainer import IGNORED, HealingTrainer, collate

WIDE = 641
"""A vocabulary that is no other size of the tiny models."""
CHUNK = 7


def packed(vocabulary: int, rows: int = 3, length: int = 20) -> PackedText:
    """Two pieces in each row, the second ending in padding that does not count."""
    ids_NS = torch.randint(
        vocabulary, (rows, length), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    cut = 8
    position_S = torch.cat([torch.arange(cut), torch.arange(length - cut)]).int()
    counted_NS = torch.ones(rows, length, dtype=torch.bool)
    counted_NS[:, cut - 1] = False
    counted_NS[:, -3:] = False
    return PackedText(ids_NS, position_S.repeat(rows, 1), counted_NS)


def trainer_of(
    student: PreTrainedModel, teacher: PreTrainedModel, options: HealConfig, folder: Path
) -> HealingTrainer:
    family = all_families()[student.config.model_type]
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    source = LiveTeacher(teacher, family)
    return HealingTrainer(
        family=family, options=options, source=source, model=student, args=arguments
    )


def batch_of(text: PackedText) -> dict[str, Tensor]:
    rows = PackedRows(text)
    return collate([rows[row] for row in range(len(rows))])


def plain_loss(student: Any, teacher: Any, batch: dict[str, Tensor], options: HealConfig) -> Tensor:
    """The same loss from whole logits, in fp64, written as its definition."""
    given = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "use_cache": False,
        "output_hidden_states": True,
    }
    with torch.no_grad():
        wanted = teacher(**given)
    found = student(**given)
    counted_BS = batch["labels"] != IGNORED
    heat = options.temperature
    raw_TV = found.logits[counted_BS].double()
    log_p_TV = (wanted.logits[counted_BS].double() / heat).log_softmax(-1)
    log_q_TV = (raw_TV / heat).log_softmax(-1)
    forward_T = heat**2 * (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    reverse_T = heat**2 * (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)
    next_T1 = batch["labels"][counted_BS][:, None]
    entropy_T = -raw_TV.log_softmax(-1).gather(1, next_T1)[:, 0]
    layers = zip(wanted.hidden_states[1:], found.hidden_states[1:], strict=True)
    hidden = torch.stack(
        [
            ((t - s)[counted_BS] ** 2).mean() / (t[counted_BS] ** 2).mean()
            for t, s in ((t.double(), s.double()) for t, s in layers)
        ]
    ).mean()
    return (
        options.forward_kl * forward_T.mean()
        + options.reverse_kl * reverse_T.mean()
        + options.cross_entropy * entropy_T.mean()
        + options.hidden * hidden
    )


MIX = HealConfig(forward_kl=0.7, reverse_kl=0.4, cross_entropy=0.3, hidden=0.2, temperature=2.0)


@pytest.mark.parametrize("model_type", sorted(all_families()))
def test_in_chunks_it_is_the_plain_loss(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tiny_model(model_type), tiny_model(model_type, seed=1)
    batch = batch_of(packed(64))
    wanted = plain_loss(student, teacher, batch, MIX)
    wanted.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    # 48 tokens count: six chunks of 7 and one of 6.
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 64 * CHUNK + 63)
    trainer = trainer_of(student, teacher, MIX, tmp_path)

    found = trainer.compute_loss(student, dict(batch))
    found.backward()

    assert_close(found, wanted.float())
    assert "lm_head.weight" in gradients
    for name, parameter in student.named_parameters():
        if name in gradients:
            assert parameter.grad is not None, name
            assert_close(parameter.grad, gradients[name])
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "cross_entropy", "hidden"])
def test_each_term_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = {"forward_kl": 0.0, "reverse_kl": 0.0, "cross_entropy": 0.0, "hidden": 0.0}
    options = HealConfig(**{**none, name: 1.5})
    student, teacher = tiny_model(), tiny_model(seed=1)
    batch = batch_of(packed(64))
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 64 * CHUNK)

    found = trainer_of(student, teacher, options, tmp_path).compute_loss(student, dict(batch))

    assert_close(found, plain_loss(student, teacher, batch, options).float())


class Widest(TorchDispatchMode):
    """Keeps how many rows of logits any tensor ever had, forward and backward."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == WIDE:
                rows = tensor.numel() // WIDE
                # The head's own weights and their gradients are as many rows as D, turned.
                if rows != self.hidden:
                    self.rows = max(self.rows, rows)
        return made


@pytest.mark.parametrize("model_type", sorted(all_families()))
def test_all_logits_are_never_there_at_once(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_model(model_type, vocab_size=WIDE)
    teacher = tiny_model(model_type, seed=1, vocab_size=WIDE)
    batch = batch_of(packed(WIDE))
    trainer = trainer_of(student, teacher, MIX, tmp_path)

    def most_rows() -> int:
        with Widest(student.config.hidden_size) as seen:
            trainer.compute_loss(student, dict(batch)).backward()
        return seen.rows

    whole = most_rows()
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", WIDE * CHUNK)
    assert (whole, most_rows()) == (48, CHUNK)


def test_the_head_is_itself_again_afterwards() -> None:
    model = tiny_model()
    head: Any = model.get_output_embeddings()
    ids_BS = torch.arange(6)[None]
    before = model(ids_BS).logits
    with (
        pytest.raises(ZeroDivisionError),
        losses_in_place_of_logits(head, lambda hidden_BSD: hidden_BSD.sum(-1)),
    ):
        assert model(ids_BS).logits.shape == (1, 6, 1)
        raise ZeroDivisionError
    assert "forward" not in vars(head)
    assert torch.equal(model(ids_BS).logits, before)
