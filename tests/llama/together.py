"""Several sequences in one context of llama.cpp, decoded together."""

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import torch
from torch import Tensor

NO_FLASH = 0


class Together:
    """A file loaded for ``count`` sequences of up to ``length`` tokens.

    Caches are in f32 with ``exact``, else as the engine has them by default.
    """

    def __init__(
        self, path: Path, count: int, length: int, *, threads: int = 1, exact: bool = True
    ) -> None:
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        told = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), told)
        assert self.model, path
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = count * length, count
        options.n_batch = options.n_ubatch = min(count * length, 512)
        options.n_threads = options.n_threads_batch = threads
        if exact:
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
            options.flash_attn_type = NO_FLASH
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        assert self.context, path
        self.batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.used = [0] * count

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, *error: object) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def forget(self) -> None:
        """Begin all sequences anew."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.used = [0] * len(self.used)

    def feed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to every sequence, in one batch; return the last one's logits of each.

        These are (sequences, V) in fp32.
        """
        last, place = [], 0
        for sequence, tokens in enumerate(ids):
            for token in tokens:
                self.batch.token[place] = token
                self.batch.pos[place] = self.used[sequence]
                self.batch.n_seq_id[place] = 1
                self.batch.seq_id[place][0] = sequence
                self.batch.logits[place] = False
                self.used[sequence] += 1
                place += 1
            self.batch.logits[place - 1] = True
            last.append(place - 1)
        self.batch.n_tokens = place
        assert llama_cpp.llama_decode(self.context, self.batch) == 0
        return torch.stack([self._logits(place) for place in last])

    def _logits(self, place: int) -> Tensor:
        pointer = llama_cpp.llama_get_logits_ith(self.context, place)
        row = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self.vocabulary)).contents
        return torch.frombuffer(row, dtype=torch.float32).clone()

    def greedy(self, ids: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Return the likeliest tokens after each sequence, chosen one after another."""
        made: list[list[int]] = [[] for _ in ids]
        fed: Sequence[Sequence[int]] = ids
        for _ in range(new):
            chosen = self.feed(fed).argmax(-1).tolist()
            for tokens, token in zip(made, chosen, strict=True):
                tokens.append(token)
            fed = [[token] for token in chosen]
        return made
