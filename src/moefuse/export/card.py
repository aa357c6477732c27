"""The model card that every written checkpoint carries."""

from moefuse.sizes import Plan

CARD = """\
---
base_model: {teacher}
library_name: transformers
tags: [moe, moefuse, compression]
---
# {name}

{teacher} with the {experts} routed experts of each layer fused into {groups} shared base experts
plus one delta of rank {rank} per original expert, by moefuse. The router is the original's.

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
    layer = next(iter(plan.layers.values()))
    return CARD.format(
        name=name,
        teacher=teacher,
        experts=experts,
        groups=layer.groups,
        rank=layer.rank,
        parameters=plan.parameters / 1e6,
        bytes=plan.bytes / 1e6,
        teacher_parameters=plan.teacher_parameters / 1e6,
        teacher_bytes=plan.teacher_bytes / 1e6,
        error=f"{sum(errors) / len(errors):.3f}" if errors else "not measured",
    )
