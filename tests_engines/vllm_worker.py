"""Greedy tokens by vLLM, model after model in this one process: ``engines.Engine`` starts it.

Importing vLLM takes longer than serving a small model with it, so one process serves many. On
standard input comes a line of JSON for every model: ``model``, ``options`` of ``vllm.LLM``,
``prompts`` (lists of token ids) and ``new_tokens``. On standard output a line answers each:
``together``, ``alone``, ``cached`` (prompt tokens that were found in the prefix cache), or
``error``, what vLLM stopped with. vLLM's own words go to standard error.
"""

import gc
import json
import os
import sys
from typing import Any, TextIO


def generate(asked: dict[str, Any]) -> dict[str, Any]:
    """Serve one model and ask it everything, all at once and one by one."""
    from vllm import LLM, SamplingParams

    llm = LLM(asked["model"], disable_log_stats=False, **asked["options"])
    sampling = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]

    def tokens(some: list[Any]) -> list[list[int]]:
        return [
            list(found.outputs[0].token_ids)
            for found in llm.generate(some, sampling, use_tqdm=False)
        ]

    together = tokens(prompts)
    alone = [tokens([prompt])[0] for prompt in prompts]
    cached = sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
    config = llm.llm_engine.vllm_config
    return {
        "together": together,
        "alone": alone,
        "cached": cached,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "eager": config.model_config.enforce_eager,
        "moefuse": sorted(name for name in sys.modules if name.split(".")[0] == "moefuse"),
    }


def answer(line: str) -> dict[str, Any]:
    """Return ``generate``'s answer, or what went wrong, which is for the test to judge."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        return generate(json.loads(line))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        # An engine that is still alive would later end the next one's group of processes.
        gc.collect()
        cleanup_dist_env_and_memory()


def main(answers: TextIO) -> None:
    """Answer line by line until there are no more."""
    for line in sys.stdin:
        made = answer(line)
        gc.collect()
        print(json.dumps(made), file=answers, flush=True)


if __name__ == "__main__":
    own_output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(own_output)
