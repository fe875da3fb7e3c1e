"""From records to verdicts: differences, intervals, costs, trade-offs, advice.

Imports records, placement, config and the root modules; no torch.
"""
