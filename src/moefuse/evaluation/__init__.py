"""How good a student is: measured against its teacher, reported as rows, and tried out by hand."""
