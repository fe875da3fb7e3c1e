"""Puts this folder on the path, so that tests share their small models, data and whole runs."""

import os

# Before PyTorch is imported, and for processes that tests start. Tiny models gain nothing from a
# second thread, and beside two busy processes they lose: 41 s instead of 24 s for test_baseline
# (measured, 2 cores). Tests of the real model share the cores with the suite's other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

from runs_fixture import finished, nursery, only_runs, place, set_aside, unmeasured

# Whether a property holds does not depend on how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

__all__ = ["finished", "nursery", "only_runs", "place", "unmeasured"]


def pytest_collection_finish():
    """Leaves what imports made out of every later collection of garbage."""
    set_aside()
