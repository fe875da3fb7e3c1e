"""One training step, one evaluation, one answer, and what each of them costs.

Imports model, data, config and the root modules. Knows no run folder.
"""
