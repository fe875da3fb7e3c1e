"""Paired differences with intervals over seeds and examples, and Holm's correction."""

from loracle.stats.difference import Difference
from loracle.stats.multiple import holm
from loracle.stats.paired import paired_difference

__all__ = ["Difference", "holm", "paired_difference"]
