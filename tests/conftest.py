"""Puts this folder on the path, so that tests share their small models, data and whole runs."""

import os

# Before PyTorch is imported, and for processes that tests start. A second thread makes tiny models
# slower, on a busy machine many times; tests of the real model take every core for themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from runs_fixture import finished, nursery, place

__all__ = ["finished", "nursery", "place"]
