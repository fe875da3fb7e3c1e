"""Arms x seeds x rates: plan, search, run, clock, forecast."""
