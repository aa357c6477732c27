"""Pure functions of tensors: no files, no progress, no settings."""
