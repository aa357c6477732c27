"""Make a bundled teacher: prepare the corpus, train the model, evaluate it.

    python -m moefuse.demo.train_teacher prepare  --work DIR
    python -m moefuse.demo.train_teacher train    --work DIR --out DIR --architecture deepseek_v2
    python -m moefuse.demo.train_teacher evaluate --work DIR --model DIR

The corpus is the Python standard library of the interpreter that runs `prepare`. Here are the
command line and the training loop; `teacher_data` holds the corpus, `teacher_model` the model and
its losses, `teacher_card` the evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moefuse.demo.teacher_card import evaluate
from moefuse.demo.teacher_data import Corpus, batches, prepare, to_sequences
from moefuse.demo.teacher_model import ARCHITECTURES, Objective, save_checkpoint
from moefuse.errors import UserError

SEQUENCE_LENGTH = 1024
DEMO = Path(__file__).resolve().parent


# --- the run and its files --------------------------------------------------------------------


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; the norms' weights are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)


@dataclass
class Progress:
    """Where a training run stands; stored beside its tensors."""

    step: int = 0
    epoch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_heldout: float = math.inf


class Run:
    """A training run: model, optimizer, progress, and their files under one folder."""

    def __init__(self, args: argparse.Namespace, config: Any) -> None:
        self.args, self.device = args, torch.device(args.device)
        torch.manual_seed(args.seed)
        self.model = ARCHITECTURES[config.model_type].causal_lm(config)
        nn.Module.to(self.model, self.device, torch.float32)
        self.optimizer = make_optimizer(self.model, args.lr, args.weight_decay)
        self.progress = Progress()
        self.folder = Path(args.out)
        if (self.folder / "progress.json").exists():
            self.load()

    def load(self) -> None:
        """Take up the run from its folder."""
        state = load_file(self.folder / "state.safetensors", device=str(self.device))
        own = dict(self.model.named_parameters())
        stored = {k[6:]: v for k, v in state.items() if k.startswith("model.")}
        if own.keys() != stored.keys():
            raise UserError(f"{self.folder} holds a run of another model; give another --out.")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(stored[name])
        restored = self.optimizer.state_dict()
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, index, field = key.split(".")
                restored["state"].setdefault(int(index), {})[field] = value
        self.optimizer.load_state_dict(restored)
        self.progress = Progress(**json.loads((self.folder / "progress.json").read_text()))

    def save(self) -> None:
        """Write the run's state. Each file is replaced whole, the progress last."""
        # Parameters, not the state dict: that names tied embeddings twice.
        tensors = {f"model.{k}": v.detach() for k, v in self.model.named_parameters()}
        for index, fields in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{field}": value for field, value in fields.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / "state.tmp"
        save_file(tensors, scratch)
        scratch.replace(self.folder / "state.safetensors")
        scratch.write_text(json.dumps(asdict(self.progress)))
        scratch.replace(self.folder / "progress.json")

    def learning_rate(self, done: float) -> float:
        """Rate at a share `done` of the run: 2 % warm-up, then a straight line to zero."""
        return self.args.lr * min(done / 0.02, (1 - done) / 0.98) if done < 1 else 0.0

    def share_done(self, started: float) -> float:
        """How much of the run is done, by steps if they were asked for, else by the clock."""
        if self.args.steps:
            return self.progress.step / self.args.steps
        return (time.monotonic() - started) / (60 * self.args.minutes)


def export(run: Run, folder: Path, heldout: float) -> None:
    """Write the model as a bf16 Hugging Face checkpoint with a note of how it was trained."""
    save_checkpoint(run.model, folder)
    facts = asdict(run.progress) | {"packed_heldout_cross_entropy": heldout}
    del facts["best_heldout"]
    options = {
        key: getattr(run.args, key)
        for key in ("batch", "length", "lr", "weight_decay", "dropout", "balance", "seed")
    }
    device = torch.cuda.get_device_name() if run.device.type == "cuda" else "CPU"
    note = {"training": facts | options | {"device": device}}
    (folder / "metrics.json").write_text(json.dumps(note, indent=1) + "\n")


# --- the training loop ------------------------------------------------------------------------


