"""Paired differences with intervals over seeds and examples, and Holm's correction."""

from loracle.analysis.stats.difference import Difference
from loracle.analysis.stats.multiple import holm
from loracle.analysis.stats.paired import paired_difference

__all__ = ["Difference", "holm", "paired_difference"]
