"""Puts this folder on the path, so that tests share their small models, data and whole runs."""

import gc
import os

import pytest

# Before PyTorch is imported, and for processes that tests start. Tiny models gain nothing from a
# second thread, and beside two busy processes they lose: 41 s instead of 24 s for test_baseline
# (measured, 2 cores). Tests of the real model share the cores with the suite's other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from runs_fixture import finished, nursery, only_runs, place, unmeasured

__all__ = ["finished", "nursery", "only_runs", "place", "unmeasured"]


# By a fixture of theirs, files that share what takes seconds to make: a warm process with whole
# runs, the study that all reports are of.
SHARED = {"nursery": "whole runs", "contents": "reports"}


# First, for xdist reads the groups in the same hook, and this file may be registered before it.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keeps the tests of a file in one process, and files that share something in the same one.

    Tests of the real model stay together too, for it is large; and with other long ones, for what
    is handed out last should be short.
    """
    groups = {}
    for item in items:
        used = SHARED.keys() & set(getattr(item, "fixturenames", ()))
        found = "whole runs" if item.get_closest_marker("real") else None
        if found := found or next((SHARED[name] for name in used), None):
            groups[item.location[0]] = found
    for item in items:
        group = groups.get(item.location[0], item.location[0])
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish():
    """Leaves what imports made out of every later collection of garbage.

    A run collects at each change of phase, to measure its memory, and so would scan some million
    objects of PyTorch, Transformers and the rest each time: half of a tiny run's processor time.
    """
    gc.collect()
    gc.freeze()
