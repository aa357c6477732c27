"""The model card that every written checkpoint carries."""

from collections import Counter
from textwrap import fill

from moefuse.sizes import Plan

CARD = """\
---
base_model: {teacher}
library_name: transformers
tags: [moe, moefuse, compression]
---
# {name}

{made} The router is the original's.

| | original | this model |
|---|---|---|
| parameters | {teacher_parameters:.3f} M | {parameters:.3f} M |
| bytes | {teacher_bytes:.2f} MB | {bytes:.2f} MB |
| relative error of the routed output, mean over layers | 0 | {error} |

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

`trust_remote_code` is needed because the fused layer's code, `modeling_moefuse.py`, lies in this
directory; it imports nothing but torch and transformers. With moefuse installed,
`moefuse.load("{name}")` needs no such consent, because it runs moefuse's own copy of that code.

## Limits

Distilled layer by layer against the original on calibration text, not healed end to end. What it
lost is for you to measure on your own task: `moefuse eval {name} --teacher ... --data ...`. The
original's licence and limits apply.
"""


def model_card(name: str, teacher: str, plan: Plan, experts: int, errors: list[float]) -> str:
    """Return the card's text; ``errors`` are the layers' relative errors, empty when unknown."""
    return CARD.format(
        name=name,
        teacher=teacher,
        made=fill(_made(teacher, plan, experts), 100, break_on_hyphens=False),
        parameters=plan.parameters / 1e6,
        bytes=plan.bytes / 1e6,
        teacher_parameters=plan.teacher_parameters / 1e6,
        teacher_bytes=plan.teacher_bytes / 1e6,
        error=f"{sum(errors) / len(errors):.3f}" if errors else "not measured",
    )


def _made(teacher: str, plan: Plan, experts: int) -> str:
    """Say in one sentence what became of the routed experts."""
    layers = list(plan.layers.values())
    start = f"{teacher} with the {experts} routed experts of each layer"
    if layers[0].neurons is None:
        return (
            f"{start} fused into {layers[0].groups} shared base experts plus one delta of rank "
            f"{layers[0].rank} per original expert, by moefuse."
        )
    own = Counter[str]()
    for layer in layers:
        own.update(layer.neurons)
    bits = ", ".join(f"{own[width]:,} at {width}" for width in sorted(own, key=float))
    shared = max(layer.shared for layer in layers)
    less = f" and at most {shared:,} a layer that its experts share" if shared else ""
    return (
        f"{start} reduced by moefuse to {own.total():,} neurons of their own (by bits of a "
        f"number: {bits}){less}."
    )
