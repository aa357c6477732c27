"""Families with routed experts that moefuse cannot fuse, by ``model_type``, each with the reason.

A reason continues the sentence "... is not supported: ...". docs/families.md lists the same.
"""

REASONS = {
    "llama4": (
        "its experts weigh what they receive, before the activation, and not what they return, so "
        "they do not follow the experts interface of Transformers"
    ),
    "llama4_text": (
        "its experts weigh what they receive, before the activation, and not what they return, so "
        "they do not follow the experts interface of Transformers"
    ),
    "qwen3_5_moe": (
        "it reads images besides text; its text model alone, as Transformers'"
        " Qwen3_5MoeForCausalLM loads and saves it (qwen3_5_moe_text), is supported"
    ),
}
