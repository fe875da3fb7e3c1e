"""Rows of the files that hold one JSON object per line."""

from __future__ import annotations

from typing import Literal, TypedDict


class StepRow(TypedDict):
    """``steps.jsonl``: one optimizer step."""

    step: int
    """From 1."""
    epoch: float
    loss_nats_per_token: float
    """Training loss, before the step."""
    learning_rate: float
    grad_norm: float
    """L2 norm before clipping."""
    num_tokens: int
    num_targets: int
    step_time_s: float
    clocked: bool
    """The step counts in the median time."""


class EvalRow(TypedDict):
    """``evals.jsonl``: one validation."""

    step: int
    """Steps taken before it."""
    model: Literal["base", "tuned"]
    loss_nats_per_token: float
    num_targets: int
    num_examples: int
    perplexity: float | None
    """None: beyond the largest number."""
    nll_sum_nats: list[float]
    """By example."""


class ExampleRow(TypedDict):
    """``examples.jsonl``: one validation example, scored, answered or both; else None."""

    row: int
    """In the data source."""
    instruction: str
    input: str
    reference: str
    tokens: int
    """Target tokens, EOS included."""
    nll_sum_nats: float | None
    base_nll_sum_nats: float | None
    """By the untuned model."""
    generated: str | None
    """Greedy answer."""
    base_generated: str | None
    hit_limit: bool | None
    """The answer was cut at the token limit."""
    base_hit_limit: bool | None
