"""Healing: a whole student trained against its teacher's predictions, by Hugging Face's Trainer.

The subclass is thin: it says what the loss is, which parameters take which rates, and when a
checkpoint counts as whole. Logging, reporting, mixed precision, gradient accumulation and
checkpointing, several processes and resuming are the Trainer's own.

Shape suffixes: B rows, S tokens in a row, T tokens that count, D hidden width.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from moefuse import artifacts
from moefuse.config import HealConfig, parse_count
from moefuse.console import Meter
from moefuse.errors import UserError
from moefuse.families import Family
from moefuse.healing.losses import chunked_loss, losses_in_place_of_logits
from moefuse.healing.parts import freeze, parameter_groups, route_as_when_used
from moefuse.healing.sources import NoTeacher, TeacherSource, packed_inputs
from moefuse.healing.text import PackedRows, PackedText
from moefuse.mathematics.divergence import hidden_distance
from moefuse.modeling import FusedExperts
from moefuse.modeling.training import TrainedNeuronExperts, TrainedRows

IGNORED = -100
"""What a label is whose prediction does not count; Transformers' own choice."""
COMPLETE = "complete.json"
"""The file that says that a checkpoint of the Trainer is whole."""
KEPT_CHECKPOINTS = 2
TIMES = ("_runtime", "_per_second")
"""Ends of what the Trainer's log says about time."""
CODES_EVERY = 8
"""Optimiser steps after which the codes of low-bit rows are chosen anew."""


