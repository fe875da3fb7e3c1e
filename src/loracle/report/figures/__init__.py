"""Charts of a study, as Vega-Lite specifications and their SVG and PDF."""
