"""Students over a grid of groups, ranks and healing tokens, and the laws that they follow."""
