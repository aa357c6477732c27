"""moefuse: shrink Mixture-of-Experts language models by fusing their experts."""
