"""The frozen base, the adapters on it, and the arithmetic of both.

Imports data, placement and the root modules. Knows no configuration, run or folder.
"""
