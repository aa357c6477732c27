"""A plain checkpoint's tensors under llama.cpp's names and in its layout, one layer at a time.

Shape suffixes: E experts, F neurons of one, D hidden width, H heads, L latent width, N and V widths
of a head's unpositioned key and of its value, P width of a head.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefuse.checkpoint.reader import CheckpointReader
from moefuse.families._gguf import Gguf

Shape = tuple[int, ...]
EXPERT_PARTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
CORRECTION = re.compile(r"e_score_correction_bias$")
ENDS = (".weight", ".bias")


@dataclass(frozen=True)
class Piece:
    """One tensor of the file: its name, its shape as torch has it, and what makes it.

    ``own`` says that it is one expert's beside bases that are shared: a small part, which is not
    quantised. ``kind`` is how it is stored whatever the rest is stored as.
    """

    name: str
    shape: Shape
    make: Callable[[], Tensor]
    own: bool = False
    kind: str | None = None


@dataclass(frozen=True)
class Layout:
    """Which tensors the file of one checkpoint has.

    ``rename`` gives the engine's name of a published one (without its end), ``settings`` is the
    configuration with all defaults.
    """

    reader: CheckpointReader
    form: Gguf
    settings: dict[str, Any]
    rename: Callable[[str], str | None]

    @property
    def keys(self) -> dict[str, int]:
        """What the file says beside what every model does."""
        return {}

    def pieces(self) -> Iterator[Piece]:
        """Yield what the file holds, in order; a piece's numbers are read when it is made."""
        family, reader = self.reader.family, self.reader
        for name in reader.outside_names():
            if not (self.settings.get("tie_word_embeddings") and name.startswith("lm_head.")):
                yield from self._plain(name)
        for layer in range(family.layer_count(reader.config)):
            routed = self._routed(layer)
            prefix = family.layer_prefix(layer)
            for name in reader.tensors:
                if name.startswith(prefix) and not name.startswith(routed):
                    yield from self._plain(name)
            if layer in reader.shape.layers:
                yield from self._experts(layer)

    def _routed(self, layer: int) -> str:
        """Return what the names of a layer's routed experts start with."""
        return self.reader.family.experts_prefix(layer)

    def _plain(self, name: str) -> Iterator[Piece]:
        tensor = self.reader.tensors[name]
        if self.form.splits_latent and name.endswith("kv_b_proj.weight"):
            yield from self._latent(name)
        elif self.form.turns_neighbours and re.search(r"self_attn\.[qk]_proj\.", name):
            heads = self._heads(name)
            make = lambda: neighbours(self.reader.read(name), heads)  # noqa: E731
            yield Piece(self._named(name), tensor.shape, make)
        else:
            yield Piece(self._named(name), tensor.shape, lambda: self.reader.read(name))

    def _named(self, name: str) -> str:
        """Return the engine's name of a published one; every tensor must have one."""
        end = next((end for end in ENDS if name.endswith(end)), "")
        stem = name.removesuffix(end)
        if CORRECTION.search(name):
            stem, end = CORRECTION.sub("e_score_correction", name), ".bias"
        found = self.rename(stem)
        assert found is not None, f"llama.cpp has no name for {name}"
        return found + end

    def _heads(self, name: str) -> int:
        key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
        return self.settings[key]

    def _experts(self, layer: int) -> Iterator[Piece]:
        """Yield a layer's experts, stacked: gate and up (E, F, D), down (E, D, F)."""
        family, shape = self.reader.family, self.reader.shape
        names = [family.expert_names(layer, expert) for expert in range(shape.experts)]
        inward = (shape.experts, shape.intermediate, shape.hidden)
        shapes = (inward, inward, (shape.experts, shape.hidden, shape.intermediate))
        for part, field, size in zip(EXPERT_PARTS, ("gate", "up", "down"), shapes, strict=True):
            chosen = [getattr(name, field) for name in names]
            make = lambda chosen=chosen: torch.stack([self.reader.read(n) for n in chosen])  # noqa: E731
            yield Piece(f"blk.{layer}.{part}.weight", size, make)

    def _latent(self, name: str) -> Iterator[Piece]:
        """Yield the latent's projection as keys, transposed (H, L, N), and values (H, V, L)."""
        heads, latent = self.settings["num_attention_heads"], self.settings["kv_lora_rank"]
        key, value = self.settings["qk_nope_head_dim"], self.settings["v_head_dim"]

        def halves() -> tuple[Tensor, Tensor]:
            both_HAL = self.reader.read(name).view(heads, key + value, latent)
            key_HNL, value_HVL = both_HAL.split([key, value], dim=1)
            return key_HNL.mT, value_HVL

        stem = self._named(name).removesuffix("attn_kv_b.weight")
        yield Piece(f"{stem}attn_k_b.weight", (heads, latent, key), lambda: halves()[0])
        yield Piece(f"{stem}attn_v_b.weight", (heads, value, latent), lambda: halves()[1])


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Sort the rows of a query or key so that what is turned together are neighbours.

    ``weight`` (H * P, ...): row i and row i + P / 2 of a head become rows 2 i and 2 i + 1.
    """
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)
