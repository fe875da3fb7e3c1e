"""One or many runs, from configuration to a complete run folder.

Imports forecast and engine and the rooms below them; no study, no report.
"""
