"""Memory and operations of the code that will run: the training loop, the scorer, the decoder.

Over fake tensors a trace is a prediction, over real ones a measurement, with the same accounting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loracle.config.run import Config
from loracle.data import Example
from loracle.data.records import Record
from loracle.engine.decode import Answering
from loracle.engine.evaluate import score_examples
from loracle.engine.train import train_bundle
from loracle.engine.train_state import TrainState, new_run
from loracle.forecast.op_costs import Work
from loracle.model.adapters import Adapter
from loracle.model.base import FrozenBase
from loracle.model.live_bytes import LiveBytes, Part


@dataclass(frozen=True)
class Trace:
    """Memory and operations of a stretch of code."""

    peak: int
    """Peak live bytes."""
    parts: Mapping[Part, int]
    """Bytes at the peak, by purpose."""
    rest: int
    """Bytes live afterwards."""
    work: Work
    """Operations counted."""


@dataclass(frozen=True)
class AnswersTrace:
    """Traces of decoding a batch."""

    first: Trace
    """The prompts' forward pass, which gives the first token of each answer."""
    last: Trace
    """The last token of each answer, with the cache at its largest."""


def synthetic_examples(lengths: Sequence[tuple[int, int]]) -> list[Example]:
    """Returns examples of the given (prompt, response) lengths in tokens; all tokens are alike."""
    record = Record(row=0, instruction="planned", input="", output="planned")
    return [
        Example(
            record=record, input_ids=(1,) * (prompt + response), num_prompt=prompt, truncated=False
        )
        for prompt, response in lengths
    ]


def trace_step(
    base: FrozenBase,
    *,
    adapter: Adapter,
    config: Config,
    examples: Sequence[Example],
    granule: int = 1,
    counts_work: bool = True,
) -> Trace:
    """Returns the trace of an optimizer step of a single run, any but its first.

    ``granule`` is that of `LiveBytes`. Without ``counts_work`` only memory is traced, which is
    faster.
    """
    train = config.train.model_copy(update={"max_steps": 1, "batch_size": len(examples)})
    trained = list(adapter.parameters.values())
    run = new_run(
        base,
        adapter=adapter,
        examples=list(examples),
        train=train,
        dropout=config.lora.dropout,
        seed=config.seed,
    )
    moments = _make_moments(run)
    live, work = _begin(base, adapter, granule=granule)
    if not counts_work:
        live.watch = None
    live.hold(moments, "optimizer")
    hooks = live.hold_gradients(trained)
    with live:
        steps = train_bundle(
            base,
            [run],
            micro_batch_tokens=train.micro_batch_tokens,
            checkpointing=train.gradient_checkpointing,
        )
        for _ in steps:
            pass
    for hook in hooks:
        hook.remove()
    return _trace(live, work)


def _make_moments(run: TrainState) -> list[torch.Tensor]:
    """Gives the optimizer the state that it has after a step; returns its tensors."""
    for parameter in run.adapter.parameters.values():
        run.optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return [moment for state in run.optimizer.state.values() for moment in state.values()]


def trace_scoring(
    base: FrozenBase,
    *,
    adapter: Adapter,
    examples: Sequence[Example],
    granule: int = 1,
) -> Trace:
    """Returns the trace of scoring the examples in one pass."""
    live, work = _begin(base, adapter, granule=granule)
    with live:
        score_examples(
            base,
            examples,
            adapter=None if adapter.plan.is_full else adapter.name,
            batch_tokens=sum(example.num_tokens for example in examples),
        )
    return _trace(live, work)


def trace_answers(
    base: FrozenBase,
    *,
    adapter: Adapter,
    num_prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    granule: int = 1,
) -> AnswersTrace:
    """Returns the traces of the first and the last token of a batch of answers.

    All prompts have ``prompt_tokens`` tokens and all answers ``new_tokens``.
    """
    live, first = _begin(base, adapter, granule=granule)
    name = None if adapter.plan.is_full else adapter.name
    answering = Answering(base, [(1,) * prompt_tokens] * num_prompts, adapters=[name])
    last = Work()
    with base.generating(()), live:
        answering.forward()
        beginning = _trace(live, first)
        live.watch = None
        answering.pretend_position(prompt_tokens + new_tokens - 1)
        live.forget_peak()
        live.watch = last.add
        answering.forward()
    return AnswersTrace(beginning, _trace(live, last))


def _begin(base: FrozenBase, adapter: Adapter, *, granule: int) -> tuple[LiveBytes, Work]:
    work = Work()
    live = LiveBytes(granule=granule, watch=work.add)
    live.hold(base.held_tensors(), "weights")
    live.hold(adapter.parameters.values(), "weights" if adapter.plan.is_full else "adapters")
    live.forget_peak()
    return live, work


def _trace(live: LiveBytes, work: Work) -> Trace:
    return Trace(live.peak_bytes, dict(live.parts_at_peak), live.live_bytes, work)
