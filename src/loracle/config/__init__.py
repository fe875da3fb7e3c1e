"""What a user asks for: YAML and overrides to one validated, immutable Config. No torch."""
