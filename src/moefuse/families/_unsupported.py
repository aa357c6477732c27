"""Families with routed experts that moefuse cannot fuse, by ``model_type``, each with the reason.

A reason continues the sentence "... is not supported: ...". docs/families.md lists the same.
"""

REASONS = {
    "gpt_oss": (
        "its experts are transposed and interleaved and have biases and a gated activation of "
        "their own, which a fused expert does not have"
    ),
    "granitemoe": (
        "its published checkpoints stack a layer's experts in one tensor, and its embeddings and "
        "logits are scaled outside the modules that moefuse streams"
    ),
    "llama4": (
        "its experts weigh what they receive, before the activation, and not what they return, so "
        "they do not follow the experts interface of Transformers"
    ),
    "llama4_text": (
        "its experts weigh what they receive, before the activation, and not what they return, so "
        "they do not follow the experts interface of Transformers"
    ),
    "minimax": (
        "its linear attention keeps a state in a cache of its own, which packed text for healing "
        "and counts of memory do not know"
    ),
    "phimoe": (
        "its router draws experts at random while it trains and gives weights to two experts "
        "only, which healing and the rivals would get wrong"
    ),
    "qwen3_5_moe": (
        "it reads images besides text, and its linear attention keeps a state from token to token, "
        "which packed text for healing and counts of memory do not know"
    ),
    "qwen3_5_moe_text": (
        "its linear attention keeps a state from token to token, which packed text for healing and "
        "counts of memory do not know"
    ),
}
