"""What is asked of ExLlamaV3, ExLlamaV2 and Transformers alike, each imported only where it runs.

Both engines build their CUDA code when they are first imported, which takes minutes.
"""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

DEVICE = "cuda:0"
ROOM = 4096
"""Tokens that a cache has room for."""


class Engine(Protocol):
    """A loaded checkpoint."""

    version: str

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, as the engine's own tokenizer has it."""
        ...

    def logits(self, ids: list[int]) -> Tensor:
        """Return the logits after every token, (T, V) fp32 on the CPU, read in one pass."""
        ...

    def greedy(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Return ``new`` tokens after each prompt, the likeliest, decoded one after another."""
        ...


class ExLlamaV3:
    """ExLlamaV3 with a cache in fp16; its generator decodes several prompts together."""

    def __init__(self, path: Path) -> None:
        engine = import_module("exllamav3")
        self.engine, self.version = engine, version("exllamav3")
        self.config = engine.Config.from_directory(str(path))
        self.model = engine.Model.from_config(self.config)
        self.cache = engine.Cache(self.model, max_num_tokens=ROOM)
        self.model.load(DEVICE)
        self.tokenizer = engine.Tokenizer.from_config(self.config)

    def encode(self, text: str) -> list[int]:
        """See ``Engine``."""
        ids = self.tokenizer.encode(text, add_bos=False, encode_special_tokens=True)
        return ids[0].tolist()

    def logits(self, ids: list[int]) -> Tensor:
        """See ``Engine``."""
        found = self.model.forward(torch.tensor([ids]), {"attn_mode": "flash_attn_nc"})
        return found[0, :, : self.config.vocab_size].float().cpu()

    def greedy(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """See ``Engine``."""
        generator = self.engine.Generator(self.model, self.cache, self.tokenizer)
        for number, ids in enumerate(prompts):
            job = self.engine.Job(
                torch.tensor([ids]),
                max_new_tokens=new,
                sampler=self.engine.ArgmaxSampler(),
                stop_conditions=[],
                identifier=number,
            )
            generator.enqueue(job)
        made: list[list[int]] = [[] for _ in prompts]
        while generator.num_remaining_jobs():
            for result in generator.iterate():
                if "token_ids" in result:
                    made[result["identifier"]] += result["token_ids"].flatten().tolist()
        return made


class ExLlamaV2:
    """ExLlamaV2 with a cache in fp16, one sequence at a time: paging needs flash-attn."""

    def __init__(self, path: Path) -> None:
        engine = import_module("exllamav2")
        self.engine, self.version = engine, version("exllamav2")
        config = engine.ExLlamaV2Config(str(path))
        # Through PyTorch's own attention 0.3.2 lets a prompt's tokens see those after them.
        config.no_sdpa = True
        self.model = engine.ExLlamaV2(config)
        self.cache = engine.ExLlamaV2Cache(self.model, max_seq_len=config.max_seq_len, lazy=True)
        self.model.load_autosplit(self.cache)
        self.tokenizer = engine.ExLlamaV2Tokenizer(config)

    def encode(self, text: str) -> list[int]:
        """See ``Engine``."""
        return self.tokenizer.encode(text, encode_special_tokens=True)[0].tolist()

    def logits(self, ids: list[int]) -> Tensor:
        """See ``Engine``."""
        return self.after(ids, 0)

    def after(self, ids: list[int], past: int) -> Tensor:
        """Return the logits after ``ids``, (T, V), which come after ``past`` tokens."""
        self.cache.current_seq_len = past
        found = self.model.forward(torch.tensor([ids]), self.cache)
        return found[0, :, : self.model.config.vocab_size].float().cpu()

    def greedy(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """See ``Engine``."""
        made: list[list[int]] = []
        for ids in prompts:
            tokens = [int(self.after(ids, 0)[-1].argmax())]
            while len(tokens) < new:
                past = len(ids) + len(tokens) - 1
                tokens.append(int(self.after(tokens[-1:], past)[-1].argmax()))
            made.append(tokens)
        return made


@torch.no_grad()
def transformers_logits(path: Path, sequences: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
    """Return what Transformers makes of sequences, each (T, V) fp32 on the CPU."""
    torch.backends.cudnn.allow_tf32 = False
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    model = model.to(DEVICE).eval()
    given = (torch.tensor([ids], device=DEVICE) for ids in sequences)
    return [model(ids, use_cache=False).logits[0].float().cpu() for ids in given]


ENGINES: dict[str, type[ExLlamaV2] | type[ExLlamaV3]] = {
    "ExLlamaV3": ExLlamaV3,
    "ExLlamaV2": ExLlamaV2,
}
