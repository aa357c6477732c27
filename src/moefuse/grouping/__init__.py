"""Which experts share a base."""
