"""One of several processes that heal together on CPUs, started by torch.distributed.run.

``several.py heal ...`` is the command line. ``several.py shard STUDENT TEACHER TEXT OUT`` shards a
student by FSDP 2 over the processes and trains it by the trainer's own loss; the first process
leaves in OUT the losses and the whole state. Alone it trains the same batches unsharded.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

STEPS, ROWS = 4, 4


def main() -> None:
    """Do what the arguments say."""
    torch.set_num_threads(1)
    if sys.argv[1] == "shard":
        shard(*map(Path, sys.argv[2:]))
        return
    from moefuse.cli import main as command

    command()


def shard(student: Path, teacher: Path, text: Path, out: Path) -> None:
    """Train as FSDP does it; losses and gradients are means over processes."""
    import torch.distributed as dist
    from accelerate import PartialState
    from safetensors.torch import save_file
    from transformers import TrainingArguments

    from moefuse.config import HealConfig
    from moefuse.corpus import load_documents
    from moefuse.evaluation.loading import load_model
    from moefuse.families import all_families
    from moefuse.healing.parts import parameter_groups
    from moefuse.healing.sources import LiveTeacher
    from moefuse.healing.text import PackedRows, pack
    from moefuse.healing.trainer import HealingTrainer, collate, whole_state

    arguments = TrainingArguments(output_dir=str(out), use_cpu=True, report_to="none")
    process = PartialState()
    family = all_families()["deepseek_v2"]
    options = HealConfig(hidden=0.1, cross_entropy=0.1)
    model, tokenizer = load_model(student, dtype="float32")
    source = LiveTeacher(load_model(teacher, dtype="float32")[0], family)
    data: Any = PackedRows(pack(load_documents(text), tokenizer, 32, tokens=2000, seed=0))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    trainer = HealingTrainer(
        family=family, options=options, source=source, model=model, args=arguments
    )
    if process.num_processes > 1:
        _shard(model, process.num_processes)
    optimizer = torch.optim.AdamW(list(parameter_groups(model, family, options)))
    losses = []
    for step in range(STEPS):
        rows = [data[step * ROWS + row] for row in range(ROWS)]
        items = (collate(rows)["labels"] >= 0).sum()
        own = collate(rows[process.process_index :: process.num_processes])
        loss = trainer.compute_loss(model, own, num_items_in_batch=items)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / process.num_processes
        if process.num_processes > 1:
            dist.all_reduce(mean)
        losses.append(float(mean))
    state = whole_state(model)
    if process.is_main_process:
        out.mkdir(exist_ok=True)
        save_file({n: t.contiguous() for n, t in state.items()}, out / "state.safetensors")
        (out / "losses.json").write_text(json.dumps(losses))


def _shard(model: Any, processes: int) -> None:
    """Shard as accelerate does, layer by layer, over CPUs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from moefuse.healing.trainer import use_every_base
    from moefuse.modeling import FusedExperts

    mesh = init_device_mesh("cpu", (processes,))
    for module in model.modules():
        if isinstance(module, FusedExperts):
            module.register_forward_hook(use_every_base)
    for part in (*model.base_model.layers, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


if __name__ == "__main__":
    main()
