"""From records to verdicts: differences, intervals, costs, trade-offs, advice. No torch."""
