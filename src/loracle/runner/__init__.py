"""One or many runs, from configuration to a complete run folder."""
