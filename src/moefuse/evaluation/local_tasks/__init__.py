"""Two tasks for lm-evaluation-harness on held-out Python code, one YAML file and one JSONL each."""
