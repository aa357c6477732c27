"""The ``README.md`` of plain checkpoints made of a student: what they are, of what, and how to
load them."""

from textwrap import fill
from typing import TYPE_CHECKING, Any

import yaml

from moefuse.export.original import original_of
from moefuse.export.record import RECORD, Base, read_record

if TYPE_CHECKING:
    from moefuse.export.student_reader import StudentReader

LOADING = """\
## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Neither moefuse nor remote code is needed. Other engines: whatever runs {family} models."""


def plain_card(
    name: str,
    reader: "StudentReader",
    what: str,
    *,
    student_bytes: int,
    made_bytes: int,
    sections: tuple[str, ...] = (),
) -> str:
    """Return the text of a card.

    ``what`` says what the checkpoint is, with ``{student}``, ``{base}``, ``{bytes}`` and
    ``{student_bytes}`` in it; ``sections`` are further paragraphs, in Markdown.
    """
    base = base_of(reader)
    told = what.format(
        student=reader.directory.name,
        base=base.name,
        bytes=size(made_bytes),
        student_bytes=size(student_bytes),
    )
    loading = LOADING.format(name=name, family=reader.family.model_type)
    parts = [front_matter(base), f"# {name}", fill(told, 100), *sections, loading]
    return "\n\n".join(parts) + "\n"


def base_of(reader: "StudentReader") -> Base:
    """Return whose student this is, by the record beside its card or, without one, by itself."""
    if (reader.directory / RECORD).exists():
        return read_record(reader.directory).base
    return original_of(reader)


def front_matter(base: Base) -> str:
    """Return the front matter of a checkpoint made of ``base``."""
    fields: dict[str, Any] = {**base.metadata, "library_name": "transformers"}
    if base.base_model is not None:
        fields["base_model"] = base.base_model
    fields["tags"] = ["moefuse"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()}\n---"


def size(count: int) -> str:
    """Return a size for people to read."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
