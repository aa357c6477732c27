"""The ``README.md`` of a quantised student."""

from textwrap import fill
from typing import TYPE_CHECKING

from moefuse.export.plain_card import base_of, front_matter, size
from moefuse.export.quantized.layers import BASES
from moefuse.export.quantized.libraries import TORCHAO
from moefuse.export.quantized.result import UNUSED, QuantizeResult, deltas_told, learning_told
from moefuse.export.quantized.schemes import CALIBRATED

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


def quantized_card(name: str, reader: "StudentReader", result: QuantizeResult) -> str:
    """Return the card's text."""
    base = base_of(reader)
    parts = [part.strip() for part in result.what.split(",")]
    rounded = ", ".join(NAMES[part] for part in parts)
    lines = [
        f"The fused student {reader.directory.name} of {base.name}, quantised by the scheme "
        f"{result.scheme}: {rounded}. All other layers, among them router, norms, embeddings and "
        f"head, are stored as they were. It takes {size(result.bytes)}, the student "
        f"{size(result.student_bytes)}.",
        f"{_bits_told(result)} {deltas_told(result)}".rstrip(),
        *learning_told(result),
    ]
    if result.tokens:
        lines.append(f"The text has {result.tokens:,} tokens. {_use_told(result, parts)}".rstrip())
    package = NEEDS.get(result.scheme, "compressed-tensors")
    loading = LOADING.format(name=name, package=package)
    told = [fill(line, 100) for line in lines]
    return "\n\n".join([front_matter(base), f"# {name}", *told, loading]) + "\n"


def _bits_told(result: QuantizeResult) -> str:
    unpacked = (
        " torchao stores these 4-bit numbers unpacked, in 8 bits."
        if result.scheme in TORCHAO
        else ""
    )
    return (
        f"A number of the routed experts takes {result.bits:.2f} bits on average, deltas and "
        f"scales included; shared out over the numbers of the teacher's routed experts that is "
        f"{result.teacher_bits:.2f} bits each. A number that was rounded takes "
        f"{result.base_bits:.2f}, scales included.{unpacked}"
    )


def _use_told(result: QuantizeResult, parts: list[str]) -> str:
    """Say which errors were weighed by the text, and how much of it reached a base."""
    told = [] if result.used_text else [UNUSED]
    if result.weighed:
        others = [NAMES[part] for part in parts if part != BASES]
        plainly = f"; rounded without it: {', '.join(others)}" if others else ""
        how = f", by {result.scheme.upper()}" if result.scheme in CALIBRATED else ""
        told.append(f"Errors of bases were weighed on it{how}{plainly}.")
    if result.seen is not None:
        seen = result.seen
        told.append(
            f"A base saw {seen.base_median:.0f} tokens of it (median; the least "
            f"{seen.base_least}), where one expert alone would have seen "
            f"{seen.expert_median:.0f} (the least {seen.expert_least})."
        )
    return " ".join(told)
