"""What the logits feel: how much an error of each MoE layer's output changes the predictions.

To second order the divergence that an error ``d`` of a layer's output causes is ``1/2 d^T F d``
with the Fisher information ``F = E[g g^T]``, g being the gradient of ``-log p(token)`` for tokens
drawn from the model's own predictions (Amari, 1998). One D x D matrix a layer is kept: it makes
errors of different layers comparable, and tells which directions of one layer matter.

The teacher is streamed forward, keeping what enters every layer, and then backward, one layer in
memory at a time. Files and directories appear whole, so that an interrupted run goes on where it
was.

Shape suffixes: B sequences, S positions, T = B * S, N tokens of the text among them, D hidden
width, V words.
"""

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefuse import artifacts
from moefuse.checkpoint.passing import batch_file
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.console import track
from moefuse.errors import UserError

HEAD_TOKENS = 256
"""Tokens whose logits are in memory at a time; one token's may take a megabyte."""

Batch = tuple[Tensor, Tensor]


def metric_path(directory: Path, layer: int) -> Path:
    """Return the file of one layer's ``fisher_DD``, (D, D) fp32, a mean over tokens."""
    return directory / f"layer-{layer:03d}.safetensors"


def measure_sensitivity(
    teacher: StreamedTeacher, batches: list[Batch], directory: Path, *, seed: int
) -> None:
    """Leave every MoE layer's Fisher information in ``directory`` (see ``metric_path``).

    ``batches`` are token ids and attention masks, (B, S) int64 each; ``seed`` draws the tokens.
    What an interrupted run left is not computed again. Raises ``UserError`` where the teacher's
    predictions or gradients are not finite in its working dtype.
    """
    moe_layers = teacher.reader.shape.layers
    artifacts.remove_leftovers(directory)
    if not all(metric_path(directory, layer).exists() for layer in moe_layers):
        reached = _reached(teacher, directory)
        if reached is None:
            _forward(teacher, batches, directory)
            _begin_backward(teacher, batches, directory, seed)
            reached = len(teacher.layers)
        for layer in reversed(range(min(moe_layers), reached)):
            _backward_layer(teacher, batches, directory, layer)
    for passed in (*directory.glob("hidden-*"), *directory.glob("gradient-*")):
        shutil.rmtree(passed)


def _reached(teacher: StreamedTeacher, directory: Path) -> int | None:
    """Find the layer whose input's gradients were left last; None before the way back began.

    Gradients above it may be there in part: an interruption may have come while they were removed.
    """
    layers = range(len(teacher.layers) + 1)
    return next((layer for layer in layers if _gradient(directory, layer).is_dir()), None)


def _hidden(directory: Path, layer: int) -> Path:
    return directory / f"hidden-{layer:03d}"


def _gradient(directory: Path, layer: int) -> Path:
    return directory / f"gradient-{layer:03d}"


def _read(place: Path, number: int) -> Tensor:
    return artifacts.read_tensors(place / batch_file(number))["hidden"]


def _write(place: Path, number: int, tensor: Tensor) -> None:
    artifacts.write_tensors(place / batch_file(number), {"hidden": tensor})


def _write_all(place: Path, tensors: Iterator[Tensor]) -> None:
    partial = artifacts.partial_directory(place)
    for number, tensor in enumerate(tensors):
        _write(partial, number, tensor)
    artifacts.finish_directory(partial, place)


def _forward(teacher: StreamedTeacher, batches: list[Batch], directory: Path) -> None:
    """Keep what enters every layer, and what leaves the last one."""
    if not _hidden(directory, 0).is_dir():
        _write_all(_hidden(directory, 0), (teacher.embed(*batch)[0] for batch in batches))
    for layer in track(range(len(teacher.layers)), "Sensitivity, forward"):
        if not _hidden(directory, layer + 1).is_dir():
            with teacher.loaded(layer) as module:
                entering = (_read(_hidden(directory, layer), n) for n in range(len(batches)))
                leaving = (
                    teacher.forward_layer(module, hidden_BSD, teacher.embed(*batch)[1][layer])
                    for hidden_BSD, batch in zip(entering, batches, strict=True)
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
            _head_gradient(
                head, _read(_hidden(directory, last), number).to(teacher.device), mask_BS, generator
            )
            for number, (_, mask_BS) in enumerate(batches)
        )
        _write_all(_gradient(directory, last), gradients)


