"""Arms x seeds x rates: plan, search, run, clock, forecast.

Imports runner, forecast, analysis and the rooms below them; no report.
"""
