"""Puts this folder on the path, so that tests share their small models, data and whole runs."""

import os

# Before PyTorch is imported, and for processes that tests start. Tiny models gain nothing from a
# second thread, and beside two busy processes they lose: 41 s instead of 24 s for test_baseline
# (measured, 2 cores). Tests of the real model take every core for themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from runs_fixture import finished, nursery, place

__all__ = ["finished", "nursery", "place"]
