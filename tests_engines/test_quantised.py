"""Students of ``moefuse quantize`` in vLLM: the tokens of their bases unpacked in Transformers.

Their deltas have 8 bits a number, where the name does not end with others.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Engine, check
from safetensors.torch import load_file
from served import Expected, Student, greedy_of, prompts_for
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moefuse.artifacts import read_json
from moefuse.modeling import register_fused

PLAIN = "bundled-4"
INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
LARGEST = {INT8: 127.0, FLOAT8: 448.0}


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_4", "gptq", "w8a16"])
def test_packed_bases_give_the_tokens_of_transformers(
    scheme: str, plugin: Engine, student: Student, expected: Expected
) -> None:
    name = f"{PLAIN}-{scheme}"
    path = student(name)

    check(plugin.generate(path, prompts_for(path), enforce_eager=True), expected(name))


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_rounded_inputs_give_the_tokens_of_transformers(
    scheme: str, plugin: Engine, student: Student
) -> None:
    path = student(f"{PLAIN}-{scheme}")
    prompts = prompts_for(path)

    made = plugin.generate(path, prompts, enforce_eager=True)

    check(made, greedy_of(unpacked(path), prompts))


def unpacked(quantised: Path) -> Any:
    """Return the student in fp32 with the bases that its codes stand for, and inputs rounded as
    engines do it; deltas stay as they are stored."""
    register_fused(read_json(quantised / "config.json"))
    config = AutoConfig.from_pretrained(quantised)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stored = {n: t for file in quantised.glob("*.safetensors") for n, t in load_file(file).items()}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and f"{name}.weight_scale" in stored:
            codes_OI = stored[f"{name}.weight"]
            stored[f"{name}.weight"] = codes_OI.float() * stored.pop(f"{name}.weight_scale").float()
            linear.register_forward_pre_hook(partial(round_inputs, codes_OI.dtype))
    model.load_state_dict(stored)
    return model.eval()


def round_inputs(kind: torch.dtype, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Round every row to ``kind``, its largest number to the largest there is."""
    (x_PI,) = inputs
    scale_P1 = x_PI.abs().amax(-1, keepdim=True) / LARGEST[kind]
    codes_PI = x_PI / scale_P1.clamp(min=1e-12)
    return ((codes_PI.round() if kind is INT8 else codes_PI.to(kind).float()) * scale_P1,)