def _head_gradient(
    head: nn.Module, hidden_BSD: Tensor, mask_BS: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the gradient of drawn tokens' summed losses, (B, S, D); padding draws none."""
    kept_BS = mask_BS.bool().to(hidden_BSD.device)
    parts = hidden_BSD[kept_BS].split(HEAD_TOKENS)
    gradient_BSD = torch.zeros_like(hidden_BSD)
    gradient_BSD[kept_BS] = torch.cat([_drawn_gradient(head, part, generator) for part in parts])
    return gradient_BSD


def _drawn_gradient(head: nn.Module, hidden_ND: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient of one drawn token's loss after each of N tokens, (N, D)."""
    hidden_ND.requires_grad_()
    with torch.enable_grad():
        logits_NV = head(hidden_ND).float()
        _check_finite(logits_NV, "predictions", hidden_ND.dtype)
        predicted_NV = logits_NV.detach().softmax(-1).cpu()
        drawn_N = torch.multinomial(predicted_NV, 1, generator=generator).flatten()
        loss = nn.functional.cross_entropy(logits_NV, drawn_N.to(logits_NV.device), reduction="sum")
    return torch.autograd.grad(loss, hidden_ND)[0]


def _backward_layer(
    teacher: StreamedTeacher, batches: list[Batch], directory: Path, layer: int
) -> None:
    """Pass the gradients back through one layer, noting those at its routed experts' output."""
    hidden = teacher.config.hidden_size
    fisher_DD = torch.zeros(hidden, hidden, dtype=torch.float64)
    partial = artifacts.partial_directory(_gradient(directory, layer))
    with teacher.loaded(layer, following=layer - 1) as module:
        for number, batch in enumerate(track(batches, f"Sensitivity of layer {layer}")):
            passed_BSD, at_experts_TD = _gradients(
                teacher,
                module,
                layer,
                _read(_hidden(directory, layer), number),
                _read(_gradient(directory, layer + 1), number),
                teacher.embed(*batch)[1][layer],
            )
            _check_finite(passed_BSD, f"gradients at layer {layer}", teacher.dtype)
            _write(partial, number, passed_BSD)
            if at_experts_TD is not None:
                fisher_DD.add_(at_experts_TD.T @ at_experts_TD)
    if layer in teacher.reader.shape.layers:
        tokens = sum(int(mask_BS.sum()) for _, mask_BS in batches)
        mean_DD = (fisher_DD / tokens).float()
        artifacts.write_tensors(metric_path(directory, layer), {"fisher_DD": mean_DD})
    # After the metric: a run that goes on takes the layer for done once its gradients are there.
    artifacts.finish_directory(partial, _gradient(directory, layer))
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

    ``leaving_BSD`` holds those at the layer's output. The latter is None for a layer without routed
    experts.
    """
    heard: list[Tensor] = []
    entering_BSD = entering_BSD.to(teacher.device).requires_grad_()
    hears = layer in teacher.reader.shape.layers
    listening = teacher.listening(module, lambda *call: heard.append(call[3]))
    with torch.enable_grad(), listening if hears else nullcontext():
        output = module(entering_BSD, **received)
    output_BSD = output[0] if isinstance(output, tuple) else output
    passed_BSD, *at_experts = torch.autograd.grad(
        output_BSD, [entering_BSD, *heard], leaving_BSD.to(teacher.device)
    )
    if not at_experts:
        return passed_BSD, None
    return passed_BSD, at_experts[0].reshape(-1, entering_BSD.shape[-1]).double().cpu()


def _check_finite(tensor: Tensor, what: str, dtype: torch.dtype) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"The teacher's {what} hold NaN or infinity in {str(dtype).removeprefix('torch.')}; "
            "choose another --dtype, such as float32, or --sensitivity-tokens 0."
        )
