"""Forecasts of several placements at once: those of a run or of a study."""

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
from loracle.engine.small_machine import can_start_threads
from loracle.forecast.devices import Device
from loracle.forecast.lengths import lengths_of
from loracle.forecast.op_costs import Rates
from loracle.forecast.predict import Prediction, predict_run, trace_run
from loracle.forecast.small_model import require_usable
from loracle.model.faults import model_faults
from loracle.placement import ModulePlan

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class PlannedArms:
    """The resolved placements of a configuration."""

    title: str
    """Name of its file."""
    config: Config
    """The configuration that they share."""
    architecture: Mapping[str, Any]
    """The model's Transformers configuration."""
    plans: Mapping[str, ModulePlan]
    """Modules by the arm's name; one for a single run."""
    num_runs: Mapping[str, int]
    """Number of runs of each arm."""
    stand_ins: tuple[str, ...]
    """Arms whose modules are chosen when the study runs; as many random ones stand in for them."""


def predict_arms(
    arms: PlannedArms,
    *,
    device: Device,
    rates: Rates | None,
    only: Sequence[str] | None = None,
    only_times: bool = False,
) -> dict[str, Prediction]:
    """Returns the memory and time of a run of each arm, by the arm's name.

    ``only`` selects arms. ``only_times`` skips what only memory needs; the predicted memory is then
    too low.
    """
    names = list(arms.plans if only is None else only)
    cases = [(name, arms.config) for name in names]
    results = predict_cases(arms, cases, device=device, rates=rates, only_times=only_times)
    return dict(zip(names, results, strict=True))


def predict_cases(
    arms: PlannedArms,
    cases: Sequence[tuple[str, Config]],
    *,
    device: Device,
    rates: Rates | None,
    only_times: bool = False,
) -> list[Prediction]:
    """Returns the memory and time of runs: of each case, an arm's name and its configuration."""
    predict = partial(
        _predict,
        architecture=arms.architecture,
        device=device,
        rates=rates,
        only_times=only_times,
    )
    return in_processes(predict, [(arms.plans[name], config) for name, config in cases])


def _predict(
    case: tuple[ModulePlan, Config],
    *,
    architecture: Mapping[str, Any],
    device: Device,
    rates: Rates | None,
    only_times: bool,
) -> Prediction:
    plan, config = case
    lengths = lengths_of(config)
    require_usable(architecture, config=config, lengths=lengths, is_full=plan.is_full)
    with model_faults(f"{config.model}: cannot be planned, though it may run"):
        traces = trace_run(
            config,
            plan=plan,
            architecture=architecture,
            device=device,
            lengths=lengths,
            only_times=only_times,
        )
    return predict_run(traces, device=device, lengths=lengths, rates=rates)


def in_processes(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Returns the function's results, computed on all cores where processes can be forked.

    The function must not need threads: it runs in processes of one thread.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    count = min(cores, len(items))
    pool = _pool(count) if count > 1 and _may_fork() and can_start_threads() else None
    if pool is None:
        return list(map(function, items))
    # A child has none of its parent's threads and must not wait for them.
    with warnings.catch_warnings(), pool:
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        return list(pool.map(function, items))


def _may_fork() -> bool:
    """Returns whether a forked child could trace a step, its backward pass and its optimizer.

    Not where there is an accelerator: neither its context nor autograd's thread for it survives a
    fork. New processes instead would import PyTorch again, which takes as long as most traces.
    """
    return "fork" in get_all_start_methods() and not torch.accelerator.is_available()


def _pool(count: int) -> ProcessPoolExecutor | None:
    """Returns processes of one thread; None where they cannot be had."""
    try:
        return ProcessPoolExecutor(
            count,
            mp_context=get_context("fork"),
            initializer=torch.set_num_threads,
            initargs=(1,),
        )
    except (OSError, ImportError):
        # Their semaphores live in /dev/shm, which is not writable everywhere.
        return None
