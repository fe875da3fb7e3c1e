"""Memory and time of a run before it is run: the real step, traced without weights or a GPU.

Imports engine and the rooms below it; no runner, no study.
"""
