"""The model card that every written checkpoint carries, as text made from its record alone."""

from collections.abc import Iterable, Sequence
from statistics import mean
from textwrap import fill
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from moefuse.export.record import PLOT, CardRecord, Distilled, Form, Healed, Measured, Metrics, Text

WIDTH = 100
TAGS = ["moe", "moefuse", "compression"]
TEACHER = "teacher"
OF_ITSELF = {"kl": "0", "agreement": "1"}
"""What the teacher's figures against itself are."""
STAGES = {
    TEACHER: "original",
    "one-shot": "this model, one-shot (neither distilled nor healed)",
    "distilled": "this model, distilled layer by layer (not healed)",
    "healed": "this model, healed end to end",
}
"""What the table of figures calls the stages that moefuse knows."""
PLOTTED = "![KL to the original and agreement with it, stage by stage]({plot})"
METRICS = {
    "kl": ("KL to the original, nats per token", "kl_divergence"),
    "agreement": ("First choice is the original's, share of tokens", "agreement"),
    "cross_entropy": ("Cross-entropy, nats per token", "cross_entropy"),
    "perplexity": ("Perplexity", "perplexity"),
}
"""A metric's name for people and its identifier in the front matter."""


def render_card(record: CardRecord) -> str:
    """Return the card's Markdown, front matter included; the same record gives the same text."""
    sections = [
        f"# {record.name}",
        _filled(_introduction(record)),
        "## Sizes",
        _sizes(record),
        "## How it was made",
        _bullets(_making(record)),
        *_layers(record.distilled),
        "## Quality",
        *_quality(record),
        "## How to load it",
        _loading(record.name, record.form),
        "## Limits",
        _bullets(_limits(record)),
        "## Licence",
        _filled(_licence(record)),
    ]
    text = f"---\n{_front_matter(record).to_yaml(line_break=chr(10))}\n---\n\n"
    text += "\n\n".join(sections) + "\n"
    # Raises ValueError for front matter that the hub's client could not read back.
    ModelCard(text)
    return text


# The front matter.


def _front_matter(record: CardRecord) -> ModelCardData:
    metadata = {"pipeline_tag": "text-generation", **record.base.metadata}
    results = _results(record.measured)
    return ModelCardData(
        base_model=record.base.base_model,
        library_name="transformers",
        tags=TAGS,
        datasets=_data_sets(record),
        model_name=record.name if results else None,
        eval_results=results or None,
        **metadata,
    )


def _data_sets(record: CardRecord) -> list[str] | None:
    """Return the hub data sets that the student was fitted to; files' names have no slash."""
    texts = [record.calibrated, *([record.healed.data] if record.healed else [])]
    names = [text.name.partition(":")[0] for text in texts if "/" in text.name]
    return list(dict.fromkeys(names)) or None


def _results(measured: Measured | None) -> list[EvalResult]:
    """Return the figures of the last stage, the one that the checkpoint holds."""
    if measured is None:
        return []
    last, data = measured.stages[-1], measured.data
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data.name.partition(":")[0] if "/" in data.name else "text",
            dataset_name=data.name,
            metric_type=identifier,
            metric_name=title,
            metric_value=round(getattr(last, name), 6),
            metric_args=_args(last, name),
        )
        for name, (title, identifier) in METRICS.items()
        if getattr(last, name) is not None
    ]


def _args(metrics: Metrics, name: str) -> dict[str, Any] | None:
    interval = metrics.intervals.get(name)
    return interval and {"interval_95": [round(end, 6) for end in interval]}


# What it is and how it was made.


def _introduction(record: CardRecord) -> str:
    router = (
        "The router is the original's."
        if record.healed is None
        else f"It was then healed; trained: {record.healed.trained}."
    )
    return f"{_made(record.base.name, record.form)} {router}"


def _made(original: str, form: Form) -> str:
    """Say in one sentence what became of the routed experts."""
    start = f"{original} with the {form.experts} routed experts of each layer"
    if form.multiplexed is not None:
        return (
            f"{start} multiplexed by moefuse into {form.groups} fused experts (G) with adapters of "
            f"rank {form.rank} (R) that are mixed before the non-linearity, the recipe of "
            "checkpoints published in 2025."
        )
    if form.neurons is None:
        return (
            f"{start} fused into {form.groups} shared base experts (G) plus one delta of rank "
            f"{form.rank} (R) per original expert, by moefuse."
        )
    bits = ", ".join(
        f"{form.neurons[width]:,} at {width}" for width in sorted(form.neurons, key=float)
    )
    shared = f" and at most {form.shared:,} a layer that its experts share" if form.shared else ""
    return (
        f"{start} reduced by moefuse to {sum(form.neurons.values()):,} neurons of their own (by "
        f"bits of a number: {bits}){shared}."
    )


