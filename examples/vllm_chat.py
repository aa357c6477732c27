"""Answer a message by the checkpoint's chat template with vLLM.

Run it as: python examples/vllm_chat.py OUT

Needs moefuse beside vLLM, which then runs moefuse's own code; without it, give ``LLM``
``trust_remote_code=True``.
"""

import sys

from vllm import LLM, SamplingParams

MESSAGES = [{"role": "user", "content": "What does os.path.join do?"}]


def main(checkpoint: str) -> None:
    """Print what the model writes, at most 64 tokens, the likeliest each time."""
    llm = LLM(checkpoint, max_model_len=1024)
    sampling = SamplingParams(temperature=0, max_tokens=64)
    [output] = llm.chat(MESSAGES, sampling)
    print(output.outputs[0].text)


# vLLM starts processes that import this file again.
if __name__ == "__main__":
    main(sys.argv[1])
