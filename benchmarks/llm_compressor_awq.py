"""llm-compressor's AWQ on a fused student, for ``llm_compressor.py``: does it run, and is it exact?

    python benchmarks/llm_compressor_awq.py STUDENT OUT TEXT WAY

in an environment with llm-compressor. ``WAY`` is which layers it moves scales between: ``default``,
those that it takes for a class it does not know, or ``up to down``, within every base. The latter
stops where there is no accelerator, whose memory it pins; ``, unpinned`` after it leaves that out.
"""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

SEQUENCES = 40
WEIGHTS = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}
BASES = {"targets": ["re:.*[.]experts[.]bases[.].*"], "weights": WEIGHTS}
WITHIN_BASES = [AWQMapping("re:.*bases[.].*gate_up_proj$", ["re:.*bases[.].*down_proj$"])]


def main(student: str, out: str, text: Path, way: str) -> None:
    if way.endswith(", unpinned"):
        plain: Any = torch.Tensor
        plain.pin_memory = lambda tensor: tensor
    tokenizer: Any = AutoTokenizer.from_pretrained(student, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(student, trust_remote_code=True)
    with text.open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in islice(lines, SEQUENCES)]
    sequences = [tokenizer(document)["input_ids"][:512] for document in documents]
    masks = [[1] * len(sequence) for sequence in sequences]
    mappings = None if way == "default" else WITHIN_BASES
    oneshot(
        model=model,
        tokenizer=tokenizer,
        trust_remote_code_model=True,
        dataset=Dataset.from_dict({"input_ids": sequences, "attention_mask": masks}),
        num_calibration_samples=SEQUENCES,
        max_seq_length=512,
        recipe=[AWQModifier(mappings=mappings), QuantizationModifier(config_groups={"b": BASES})],
    )
    model.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
