"""Greedy tokens by vLLM, in a process of its own: settings and prompts in, tokens out, as JSON.

Arguments: a file with ``model``, ``options`` of ``vllm.LLM``, ``prompts`` (lists of token ids)
and ``new_tokens``; and the file to write ``together``, ``alone`` and ``cached`` (prompt tokens that
were found in the prefix cache) to.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(settings: Path, out: Path) -> None:
    from vllm import LLM, SamplingParams

    asked: dict[str, Any] = json.loads(settings.read_text())
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
    written = {
        "together": together,
        "alone": alone,
        "cached": cached,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "moefuse": sorted(name for name in sys.modules if name.split(".")[0] == "moefuse"),
    }
    out.write_text(json.dumps(written))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
