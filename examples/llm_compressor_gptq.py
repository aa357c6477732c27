"""Round a fused student's bases to 4 bits by llm-compressor's GPTQ instead of moefuse's.

Run it as: python examples/llm_compressor_gptq.py STUDENT OUT TEXT

TEXT is JSONL with a "text" in every line. llm-compressor wants a Transformers of its own, so give
it an environment of its own; moefuse need not be there, as the fused layer's code lies in STUDENT.
OUT loads by ``AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)``, which asks for
compressed-tensors and not for llm-compressor.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

BASES = ".experts.bases."
WINDOW = 512


def windows(text: Path, tokenizer: Any, tokens: int) -> Iterator[list[int]]:
    """Cut every document of ``text`` into sequences, ``tokens`` in all."""
    for line in text.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"], verbose=False)["input_ids"][:tokens]
        cut = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        for window in cut:
            if len(window) > 1:
                tokens -= len(window)
                yield window


def count_rows(model: Any) -> Counter[str]:
    """Return how many rows every base gets, by name; filled while the model runs."""
    rows: Counter[str] = Counter()
    for name, module in model.named_modules():
        if BASES in name and not list(module.children()):
            rows[name] = 0

            def count(_: Any, inputs: Any, name: str = name) -> None:
                rows[name] += len(inputs[0])

            module.register_forward_pre_hook(count)
    return rows


def main() -> None:
    """Round and save, unless a base saw no text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student")
    parser.add_argument("out")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--observer", default="minmax", help="how scales are chosen; or mse")
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.student, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(given.student, trust_remote_code=True)
    sequences = list(windows(given.text, tokenizer, given.tokens))
    masks = [[1] * len(sequence) for sequence in sequences]
    weights = {
        "num_bits": 4,
        "symmetric": True,
        "strategy": "group",
        "group_size": given.group_size,
        "observer": given.observer,
    }
    bases = {"targets": [f"re:.*{re.escape(BASES)}.*"], "weights": weights}
    rows = count_rows(model)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        trust_remote_code_model=True,
        dataset=Dataset.from_dict({"input_ids": sequences, "attention_mask": masks}),
        num_calibration_samples=len(sequences),
        max_seq_length=WINDOW,
        recipe=GPTQModifier(config_groups={"bases": bases}),
    )
    # llm-compressor runs a layer twice, before and after rounding it. What it never ran it would
    # save with scales that nothing has set.
    unseen = [name for name, count in rows.items() if not count]
    if unseen:
        sys.exit(f"No token reached {unseen[0]} and {len(unseen) - 1} others; give more text.")
    least = min(rows.values()) // 2
    print(f"tokens of a base: {median(rows.values()) // 2:.0f} (median), at least {least}")
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
