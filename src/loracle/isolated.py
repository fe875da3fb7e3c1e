"""What an arm costs with nothing beside it, measured in a few steps that leave no trace.

In a bundle a step's time and memory belong to all of its runs. So each arm of a bundle is clocked
alone, on a scratch adapter with its plan, before the bundle begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loracle.config import Config
from loracle.data import Example
from loracle.data.packing import batches_by_tokens
from loracle.evaluate import score_examples
from loracle.measure import Latency, MemoryMeter, measure_latency
from loracle.placement import ModulePlan
from loracle.step_tensors import StepTensors
from loracle.train import train_bundle
from loracle.training_run import TrainingRun
from loracle.workbench import Workbench

_SCRATCH = "default"
# assumed: small enough that the scratch adapter stays where it began, whatever the run's rate
_RATE = 1e-9


@dataclass(frozen=True)
class Isolated:
    """What an arm costs alone."""

    step_rows: Sequence[Mapping[str, Any]]
    """Step records, each with ``clocked``."""
    memory: MemoryMeter
    """Peaks of training and of one validation pass."""
    latency: Mapping[str, Latency | None]


def num_probed_steps(config: Config) -> int:
    """Returns the steps that a probe takes, those before the clock starts included."""
    return config.measure.skip_steps + config.measure.probe_steps


def measure_alone(
    bench: Workbench, *, config: Config, plan: ModulePlan, with_trunk: bool
) -> Isolated:
    """Returns what a run of this arm costs alone. The base must be, and is left, without adapters.

    Args:
        bench: The base and its data.
        config: The run's configuration; of ``train``, the rate and the number of steps are ours.
        plan: Its modules.
        with_trunk: Steps begin from kept hidden states.
    """
    memory = bench.meter()
    run = _scratch_run(bench, config=config, plan=plan)
    title = f"measure {plan.placement} alone"
    try:
        with bench.screen.phase(title, total=run.train.max_steps) as advance:
            rows = []
            bundle = train_bundle(
                bench.base,
                [run],
                micro_batch_tokens=config.train.micro_batch_tokens,
                trunk=bench.trunk if with_trunk else None,
                checkpointing=config.train.gradient_checkpointing,
            )
            counted = StepTensors(
                bench.base, run, memory=memory, num_steps=config.measure.skip_steps
            )
            while run.is_active:
                with memory.phase("train"), counted.step():
                    (record,) = next(bundle)
                assert record is not None
                rows.append({**asdict(record), "clocked": run.step > config.measure.skip_steps})
                bench.stopping(advance)(1)
        with memory.phase("evaluate"):
            score_one_batch(bench, adapter=_SCRATCH)
        return Isolated(rows, memory, latency_of(bench, adapter=_SCRATCH))
    finally:
        bench.clear()


def _scratch_run(bench: Workbench, *, config: Config, plan: ModulePlan) -> TrainingRun:
    changes = {"max_steps": num_probed_steps(config), "learning_rate": _RATE}
    train = config.train.model_copy(update=changes)
    return bench.new_run(config, plan=plan, name=_SCRATCH, train=train)


def score_one_batch(bench: Workbench, *, adapter: str) -> None:
    """Scores the longest batch of a validation, which is where it needs most memory."""
    by_length: list[Example] = sorted(bench.scored, key=lambda example: example.num_tokens)
    budget = bench.config.eval.batch_tokens
    *_, last = batches_by_tokens([each.num_tokens for each in by_length], budget=budget)
    longest = [by_length[place] for place in last]
    score_examples(bench.base, longest, adapter=adapter, batch_tokens=budget)


def latency_of(bench: Workbench, *, adapter: str) -> dict[str, Latency | None]:
    """Returns the latency of the three variants on the validation prompt of median length."""
    measure = bench.config.measure
    if not measure.latency_trials:
        return dict.fromkeys(("base", "unmerged", "merged"))
    by_length = sorted(bench.data.validation, key=lambda example: example.num_prompt)
    middle = by_length[len(by_length) // 2]
    with bench.screen.phase("latency", total=3 * (measure.latency_trials + 1)) as advance:
        return measure_latency(
            bench.base,
            middle.input_ids[: middle.num_prompt],
            adapter=adapter,
            new_tokens=measure.latency_new_tokens,
            trials=measure.latency_trials,
            progress=bench.stopping(advance),
        )