def train_step(run: Run, objective: Objective, rows: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """One update on token rows [batch, length + 1]. Returns cross-entropy and balance loss."""
    loss, balance, _ = objective(rows, run.args.dropout)
    (loss + run.args.balance * balance).backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return loss.detach(), balance.detach()


def verify_gradients(run: Run, objective: Objective, rows: Tensor) -> None:
    """Stop if the objective's gradients are far from those of the same code run eagerly."""
    norms = []
    for candidate in (objective, Objective(run.model, objective.dtype, compiled=False)):
        run.model.zero_grad()
        candidate(rows)[0].backward()
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        norms.append(torch.stack([grad.norm() for grad in grads]))
    worst = ((norms[0] - norms[1]).abs() / norms[1].clamp_min(1e-12)).max().item()
    if not worst < 0.2:
        raise RuntimeError(f"compiled gradients differ from eager ones by a factor of {worst:.3g}")


def check_heldout(run: Run, objective: Objective, rows: Tensor, train_loss: float) -> None:
    """Measure the held-out text, report, and export the model if it is the best so far."""
    heldout, shares = objective.heldout(rows, min(run.args.batch, len(rows)))
    p = run.progress
    least, most = (shares.min().item(), shares.max().item())
    experts = shares.shape[1]
    print(
        f"step {p.step} epoch {p.epoch} tokens {p.tokens / 1e6:.1f}M {p.seconds:.0f}s"
        f" {p.tokens / max(p.seconds, 1e-9) / 1e3:.0f}k/s train {train_loss:.4f}"
        f" heldout {heldout:.4f} load {least * experts:.2f}..{most * experts:.2f}",
        flush=True,
    )
    if heldout < p.best_heldout:
        p.best_heldout = heldout
        export(run, run.folder / "export", heldout)


def train(args: argparse.Namespace, config: Any = None) -> Run:
    """Train until the time or the steps are used up; the best held-out model is in out/export."""
    run = Run(args, config or ARCHITECTURES[args.architecture].config())
    torch.set_float32_matmul_precision("high")
    corpus = Corpus(args.work)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    objective = Objective(run.model, dtype, compiled=args.compile)
    heldout = to_sequences(corpus.heldout, args.length).to(run.device)
    if args.compile:
        # Before the clock starts, so that compiling does not eat the warm-up.
        verify_gradients(run, objective, heldout[: args.batch])
        objective(heldout[: args.batch], args.dropout)[0].backward()
        run.model.zero_grad()
    started = time.monotonic() - run.progress.seconds
    next_check, recent = args.check_every, torch.zeros(2, device=run.device)
    for epoch, rows in batches(corpus, run.progress.epoch, args.batch, args.length, run.device):
        done = run.share_done(started)
        if done >= 1:
            break
        losses = train_step(run, objective, rows, run.learning_rate(done))
        recent = (
            torch.stack(losses)
            if run.progress.step == 0
            else recent.lerp(torch.stack(losses), 0.05)
        )
        run.progress.step += 1
        run.progress.epoch = epoch
        run.progress.tokens += rows[:, 1:].numel()
        run.progress.seconds = time.monotonic() - started
        if run.progress.seconds > next_check:
            check_heldout(run, objective, heldout, recent[0].item())
            next_check = time.monotonic() - started + args.check_every
            run.save()
    check_heldout(run, objective, heldout, recent[0].item())
    run.save()
    return run


# --- command line -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of the three steps."""
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    steps = top.add_subparsers(dest="command", required=True)
    one = steps.add_parser("prepare", help="corpus, tokenizer and shipped texts")
    one.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    one.add_argument("--calibration-bytes", type=int, default=1_000_000)
    one.add_argument("--heldout-bytes", type=int, default=600_000)
    two = steps.add_parser("train", help="train; the best model lands in OUT/export")
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--architecture", choices=ARCHITECTURES, default="deepseek_v2")
    two.add_argument("--minutes", type=float, default=4.3)
    two.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    two.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    two.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    two.add_argument("--batch", type=int, default=64, help="sequences")
    two.add_argument("--length", type=int, default=SEQUENCE_LENGTH, help="tokens a sequence")
    two.add_argument("--lr", type=float, default=3e-3)
    two.add_argument("--weight-decay", type=float, default=0.5)
    two.add_argument("--dropout", type=float, default=0.35)
    two.add_argument("--balance", type=float, default=0.01)
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--check-every", type=float, default=20.0, help="seconds")
    three = steps.add_parser("evaluate", help="measure, and write the model card")
    three.add_argument("--model", type=Path, required=True)
    three.add_argument("--note", default="", help="a sentence about the run, for the card")
    for step in (one, two, three):
        step.add_argument("--work", type=Path, required=True, help="folder `prepare` writes to")
        step.add_argument("--data", type=Path, default=DEMO / "data", help="shipped texts")
    return top


def main(argv: list[str] | None = None) -> None:
    """Run one step."""
    args = parser().parse_args(argv)
    {"prepare": prepare, "train": train, "evaluate": evaluate}[args.command](args)


if __name__ == "__main__":
    main()
