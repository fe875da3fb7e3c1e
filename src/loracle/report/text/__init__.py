"""Sentences and formatted numbers of a report."""
