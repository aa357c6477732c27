"""Complete text with Transformers.

Run it as: python examples/transformers_completion.py OUT

moefuse need not be installed: the fused layer's code lies in the checkpoint.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "def read_lines(path):\n"


def main(checkpoint: str) -> None:
    """Print what the model writes, at most 64 tokens, the likeliest each time."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main(sys.argv[1])
