"""Puts this folder on the path, so that tests share their small models, data and whole runs."""

from runs_fixture import finished, nursery, place

__all__ = ["finished", "nursery", "place"]
