"""Step times of a study's arms, measured in turn, because the runs' own clocks are not comparable.

Runs of a study are hours apart, and the speed of a shared machine varies from hour to hour. Here
every arm takes a step over the same batch before any takes the next one, so that a slow minute
slows all of them, and times are compared batch by batch. The adapters are discarded afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loracle.config.run import Config
from loracle.engine.device import choose_device, choose_dtype, faster_fp32, keep_large_blocks
from loracle.engine.out_of_memory import memory_faults
from loracle.engine.schedule import DataOrder
from loracle.engine.train import StepRecord, train_bundle
from loracle.errors import OutOfMemory
from loracle.model.trunk import lowest_layer
from loracle.records.files import read_json
from loracle.records.signature import environment_differences
from loracle.records.study_folder import CLOCK, write_clock
from loracle.runner.progress import Screen
from loracle.runner.shared_base import Workbench, open_workbench
from loracle.runner.signals import StopRequest
from loracle.runner.trunk import fill_trunk, open_trunk, trunk_pays
from loracle.study.plan import PlannedArm, StudyPlan

# assumed: small enough that the scratch adapters stay where they began, whatever the runs' rate
_RATE = 1e-9
_SKIPPED_ROUNDS = 1
_LEFT_OUT = "measure.clock_rounds=0"


def keep_clock(plan: StudyPlan, *, out: Path, screen: Screen | None = None) -> bool:
    """Measures the arms' step times in turn, unless done before; returns whether there are any.

    Full fine-tuning is left out: it does not share the base.

    Args:
        plan: The study.
        out: Its folder.
        screen: Where progress is shown; None: standard error.

    Raises:
        UsageError: If a source cannot be used.
        Interrupted: On SIGINT or SIGTERM; the measurement restarts next time.
    """
    rounds = plan.base.measure.clock_rounds
    arms = [arm for arm in plan.arms if not arm.plan.is_full]
    if rounds == 0 or len(arms) < 2:
        return False
    screen = screen or Screen()
    if not _is_needed(plan, out=out, arms=arms):
        return True
    keep_large_blocks()
    device = choose_device(plan.base.device)
    dtype = choose_dtype(plan.base.dtype, device=device)
    with StopRequest() as stop, faster_fp32(device, dtype):
        bench = open_workbench(plan.base, screen=screen, stop=stop)
        try:
            with memory_faults("the arms beside each other", remedy=f"set {_LEFT_OUT}"):
                times = clock_arms(bench, arms, base=plan.base, rounds=rounds)
        except OutOfMemory as error:
            screen.notice(f"not clocked in turn: {error}")
            return False
    found = {
        "schema": 1,
        "rounds": rounds,
        "environment": bench.environment,
        "step_time_s": times,
    }
    write_clock(out, found)
    return True


def _is_needed(plan: StudyPlan, *, out: Path, arms: Sequence[PlannedArm]) -> bool:
    """Returns whether step times of these arms in the runs' environment are missing."""
    if not (out / CLOCK).is_file():
        return True
    kept = read_json(out / CLOCK)
    if any(arm.name not in kept["step_time_s"] for arm in arms):
        return True
    first = out / "runs" / plan.runs[0].id / "environment.json"
    return first.is_file() and bool(environment_differences(read_json(first), kept["environment"]))


def clock_arms(
    bench: Workbench, arms: Sequence[PlannedArm], *, base: Config, rounds: int
) -> dict[str, list[float]]:
    """Returns the step times of each arm, one per round, in seconds.

    Args:
        bench: The base and its data, without adapters; they are left so.
        arms: Placements on it.
        base: What the study's runs share.
        rounds: Steps of each arm that count.
    """
    total = rounds + _SKIPPED_ROUNDS
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    try:
        steps = dict(_steps(bench, arms, base=base, total=total))
        with bench.screen.phase("clock the arms in turn", total=total * len(arms)) as advance:
            for turn in range(total):
                # Another arm is first in every round, so that none is always after the same one.
                shift = turn % len(arms)
                for arm in (*arms[shift:], *arms[:shift]):
                    (record,) = next(steps[arm.name])
                    assert record is not None
                    if turn >= _SKIPPED_ROUNDS:
                        times[arm.name].append(record.step_time_s)
                    bench.stopping(advance)(1)
    finally:
        bench.clear()
    return times


def _steps(
    bench: Workbench, arms: Sequence[PlannedArm], *, base: Config, total: int
) -> Iterator[tuple[str, Iterator[list[StepRecord | None]]]]:
    """Yields the steps of each arm; all of them see the same batches."""
    begins = _trunk_layers(bench, arms, base=base, total=total)
    train = base.train.model_copy(update={"max_steps": total, "learning_rate": _RATE})
    for index, arm in enumerate(arms):
        changes = {"placement": arm.placement, "rank": arm.rank, "alpha": arm.alpha}
        config = base.model_copy(update={"lora": base.lora.model_copy(update=changes)})
        run = bench.new_run(config, plan=arm.plan, name=f"clock{index}", train=train)
        yield (
            arm.name,
            train_bundle(
                bench.base,
                [run],
                micro_batch_tokens=base.train.micro_batch_tokens,
                trunk=bench.trunk if begins[arm.name] else None,
                checkpointing=base.train.gradient_checkpointing,
                halved=_give_up,
            ),
        )


def _give_up(before: int, _after: int) -> None:
    # Smaller passes would be other steps than those of the runs.
    raise OutOfMemory(
        f"the arms beside each other: passes of {before} tokens do not fit; set {_LEFT_OUT}"
    )


def _trunk_layers(
    bench: Workbench, arms: Sequence[PlannedArm], *, base: Config, total: int
) -> Mapping[str, int]:
    """Returns where each arm's steps begin, as in its runs, after computing what lies below."""
    pays = trunk_pays(bench, base)
    layers: dict[str, int] = {}
    for arm in arms:
        lowest = lowest_layer(arm.plan, base=bench.base) if pays else 0
        layers[arm.name] = lowest if lowest and bench.base.has_trunk else 0
    wanted = sorted({layer for layer in layers.values() if layer})
    if not wanted:
        return layers
    open_trunk(bench, num_layers=len(wanted))
    if bench.trunk is None:
        return dict.fromkeys(layers, 0)
    order: DataOrder[Any] = DataOrder(
        bench.data.train, batch_size=base.train.batch_size, seed=base.seed
    )
    seen = {id(one): one for step in range(total) for one in order.batch(step)}
    for layer in wanted:
        fill_trunk(bench, list(seen.values()), layer=layer)
    return layers
