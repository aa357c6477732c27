"""Insert text between a prefix and a suffix with vLLM.

Run it as: python examples/vllm_insertion.py OUT

Needs moefuse beside vLLM, which then runs moefuse's own code; without it, give ``LLM``
``trust_remote_code=True``.
"""

import sys

from vllm import LLM, SamplingParams

PREFIX = """def mean(values):
    total = 0
"""
SUFFIX = """
    return total / len(values)
"""
# DeepSeek's markers; they are in the tokenizer of every student of a teacher that has them.
PROMPT = f"<｜fim▁begin｜>{PREFIX}<｜fim▁hole｜>{SUFFIX}<｜fim▁end｜>"  # noqa: RUF001


def main(checkpoint: str) -> None:
    """Print what the model writes, at most 64 tokens, the likeliest each time."""
    llm = LLM(checkpoint, max_model_len=1024)
    sampling = SamplingParams(temperature=0, max_tokens=64)
    [output] = llm.generate(PROMPT, sampling)
    print(output.outputs[0].text)


# vLLM starts processes that import this file again.
if __name__ == "__main__":
    main(sys.argv[1])