def collate(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows, and add the token that follows each as its label, where it counts."""
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    next_BS = batch["input_ids"].roll(-1, dims=1)
    labels_BS = next_BS.masked_fill(~batch.pop("counted"), IGNORED)
    # The Trainer counts "shift_labels" where there are "labels": predictions, over all processes.
    return {**batch, "labels": labels_BS, "shift_labels": labels_BS}


class HealingTrainer(Trainer):
    """A Trainer whose loss is the distance to a teacher's predictions."""

    def __init__(
        self, *, family: Family, options: HealConfig, source: TeacherSource, **given: Any
    ) -> None:
        super().__init__(**given)
        self.family, self.options, self.source = family, options, source
        route_as_when_used(self.model, family)  # type: ignore[arg-type]
        # The loss is a sum over all tokens of a step, divided by their number.
        self.model_accepts_loss_kwargs = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser that the arguments name, every part at its own rate."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            kind, given = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = list(parameter_groups(trained, self.family, self.options))
            self.optimizer = kind(groups, **given)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss over the tokens that count, of all processes' batches of a step."""
        counted_BS = inputs["shift_labels"] != IGNORED
        source, options = self._judges(learns=model.training)
        told = source.tell(inputs, counted_BS, hidden=bool(options.hidden))
        next_T = inputs["shift_labels"][counted_BS]

        student: Any = self.accelerator.unwrap_model(model)
        head = student.get_output_embeddings()
        scale = self.family.logit_scale(student.config.to_dict())

        def loss_of(hidden_BSD: Tensor) -> Tensor:
            hidden_TD = hidden_BSD[counted_BS]
            loss = chunked_loss(hidden_TD, head, told.targets, next_T, options, scale)
            return loss.view(1, 1)

        with losses_in_place_of_logits(head, loss_of):
            outputs = model(**packed_inputs(inputs), output_hidden_states=bool(told.hidden))
        # The model takes the loss for logits, and scales it as such.
        total = outputs.logits.sum() if scale == 1 else outputs.logits.sum() / scale
        if told.hidden:
            total = total + options.hidden * _hidden_losses(outputs, told.hidden, counted_BS)
        if num_items_in_batch is None:
            loss = total / counted_BS.sum()
        else:
            # Data parallel wrappers take the mean over processes of what is a sum over them.
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _judges(self, *, learns: bool) -> tuple[TeacherSource, HealConfig]:
        """Return what tells the targets of a batch and which losses count.

        On held-out text a cache has nothing to tell, and the text's cross-entropy is measured.
        """
        if learns or self.source.knows_all:
            return self.source, self.options
        return NoTeacher(), replace(self.options, forward_kl=0.0, cross_entropy=1.0)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log and return ``eval_loss``: the mean loss over the tokens of held-out text that count.

        The Trainer's own is a mean over batches, of which the last may be small or filled up, so
        that it would change with the size of batches and the number of processes.
        """
        model: Any = self.model
        model.eval()
        total_2 = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for batch, counts in self._held_out_batches():
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=1)
            if counts:
                predicted = (batch["shift_labels"] != IGNORED).sum()
                total_2 += torch.stack([loss.double(), predicted.to(loss.device)])
        whole_2: Any = self.accelerator.reduce(total_2)
        loss, predicted = whole_2.tolist()
        metrics: dict[str, float] = {"eval_loss": loss / self.accelerator.num_processes / predicted}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _held_out_batches(self) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """Yield this process's batches of held-out text, and whether each counts.

        A process that has run out of rows goes along with one that does not count, because a
        sharded model computes only where all processes do.
        """
        rows: Any = self.eval_dataset
        size, process = self.args.per_device_eval_batch_size, self.accelerator.process_index
        for start in range(0, len(rows), size * self.accelerator.num_processes):
            mine = range(len(rows))[start + process * size :][:size]
            yield collate([rows[row] for row in mine] or [rows[0]]), bool(mine)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Save the weights under the names that they have in memory.

        Under the names that a family has on the hub, its experts each by themselves, what is
        trained would not be found again by the Trainer, which goes on without a word.
        """
        assert output_dir is not None
        model: Any = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as always, then mark the checkpoint as whole."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            assert self.args.output_dir is not None
            place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            artifacts.write_json(place / COMPLETE, {"step": self.state.global_step})


def _hidden_losses(outputs: Any, told: tuple[Tensor, ...], counted_BS: Tensor) -> Tensor:
    """Return the sum over tokens of the mean over layers of the distance of hidden states."""
    distances = [
        hidden_distance(teacher_BSD[counted_BS], student_BSD[counted_BS]).sum()
        for teacher_BSD, student_BSD in zip(told, outputs.hidden_states[1:], strict=True)
    ]
    return torch.stack(distances).mean()


class _Watch(TrainerCallback):
    """Shows progress, renews codes, and stops when the loss is no number."""

    def __init__(self, model: nn.Module, meter: Meter | None) -> None:
        self.meter = meter
        self.coded = [m for m in model.modules() if isinstance(m, TrainedNeuronExperts)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Choose codes anew every few steps, counted over interruptions."""
        if state.global_step % CODES_EVERY == 0:
            for module in self.coded:
                module.choose_codes()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Show how far it is, and let nothing be lost or done twice by an interruption."""
        last = state.global_step >= state.max_steps
        # The Trainer would train on from a checkpoint of its last step.
        control.should_save = control.should_save and not last
        # A checkpoint does not hold the losses since the last line of the log.
        control.should_log = control.should_log or control.should_save or last
        if self.meter is not None:
            losses = [line["loss"] for line in state.log_history[-3:] if "loss" in line]
            self.meter.reach(state.global_step, f"(loss {losses[-1]:.4f})" if losses else "")

    def on_log(
        self,
        args: Any,  # noqa: ARG002
        state: Any,
        control: Any,  # noqa: ARG002
        logs: Any = None,
        **_: Any,
    ) -> None:
        """Refuse to go on from a loss that is no number."""
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise UserError(
                f"The loss is {loss} at step {state.global_step}; lower --rate and --expert-rate, "
                "or compute in another --dtype. The last checkpoint is kept."
            )


def tokens_per_row(text: PackedText) -> float:
    """Return how many tokens a row of the text holds on average.

    The few that pad it count, and of every piece but a row's first its first token does not.
    """
    return (int((text.position_NS > 0).sum()) + text.rows) / text.rows


def rows_per_step(options: HealConfig, processes: int) -> int:
    """Return how many rows all processes together read in one optimiser step."""
    return options.batch_size * options.accumulate * processes


def steps_of(text: PackedText, options: HealConfig, processes: int) -> int:
    """Return how many optimiser steps the tokens that were asked for make."""
    per_step = tokens_per_row(text) * rows_per_step(options, processes)
    return max(1, round(parse_count(options.tokens, "--tokens") / per_step))


def last_complete(directory: Path) -> Path | None:
    """Return the latest whole checkpoint of an interrupted run, or None."""
    found = [path.parent for path in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def remove_incomplete(directory: Path) -> None:
    """Remove what a kill left of checkpoints that were being written."""
    for path in directory.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)


def train(
    model: PreTrainedModel,
    source: TeacherSource,
    text: PackedText,
    family: Family,
    options: HealConfig,
    *,
    directory: Path,
    seed: int,
    device: str,
    mixed: bool,
    held_out: PackedText | None = None,
    resumable: bool = True,
    description: str | None = "Heal",
) -> list[dict[str, Any]]:
    """Heal ``model`` in place; returns the Trainer's log, one entry a line.

    ``model`` holds its experts as they are trained (see ``moefuse.modeling.training``); ``mixed``
    computes in bf16 around fp32 weights. Checkpoints lie in ``directory``; with ``resumable`` the
    same call goes on from the last whole one and ends as if it had not been interrupted.
    ``held_out`` is measured now and then, its losses logged as ``eval_loss``; with a cache, which
    knows nothing of it, its cross-entropy.
    """
    check_attention(model)
    freeze(model, family, options)
    resumed = last_complete(directory) if resumable else None
    arguments = _arguments(
        options,
        directory,
        text,
        seed=seed,
        device=device,
        mixed=mixed,
        measures=held_out is not None,
        starts=resumed is None,
        saves=resumable,
    )
    trainer = HealingTrainer(
        family=family,
        options=options,
        source=source,
        model=model,
        args=arguments,
        train_dataset=PackedRows(text),
        eval_dataset=None if held_out is None else PackedRows(held_out),
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)
    if getattr(trainer.accelerator.state, "fsdp_plugin", None) is not None:
        _prepare_for_sharding(trainer, model)
    done = int(resumed.name.split("-")[1]) if resumed else 0
    shown = description is not None and trainer.is_world_process_zero()
    meter = Meter(description or "", arguments.max_steps, done=done) if shown else None
    trainer.add_callback(_Watch(model, meter))
    if meter is None:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    else:
        with meter:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    return figures(trainer.state.log_history)


def figures(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of a Trainer's log without times, which differ from run to run, and without
    its last line, which tells only of what came after the last interruption.

    The Trainer sorts what it reads back from a checkpoint, so here all lines are sorted.
    """
    return [
        {key: line[key] for key in sorted(line) if not key.endswith(TIMES)}
        for line in log
        if "train_runtime" not in line
    ]


def check_attention(model: PreTrainedModel) -> None:
    """Refuse attention in which a token would see other pieces of its row.

    From positions alone Transformers makes a mask for sdpa, eager and flex attention; flash
    attention gets one only in batches of one row, and would else be wrong without a word.
    """
    kind = str(model.config._attn_implementation)
    if "flash" in kind:
        raise UserError(
            f"Packed rows cannot be read with {kind}, in which tokens would see other documents; "
            "take attn_implementation out of config.json, or make it sdpa."
        )


def _prepare_for_sharding(trainer: Trainer, model: nn.Module) -> None:
    """Refuse what FSDP cannot do, and make every process have a gradient of everything."""
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if trainer.accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("Accelerate shards by FSDP on several GPUs alone; leave --use_fsdp out.")
    if plugin.fsdp_version != 2:
        raise UserError(
            "Healing is sharded by FSDP 2 alone; give accelerate launch --fsdp_version 2."
        )
    for module in model.modules():
        if isinstance(module, TrainedRows):
            raise UserError(
                "Low-bit rows choose their codes from whole weights, which FSDP never holds; heal "
                "this student without --use_fsdp."
            )
        if isinstance(module, FusedExperts):
            module.register_forward_hook(use_every_base)


def use_every_base(module: FusedExperts, _: Any, out_TD: Tensor) -> Tensor:
    """Give bases that no token of this process chose a gradient of nought instead of none.

    FSDP sums the gradients of a layer as one run of numbers, which must be alike everywhere.
    """
    bases: Any = module.bases
    weights = [linear.weight[0, 0] for base in bases for linear in base.children()]
    return out_TD + 0 * torch.stack(weights).sum()


def whole_state(model: nn.Module) -> Mapping[str, Any]:
    """Return a model's state, gathered on the first process if it is sharded.

    All processes call this; the others of a sharded model get nothing.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model.state_dict()
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def _arguments(
    options: HealConfig,
    directory: Path,
    text: PackedText,
    *,
    seed: int,
    device: str,
    mixed: bool,
    measures: bool,
    starts: bool,
    saves: bool,
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=max(options.rate, options.expert_rate),
        weight_decay=options.weight_decay,
        adam_beta2=0.95,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": options.final_rate},
        max_grad_norm=1.0,
        bf16=mixed,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        # An expert that no token of a process chose has no gradient there.
        ddp_find_unused_parameters=True,
        use_cpu=device == "cpu",
        seed=seed,
        save_strategy="steps" if saves else "no",
        save_steps=options.save_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        eval_strategy="steps" if measures else "no",
        eval_steps=options.eval_steps,
        eval_on_start=measures and starts,
        prediction_loss_only=True,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        report_to=options.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device != "cpu",
        average_tokens_across_devices=True,
    )
    # Without a launcher several GPUs would be used by nn.DataParallel, which no one wants today.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    arguments.max_steps = steps_of(text, options, arguments.world_size)
    arguments.warmup_steps = round(options.warmup * arguments.max_steps)
    return arguments
