"""One training step, one score, one answer, and what they take. Knows no folder."""
