"""On PYTHONPATH: vLLM is not installed, for all that anybody can tell."""

import sys

sys.modules["vllm"] = None  # type: ignore[assignment]
