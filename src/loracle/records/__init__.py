"""What a run or study leaves on disk; the only room that knows file names.

Imports placement, config and the root modules; no torch.
"""
