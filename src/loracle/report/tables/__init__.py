"""Tables of a study, for page, Markdown, CSV and paper."""
