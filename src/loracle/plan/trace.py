"""The bytes of the real step: the loop that will train, over fake tensors or real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loracle.config import Config
from loracle.data import Example
from loracle.data.records import Record
from loracle.live_bytes import LiveBytes
from loracle.model.adapters import Adapter
from loracle.model.base import FrozenBase
from loracle.parts import Part
from loracle.train import new_run, train_bundle


@dataclass(frozen=True)
class StepBytes:
    """Live bytes of optimizer steps of one run alone."""

    peak: int
    """The most in any step but the first, whose optimizer state is still being made."""
    parts: Mapping[Part, int]
    """The peak by what it is for."""
    rest: int
    """What stays between steps: weights, adapters, optimizer state."""


def made_up_examples(lengths: Sequence[tuple[int, int]]) -> list[Example]:
    """Returns examples of these many prompt and response tokens; every token is the same."""
    record = Record(row=0, instruction="planned", input="", output="planned")
    return [
        Example(
            record=record, input_ids=(1,) * (prompt + response), num_prompt=prompt, truncated=False
        )
        for prompt, response in lengths
    ]


def trace_steps(
    base: FrozenBase,
    *,
    adapter: Adapter,
    config: Config,
    examples: Sequence[Example],
    granule: int = 1,
    num_steps: int = 2,
) -> StepBytes:
    """Returns the live bytes of ``num_steps`` steps, each over the same examples.

    Args:
        base: The base, real or pretended.
        adapter: What trains.
        config: The run's configuration.
        examples: One batch.
        granule: As of `LiveBytes`.
        num_steps: Steps taken; from the second on the optimizer has its state.
    """
    live = LiveBytes(granule=granule)
    train = config.train.model_copy(update={"max_steps": num_steps, "batch_size": len(examples)})
    trained = list(adapter.parameters.values())
    with live:
        live.hold((tensor for _, tensor in base.frozen_weights()), "weights")
        live.hold(trained, "weights" if adapter.plan.is_full else "adapters")
        hooks = live.hold_gradients(trained)
        run = new_run(
            base,
            adapter=adapter,
            examples=list(examples),
            train=train,
            dropout=config.lora.dropout,
            seed=config.seed,
        )
        for step, _ in enumerate(
            train_bundle(base, [run], micro_batch_tokens=train.micro_batch_tokens)
        ):
            if step == 0:
                live.forget_peak()
        found = StepBytes(live.peak_bytes, dict(live.parts_at_peak), live.live_bytes)
        for hook in hooks:
            hook.remove()
    return found
