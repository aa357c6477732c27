"""Reading and writing checkpoints: safetensors and JSON only, nothing is ever unpickled."""
