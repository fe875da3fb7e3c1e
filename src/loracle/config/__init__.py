"""Configuration: YAML and overrides to one validated, immutable Config. No torch."""
