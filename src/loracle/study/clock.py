"""Step times of a study's arms, measured in turn, because the runs' own clocks are not comparable.

Runs of a study are hours apart, and the speed of a shared machine varies from hour to hour. Here
every arm takes a step over the same batch before any takes the next one, so that a slow minute
slows all of them, and times are compared batch by batch. The adapters are discarded afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from loracle.config.run import Config
from loracle.engine.determinism import determinism
from loracle.engine.device import choose_device, choose_dtype, faster_fp32, keep_large_blocks
from loracle.engine.out_of_memory import memory_faults
from loracle.engine.train import StepRecord
from loracle.errors import OutOfMemory
from loracle.records.files import read_json
from loracle.records.names import CLOCK, ENVIRONMENT, run_folder
from loracle.records.signature import environment_differences
from loracle.records.study_folder import write_clock
from loracle.runner.probe import scratch_run
from loracle.runner.progress import Progress
from loracle.runner.same_inputs import require_same_base
from loracle.runner.shared_base import SharedBase, open_shared_base
from loracle.runner.signals import StopRequest
from loracle.runner.trunk import examples_seen
from loracle.study.plan import PlannedArm, StudyPlan

_SKIPPED_ROUNDS = 1
_LEFT_OUT = "measure.clock_rounds=0"


def keep_clock(plan: StudyPlan, *, out: Path, progress: Progress | None = None) -> bool:
    """Measures the arms' step times in turn, unless done before; returns whether there are any.

    Full fine-tuning is left out: it does not share the base.

    Args:
        plan: The study.
        out: Its folder.
        progress: Defaults to standard error.

    Raises:
        UsageError: If a source cannot be used.
        Interrupted: On SIGINT, SIGTERM or SIGHUP; the measurement restarts next time.
    """
    rounds = plan.base.measure.clock_rounds
    arms = [arm for arm in plan.arms if not arm.plan.is_full]
    if rounds == 0 or len(arms) < 2:
        return False
    progress = progress or Progress()
    if not _is_needed(plan, out=out, arms=arms):
        return True
    keep_large_blocks()
    device = choose_device(plan.base.device)
    dtype = choose_dtype(plan.base.dtype, device=device)
    with (
        StopRequest() as stop,
        faster_fp32(device, dtype),
        determinism(device, requested=plan.base.deterministic),
    ):
        shared = open_shared_base(plan.base, progress=progress, stop=stop)
        folders = [run_folder(out, run.id) for run in plan.runs]
        begun = [folder for folder in folders if (folder / ENVIRONMENT).is_file()]
        require_same_base(begun, now=shared.environment, notice=progress.notice)
        try:
            with memory_faults("the arms beside each other", remedy=f"set {_LEFT_OUT}"):
                times = clock_arms(shared, arms, base=plan.base, rounds=rounds)
        except OutOfMemory as error:
            progress.notice(f"not clocked in turn: {error}")
            return False
    found = {
        "schema": 1,
        "rounds": rounds,
        "environment": shared.environment,
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
    first = run_folder(out, plan.runs[0].id) / ENVIRONMENT
    return first.is_file() and bool(environment_differences(read_json(first), kept["environment"]))


def clock_arms(
    shared: SharedBase, arms: Sequence[PlannedArm], *, base: Config, rounds: int
) -> dict[str, list[float]]:
    """Returns the step times of each arm, one per round, in seconds.

    Args:
        shared: The base and its data, without adapters; they are left so.
        arms: Placements on it.
        base: What the study's runs share.
        rounds: Steps of each arm that count.
    """
    total = rounds + _SKIPPED_ROUNDS
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    try:
        steps = _steps(shared, arms, base=base, total=total)
        with shared.progress.phase("clock the arms in turn", total=total * len(arms)) as advance:
            for turn in range(total):
                # Another arm is first in every round, so that none is always after the same one.
                shift = turn % len(arms)
                for arm in (*arms[shift:], *arms[:shift]):
                    record = next(steps[arm.name])
                    if turn >= _SKIPPED_ROUNDS:
                        times[arm.name].append(record.step_time_s)
                    shared.stopping(advance)(1)
    finally:
        shared.clear()
    return times


def _steps(
    shared: SharedBase, arms: Sequence[PlannedArm], *, base: Config, total: int
) -> dict[str, Iterator[StepRecord]]:
    """Returns the steps of each arm, which begin as in its runs; all see the same batches."""
    layers = shared.open_trunk([(base, arm.plan) for arm in arms])
    examples = examples_seen(base, train=shared.data.train, steps=total)
    shared.fill_trunk(examples, layers=layers)
    steps = {}
    for index, (arm, layer) in enumerate(zip(arms, layers, strict=True)):
        changes = {"placement": arm.placement, "rank": arm.rank, "alpha": arm.alpha}
        _, steps[arm.name] = scratch_run(
            shared,
            config=base.model_copy(update={"lora": base.lora.model_copy(update=changes)}),
            plan=arm.plan,
            num_steps=total,
            name=f"clock{index}",
            with_trunk=layer > 0,
            halved=_give_up,
        )
    return steps


def _give_up(before: int, _after: int) -> None:
    # Smaller passes would be other steps than those of the runs.
    raise OutOfMemory(
        f"the arms beside each other: passes of {before} tokens do not fit; set {_LEFT_OUT}"
    )
