"""Whether Triton's kernels can run here at all."""

import os
from importlib.util import find_spec

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = find_spec("triton") is not None and (torch.cuda.is_available() or INTERPRETED)
