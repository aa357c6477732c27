"""The plugin by which vLLM serves fused checkpoints: ``vllm serve OUT``, with no further flag.

vLLM calls ``register`` in each of its processes (entry point ``vllm.general_plugins``). Fused
models then run moefuse's own installed modelling file, never the code that lies in the checkpoint.
"""

from moefuse.export.vllm_plugin.register import register, register_with_aphrodite

__all__ = ["register", "register_with_aphrodite"]
