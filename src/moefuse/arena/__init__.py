"""The arena: every method beside this design, at the same bytes, on the same text and steps."""