def _sizes(record: CardRecord) -> str:
    old, new = record.original, record.student
    rows = [
        ("parameters", _count(old.parameters), _count(new.parameters)),
        (
            "parameters that a token passes, at most",
            _count(old.active_parameters),
            _count(new.active_parameters),
        ),
        ("bytes of the routed experts", _bytes(old.expert_bytes), _bytes(new.expert_bytes)),
        ("bytes in all", _bytes(old.bytes), _bytes(new.bytes)),
    ]
    return _table(["", "original", "this model"], rows)


def _making(record: CardRecord) -> list[str]:
    form, calibrated = record.form, record.calibrated
    commit = f", commit `{record.base.revision}`" if record.base.revision else ""
    return [
        f"Original: {record.base.name}{commit}; {form.layers} layers with {form.experts} routed "
        f"experts each, of which a token chooses {form.top_k}.",
        f"Method: {_method(form)}.",
        f"Calibration text: {_text(calibrated)}.",
        f"Layer distillation: {_distillation(record.distilled)}",
        f"Healing (end-to-end distillation): {_healing(record.healed)}",
    ]


def _method(form: Form) -> str:
    if form.multiplexed is not None:
        return (
            f"the recipe of 2025 in the form multiplexed, G = {form.groups} groups a layer, rank R "
            f"= {form.rank}; {form.multiplexed}"
        )
    if form.neurons is None:
        return (
            f"shared bases and low-rank deltas, G = {form.groups} bases a layer, each delta of "
            f"rank R = {form.rank}"
        )
    facts = [
        f"{form.kept:.1%} of the original's neurons are kept" if form.kept is not None else "",
        f"{form.mean_bits:.2f} bits a number on average" if form.mean_bits is not None else "",
        f"shared neurons: at most {form.shared:,} a layer",
        form.advice or "",
    ]
    return "own neurons at unequal bits; " + "; ".join(fact for fact in facts if fact)


def _text(text: Text) -> str:
    documents = f" of {text.documents:,} documents" if text.documents else ""
    cut = f", in sequences of {text.sequence_length:,}" if text.sequence_length else ""
    return f"{text.tokens:,} tokens{documents} of {text.name}{cut}"


def _distillation(distilled: Distilled) -> str:
    if not distilled.steps:
        return "none; the student is one-shot."
    return (
        f"{distilled.steps:,} steps a layer on the calibration text, against what the original's "
        "layer returns."
    )


def _healing(healed: Healed | None) -> str:
    if healed is None:
        return "none; the layers were never trained together."
    details = "".join(f"; {name} {value}" for name, value in healed.details.items())
    return (
        f"{healed.steps:,} steps on {_text(healed.data)}; loss: {healed.loss}; trained: "
        f"{healed.trained}{details}."
    )


def _layers(distilled: Distilled) -> list[str]:
    """Tell the layers' relative errors, their mean before and after, and each one's folded away."""
    if not distilled.errors:
        return []
    errors = {int(layer): error for layer, error in distilled.errors.items()}
    before, after = (mean(e[when] for e in errors.values()) for when in ("before", "after"))
    worst = max(errors, key=lambda layer: errors[layer]["after"])
    told = (
        "Relative squared error of the routed experts' output (0: the original's, 1: nothing "
        f"right), mean over layers: {before:.4f} one-shot, {after:.4f} in the end; the worst layer "
        f"is {worst} with {errors[worst]['after']:.4f}."
    )
    rows = [
        (str(layer), f"{error['before']:.4f}", f"{error['after']:.4f}")
        for layer, error in sorted(errors.items())
    ]
    table = _table(["layer", "one-shot", "in the end"], rows)
    return [
        _filled(told),
        f"<details><summary>Every layer</summary>\n\n{table}\n\n</details>",
    ]


# What it lost.


