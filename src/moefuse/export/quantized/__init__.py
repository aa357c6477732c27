"""Students in the formats of quantisers."""
