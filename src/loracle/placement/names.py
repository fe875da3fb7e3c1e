"""Matches entries of a placement: a module kind, a full name, or a pattern of full names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from loracle.errors import did_you_mean
from loracle.placement.inventory import LinearModule

EVERYTHING = "*"


def matching(entry: str, modules: Iterable[LinearModule]) -> tuple[LinearModule, ...]:
    """Returns the modules whose kind or full name is ``entry``, or whose full name it globs.

    ``*`` alone leaves out the head, as ``all-linear`` does: nobody who writes "everything" means to
    adapt the output embedding, which in a small model is the largest layer of all.
    """
    if entry == EVERYTHING:
        return tuple(module for module in modules if module.role != "head")
    return tuple(m for m in modules if entry in (m.kind, m.name) or fnmatchcase(m.name, entry))


def layer_ranges(layers: Iterable[int]) -> str:
    """Returns layer indices as runs, e.g. ``0-3,7``."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def nearest_name(entry: str, modules: Sequence[LinearModule]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the kind or full name nearest to ``entry``, or ""."""
    names = [module.name if "." in entry else module.kind for module in modules]
    return did_you_mean(entry, dict.fromkeys(names))