def _quality(record: CardRecord) -> list[str]:
    measured = record.measured
    if measured is None:
        why = f" ({record.unmeasured})" if record.unmeasured else ""
        how = (
            f"Not measured{why}. To see how far this model is from the original on a text of your "
            f"own: `moefuse eval {record.name} --teacher {record.base.name} --data TEXT`."
        )
        return [_filled(how)]
    note = f" ({measured.note})" if measured.note else ""
    told = (
        f"On {_text(measured.data)}{note}, to which nothing was fitted. KL is the mean of "
        "KL(original || this model) over tokens. Square brackets hold 95 % confidence intervals, "
        "bootstrapped over documents."
    )
    if not any(stage.intervals for stage in measured.stages):
        told += " There are none here: the text is a single sequence."
    titles = ["", *(title for title, _ in METRICS.values())]
    rows = [
        (STAGES.get(stage.stage, stage.stage), *(_figure(stage, name) for name in METRICS))
        for stage in measured.stages
    ]
    plot = [PLOTTED.format(plot=PLOT)] if measured.has_kl else []
    return [_filled(told), _table(titles, rows), *plot]


def _figure(metrics: Metrics, name: str) -> str:
    value, interval = getattr(metrics, name), metrics.intervals.get(name)
    if metrics.stage == TEACHER and name in OF_ITSELF:
        return OF_ITSELF[name]
    if value is None:
        return "-"
    shown = _number(value)
    return (
        shown if interval is None else f"{shown} [{_number(interval[0])}, {_number(interval[1])}]"
    )


def _number(value: float) -> str:
    """Write a figure with four decimals, or two digits where these would all be noughts."""
    return f"{value:.4f}" if value >= 0.01 else f"{value:.2g}"


# How to use it, and when not.


def _loading(name: str, form: Form) -> str:
    rows = ["Transformers, moefuse | as above"]
    if form.multiplexed is None:
        rows += [
            f"vLLM | `vllm serve {name} --trust-remote-code`; with moefuse beside it, `vllm serve "
            f"{name}`",
            "llama.cpp with moefuse's patch | `moefuse export gguf`, where bases are shared",
            "llama.cpp | `moefuse collapse` or `moefuse expand`, then `moefuse export gguf`",
            "ExLlama | `moefuse collapse`; which families run is in docs/exports.md",
            "other engines | `moefuse collapse` or `moefuse expand`; not yet tested",
            f"quantisers | `moefuse quantize {name} OUT`, or your own configuration",
        ]
    else:
        rows += ["others | cannot: no ordinary experts compute what this form does"]
    engines = "\n".join(f"| {row} |" for row in rows)
    return f"""\
Transformers, without moefuse:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint = "{name}"  # this directory, or its id on the hub
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
```

`trust_remote_code` is needed because the fused layer's code, `modeling_moefuse.py`, lies in this
directory; it imports nothing but torch and transformers. With moefuse no such consent is needed,
because it runs its own copy of that code:

```python
import moefuse

model = moefuse.load("{name}")
```

| engine | how |
|---|---|
{engines}"""


def _limits(record: CardRecord) -> list[str]:
    eval_command = f"`moefuse eval {record.name} --teacher {record.base.name} --data TEXT`"
    limits = [
        "It answers differently from the original, most of all on text unlike what it was "
        f"calibrated on ({record.calibrated.name}). Measure on your own task: {eval_command}.",
        "Whatever the original gets wrong, this model gets wrong too; the original's own limits "
        "and intended use apply.",
    ]
    if record.healed is None:
        limits.insert(
            0, "Not healed: its layers were made one by one and never trained together end to end."
        )
    if record.measured is None:
        limits.insert(0, "Its quality was not measured when it was made.")
    elif record.healed is not None and record.measured.stages[-1].stage != "healed":
        limits.insert(0, "Healed since it was measured: the figures above are of before.")
    return limits


def _licence(record: CardRecord) -> str:
    metadata = record.base.metadata
    if "license" not in metadata:
        return (
            f"The card of {record.base.name} names no licence; find out which one applies before "
            "you publish or use this model. Licence files that lay beside the original's weights "
            "were copied."
        )
    # Two words suffice: the front matter holds the fields as the original's card has them.
    names = metadata.get("license_name") or metadata["license"]
    named = ", ".join(names) if isinstance(names, list) else names
    link = f" ({metadata['license_link']})" if "license_link" in metadata else ""
    return (
        f"That of the original, {record.base.name}: {named}{link}. Licence files that lay beside "
        "the original's weights were copied."
    )


# How it is written.


def _filled(text: str) -> str:
    return fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(
        fill(
            line,
            WIDTH,
            initial_indent="- ",
            subsequent_indent="  ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        for line in lines
    )


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruler = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [titles, ruler, *rows])


def _count(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e8 else f"{number / 1e6:.3f} M"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"
