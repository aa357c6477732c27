"""What the logits feel: how much an error of each MoE layer's output changes the predictions.

To second order the divergence that an error ``d`` of a layer's output causes is ``1/2 d^T F d``
with the Fisher information ``F = E[g g^T]``, g being the gradient of ``-log p(token)`` for tokens
drawn from the model's own predictions (Amari, 1998). One D x D matrix a layer is kept: it makes
errors of different layers comparable, and tells which directions of one layer matter.

The teacher is streamed forward, keeping what enters every layer, and then backward, one layer in
memory at a time. Every layer leaves directories that appear whole, so that an interrupted run goes
on where it was.

Shape suffixes: B sequences, S positions, D hidden width, V words.
"""

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefuse import artifacts
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.console import track

Batch = tuple[Tensor, Tensor]


def metric_path(directory: Path, layer: int) -> Path:
    """Return the file of one layer's ``fisher_DD``, (D, D) fp32, a mean over tokens."""
    return directory / f"layer-{layer:03d}.safetensors"


def measure_sensitivity(
    teacher: StreamedTeacher, batches: list[Batch], directory: Path, *, seed: int
) -> None:
    """Leave every MoE layer's Fisher information in ``directory`` (see ``metric_path``).

    ``batches`` are token ids and attention masks, (B, S) int64 each; ``seed`` draws the tokens.
    """
    layers, moe_layers = len(teacher.layers), teacher.reader.shape.layers
    if all(metric_path(directory, layer).exists() for layer in moe_layers):
        return
    artifacts.remove_leftovers(directory)
    _forward(teacher, batches, directory)
    if not any(_gradient(directory, n).is_dir() for n in range(1, layers + 1)):
        _begin_backward(teacher, batches, directory, seed)
    first = min(moe_layers)
    for layer in reversed(range(first, layers)):
        if _gradient(directory, layer + 1).is_dir():
            _backward_layer(teacher, batches, directory, layer)
    shutil.rmtree(_gradient(directory, first))
    for layer in range(layers + 1):
        shutil.rmtree(_hidden(directory, layer), ignore_errors=True)


def _hidden(directory: Path, layer: int) -> Path:
    return directory / f"hidden-{layer:03d}"


def _gradient(directory: Path, layer: int) -> Path:
    return directory / f"gradient-{layer:03d}"


def _batch_file(number: int) -> str:
    return f"batch-{number:05d}.safetensors"


def _read(place: Path, number: int) -> Tensor:
    return artifacts.read_tensors(place / _batch_file(number))["hidden"]


def _write_all(place: Path, tensors: Iterator[Tensor]) -> None:
    partial = artifacts.partial_directory(place)
    for number, tensor in enumerate(tensors):
        artifacts.write_tensors(partial / _batch_file(number), {"hidden": tensor})
    artifacts.finish_directory(partial, place)


def _forward(teacher: StreamedTeacher, batches: list[Batch], directory: Path) -> None:
    """Keep what enters every layer, and what leaves the last one."""
    layers = len(teacher.layers)
    if any(_gradient(directory, n).is_dir() for n in range(1, layers + 1)):
        return
    if not _hidden(directory, 0).is_dir():
        _write_all(_hidden(directory, 0), (teacher.embed(*batch)[0] for batch in batches))
    for layer in track(range(layers), "Sensitivity, forward"):
        if not _hidden(directory, layer + 1).is_dir():
            with teacher.loaded(layer) as module:
                entering = (_read(_hidden(directory, layer), n) for n in range(len(batches)))
                leaving = (
                    teacher.forward_layer(module, hidden, teacher.embed(*batch)[1][layer])
                    for hidden, batch in zip(entering, batches, strict=True)
                )
                _write_all(_hidden(directory, layer + 1), leaving)


def _begin_backward(
    teacher: StreamedTeacher, batches: list[Batch], directory: Path, seed: int
) -> None:
    """Draw tokens from the predictions and keep the gradients at what leaves the last layer."""
    generator = torch.Generator().manual_seed(seed)
    last = len(teacher.layers)
    with teacher.head() as head:
        gradients = (
            _head_gradient(head, _read(_hidden(directory, last), number), mask_BS, generator)
            for number, (_, mask_BS) in enumerate(batches)
        )
        _write_all(_gradient(directory, last), gradients)


def _head_gradient(
    head: nn.Module, hidden_BSD: Tensor, mask_BS: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the gradient of drawn tokens' summed losses, (B, S, D); padding has none."""
    device = next(head.parameters()).device
    hidden_BSD = hidden_BSD.to(device).requires_grad_()
    with torch.enable_grad():
        logits_NV = head(hidden_BSD).float().flatten(0, 1)
        drawn_N = torch.multinomial(logits_NV.detach().softmax(-1).cpu(), 1, generator=generator)
        loss_N = nn.functional.cross_entropy(
            logits_NV, drawn_N.flatten().to(device), reduction="none"
        )
        (loss_N * mask_BS.flatten().to(device)).sum().backward()
    assert hidden_BSD.grad is not None
    return hidden_BSD.grad


def _backward_layer(
    teacher: StreamedTeacher, batches: list[Batch], directory: Path, layer: int
) -> None:
    """Pass the gradients back through one layer, noting those at its routed experts' output."""
    hidden = teacher.config.hidden_size
    fisher_DD = torch.zeros(hidden, hidden, dtype=torch.float64)

    def gradients(module: nn.Module) -> Iterator[Tensor]:
        for number, batch in enumerate(track(batches, f"Sensitivity of layer {layer}")):
            entering_BSD = _read(_hidden(directory, layer), number)
            leaving_BSD = _read(_gradient(directory, layer + 1), number)
            received = teacher.embed(*batch)[1][layer]
            passed_BSD, at_experts_TD = _gradients(
                teacher, module, layer, entering_BSD, leaving_BSD, received
            )
            if at_experts_TD is not None:
                fisher_DD.add_(at_experts_TD.T @ at_experts_TD)
            yield passed_BSD

    with teacher.loaded(layer) as module:
        module.requires_grad_(False)
        _write_all(_gradient(directory, layer), gradients(module))
    if layer in teacher.reader.shape.layers:
        tokens = sum(int(mask_BS.sum()) for _, mask_BS in batches)
        mean_DD = (fisher_DD / tokens).float()
        artifacts.write_tensors(metric_path(directory, layer), {"fisher_DD": mean_DD})
    shutil.rmtree(_gradient(directory, layer + 1))


def _gradients(
    teacher: StreamedTeacher,
    module: nn.Module,
    layer: int,
    entering_BSD: Tensor,
    leaving_BSD: Tensor,
    received: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients at a layer's input, (B, S, D), and at its experts' output, (T, D) fp64.

    The latter is None for a layer without routed experts.
    """
    heard: list[Tensor] = []
    entering_BSD = entering_BSD.to(teacher.device).requires_grad_()
    hears = layer in teacher.reader.shape.layers
    listening = teacher.listening(module, lambda *call: heard.append(call[3]))
    with torch.enable_grad(), listening if hears else nullcontext():
        output = module(entering_BSD, **received)
        output_BSD = output[0] if isinstance(output, tuple) else output
        for routed in heard:
            routed.retain_grad()
        output_BSD.backward(leaving_BSD.to(teacher.device))
    assert entering_BSD.grad is not None
    if not heard:
        return entering_BSD.grad, None
    assert heard[0].grad is not None
    return entering_BSD.grad, heard[0].grad.reshape(-1, entering_BSD.shape[-1]).double().cpu()
