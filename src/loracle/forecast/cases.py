"""What a configuration comes to before it is run: the placements of a run or of a study."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from typing import Any, TypeVar

import torch

from loracle.config.run import Config
from loracle.forecast.devices import Device
from loracle.forecast.lengths import lengths_of
from loracle.forecast.op_costs import Rates
from loracle.forecast.predict import Prediction, predict_run, trace_run
from loracle.placement import ModulePlan

_Given = TypeVar("_Given")


_Found = TypeVar("_Found")


@dataclass(frozen=True)
class PlannedArms:
    """The placements that a configuration comes to."""

    title: str
    """Of the file."""
    config: Config
    """What all of them share."""
    architecture: Mapping[str, Any]
    """The model's Transformers configuration."""
    plans: Mapping[str, ModulePlan]
    """By the arm's name; of a run, one."""
    num_runs: Mapping[str, int]
    """Runs of each arm in the study; of a run, one."""
    stand_ins: tuple[str, ...]
    """Arms whose modules are chosen only when the study runs; others of their number stand in."""


def predict_arms(
    arms: PlannedArms,
    *,
    device: Device,
    rates: Rates | None,
    only: Sequence[str] | None = None,
) -> dict[str, Prediction]:
    """Returns what each placement takes on a device.

    Args:
        arms: The placements.
        device: Where they would run.
        rates: How fast it is; None: not known.
        only: Names of arms; None: all.
    """
    names = list(arms.plans if only is None else only)
    cases = [(name, arms.config) for name in names]
    found = predict_cases(arms, cases, device=device, rates=rates)
    return dict(zip(names, found, strict=True))


def predict_cases(
    arms: PlannedArms,
    cases: Sequence[tuple[str, Config]],
    *,
    device: Device,
    rates: Rates | None,
) -> list[Prediction]:
    """Returns what placements take on a device, each under a configuration of its own.

    Args:
        arms: The placements.
        cases: Arms by name, and what each runs with.
        device: Where they would run.
        rates: How fast it is; None: not known.
    """
    predict = partial(_predict, architecture=arms.architecture, device=device, rates=rates)
    return in_processes(predict, [(arms.plans[name], config) for name, config in cases])


def _predict(
    case: tuple[ModulePlan, Config],
    *,
    architecture: Mapping[str, Any],
    device: Device,
    rates: Rates | None,
) -> Prediction:
    plan, config = case
    lengths = lengths_of(config)
    traces = trace_run(config, plan=plan, architecture=architecture, device=device, lengths=lengths)
    return predict_run(traces, device=device, lengths=lengths, rates=rates)


def in_processes(each: Callable[[_Given], _Found], given: Sequence[_Given]) -> list[_Found]:
    """Returns what a function makes of each, on all cores where processes start cheaply.

    Args:
        each: Computes nothing that needs threads.
        given: What it takes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    count = min(cores, len(given))
    if count < 2 or "fork" not in get_all_start_methods():
        return [each(one) for one in given]
    fork = get_context("fork")
    # Threads of the parent are not there in a child, and must not be waited for.
    with (
        warnings.catch_warnings(),
        ProcessPoolExecutor(
            count, mp_context=fork, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        return list(pool.map(each, given))
