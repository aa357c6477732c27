"""The ``README.md`` of a quantised student."""

from textwrap import fill
from typing import TYPE_CHECKING, Any

from moefuse.export.plain_card import base_of, front_matter, size

if TYPE_CHECKING:
    from moefuse.export.student_reader import StudentReader

NEEDS = {"nf4": "bitsandbytes", "int4-torchao": "torchao", "hqq4": "torchao"}
LOADING = """\
## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

It needs `transformers` and `{package}`; moefuse itself is not needed."""
NAMES = {
    "bases": "the shared bases of its experts",
    "shared": "shared experts",
    "attention": "attention",
    "dense": "the feed-forward part of layers without experts",
}


def quantized_card(name: str, reader: "StudentReader", what: str, result: dict[str, Any]) -> str:
    """Return the card's text; ``result`` are the fields of a ``QuantizeResult``."""
    base = base_of(reader)
    rounded = ", ".join(NAMES[part.strip()] for part in what.split(","))
    lines = [
        f"The fused student {reader.directory.name} of {base.name}, quantised by the scheme "
        f"{result['scheme']}: {rounded}. Router, norms, embeddings and head are as they "
        f"were. It takes {size(result['bytes'])}, the student {size(result['student_bytes'])}.",
        f"A number of the routed experts takes {result['bits']:.2f} bits on average, deltas and "
        f"scales included; a number that was rounded takes {result['base_bits']:.2f}, scales "
        "included.",
    ]
    if result["refitted"]:
        lines.append(
            "Every layer then learnt on text to return what it returned before: deltas, scales and "
            "biases, and where the scheme leaves it open which way numbers are rounded."
        )
    if result["seen"] is not None:
        seen = result["seen"]
        lines.append(
            f"Errors were weighed on calibration text, of which a base saw "
            f"{seen['base_median']:.0f} tokens (median; the least {seen['base_least']}), where one "
            f"expert alone would have seen {seen['expert_median']:.0f} (the least "
            f"{seen['expert_least']})."
        )
    package = NEEDS.get(result["scheme"], "compressed-tensors")
    loading = LOADING.format(name=name, package=package)
    told = [fill(line, 100) for line in lines]
    return "\n\n".join([front_matter(base), f"# {name}", *told, loading]) + "\n"
