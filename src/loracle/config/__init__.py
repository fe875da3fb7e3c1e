"""What a user asks for: YAML and overrides to one validated, immutable Config.

Imports the root modules only; no torch.
"""
