"""Paired differences with intervals over seeds and examples, and Holm's correction."""
