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
from loracle.model.layers.lora import RoutedLinear
from loracle.model.layers.routing import Route
from loracle.model.live_bytes import LiveBytes, Part
from loracle.model.reach import require_gradients


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

    Raises:
        ModelError: If the step gives no gradient to a module that it should train.
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
    reached: set[int] = set()
    hooks += [
        parameter.register_post_accumulate_grad_hook(lambda found: reached.add(id(found)))
        for parameter in trained
    ]
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
    if not adapter.plan.is_full:
        idle = [key for key, found in adapter.parameters.items() if id(found) not in reached]
        require_gradients(
            base, idle=[key for key in idle if key.endswith(".lora_B")], plan=adapter.plan
        )
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


def trace_measuring(base: FrozenBase, *, adapter: Adapter, longest: int, granule: int = 1) -> Trace:
    """Returns the trace of a run's audit, and of merging its adapter for a latency.

    The audit scores an example of ``longest`` tokens with a second copy of the adapter on the same
    base, by stock logits of all its tokens. Merging makes one layer's weight at a time anew.
    """
    moments = [
        torch.zeros_like(parameter) for parameter in adapter.parameters.values() for _ in range(3)
    ]
    live, work = _begin(base, adapter, granule=granule)
    live.hold(moments[::3], "adapters")
    live.hold((moment for i, moment in enumerate(moments) if i % 3), "optimizer")
    ids = torch.ones(1, longest, dtype=torch.int64, device=base.device)
    with base.generating((Route(adapter.name),)) as model, live:
        logits = model(input_ids=ids).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        del logits
        if base.quantization is None:
            _merge_largest(base, adapter)
    return _trace(live, work)


def _merge_largest(base: FrozenBase, adapter: Adapter) -> None:
    """Makes the merged weight of the largest adapted layer, as a latency of it needs."""
    layers = [base.model.get_submodule(module.name) for module in adapter.plan.modules]
    adapted = [layer for layer in layers if isinstance(layer, RoutedLinear)]
    largest = max(adapted, key=lambda layer: layer.get_base_layer().weight.numel())
    weight = largest.get_base_layer().weight.detach()
    (weight.float() + largest.get_delta_weight(adapter.name)).to(weight.dtype)


def _begin(base: FrozenBase, adapter: Adapter, *, granule: int) -> tuple[LiveBytes, Work]:
    work = Work()
    live = LiveBytes(granule=granule, watch=work.add)
    live.hold(base.held_tensors(), "weights")
    live.hold(adapter.parameters.values(), "weights" if adapter.plan.is_full else "adapters")
    live.forget_peak()
    return live, work


def _trace(live: LiveBytes, work: Work) -> Trace:
    return Trace(live.peak_bytes, dict(live.parts_at_peak), live.live_bytes, work)
