"""The report as a LaTeX paper."""
