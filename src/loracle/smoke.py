"""Everything a run will do, once and small, before its first real step.

A run that would fail when it first saves, answers or scores fails here instead, minutes after its
start and not hours.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from loracle.config import Config
from loracle.evaluate import answer_prompts
from loracle.isolated import score_one_batch
from loracle.memory_limit import memory_faults
from loracle.model.adapters import save_adapter
from loracle.placement import ModulePlan
from loracle.train import train_bundle
from loracle.workbench import Workbench

_SCRATCH = "default"
_STEPS = 2
# assumed: so small that a scratch adapter stays where it began
_RATE = 1e-9
_NEW_TOKENS = 2


def smoke(bench: Workbench, *, config: Config, plan: ModulePlan) -> None:
    """Takes two steps, scores the longest batch, answers a batch of prompts, and saves.

    The base must be, and is left, without adapters.

    Args:
        bench: The base and its data.
        config: A run's configuration; of ``train``, the rate and the number of steps are ours.
        plan: Its modules.

    Raises:
        OutOfMemory: If something does not fit.
        NonFiniteError: If a loss or gradient is NaN or infinite.
    """
    train = config.train.model_copy(update={"max_steps": _STEPS, "learning_rate": _RATE})
    try:
        run = bench.new_run(config, plan=plan, name=_SCRATCH, train=train)
        with (
            bench.screen.phase("smoke test", total=_STEPS + 3) as advance,
            memory_faults("smoke test", remedy="`loracle plan` says what fits"),
        ):
            done = bench.stopping(advance)
            for _ in train_bundle(
                bench.base,
                [run],
                micro_batch_tokens=config.train.micro_batch_tokens,
                checkpointing=config.train.gradient_checkpointing,
            ):
                done(1)
            score_one_batch(bench, adapter=_SCRATCH)
            done(1)
            if prompts := bench.prompts[: config.eval.generate_batch_size]:
                answer_prompts(bench.base, prompts, adapter=_SCRATCH, max_new_tokens=_NEW_TOKENS)
            done(1)
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(bench.base, name=_SCRATCH, folder=Path(folder))
            done(1)
    finally:
        bench.clear()
