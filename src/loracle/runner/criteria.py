"""The four success criteria of the baseline, each with a sentence of evidence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loracle.engine.evaluate import ExampleScore, likelihood
from loracle.engine.measure import Parameters
from loracle.records.files import read_jsonl
from loracle.records.find_runs import sound_results
from loracle.records.names import STEPS
from loracle.records.result import Criterion

_PARTS = 5
# assumed: "significantly fewer" in the sense of the plan is at least ten times fewer
_FEW = 0.1
# assumed: runs whose validation losses agree within 0.1 % are consistent
_CONSISTENT = 1e-3


def convergence(losses: Sequence[float]) -> Criterion:
    """Returns whether the training loss decreased consistently.

    Single steps see different examples, so the losses (nats per target token, one per step) are
    averaged over five equal parts of the run: the last must be below the first by two standard
    errors of their difference, and the trend over the parts must point down.
    """
    if len(losses) < 2 * _PARTS:
        return Criterion(None, f"{len(losses)} steps are too few to tell (at least {2 * _PARTS}).")
    size = len(losses) // _PARTS
    parts = [losses[k * size : (k + 1) * size] for k in range(_PARTS - 1)]
    parts.append(losses[(_PARTS - 1) * size :])
    means = [statistics.fmean(part) for part in parts]
    error = sum(statistics.variance(parts[k]) / len(parts[k]) for k in (0, -1)) ** 0.5
    slope = statistics.linear_regression(range(_PARTS), means).slope
    fell = means[0] - means[-1]
    trail = " -> ".join(f"{mean:.3f}" for mean in means)
    return Criterion(
        fell > 2 * error and slope < 0,
        f"Training loss by fifths of {len(losses)} steps: {trail} nats per token "
        f"(fell by {fell:.3f}, standard error {error:.3f}).",
    )


def validation(base: Sequence[ExampleScore], tuned: Sequence[ExampleScore]) -> Criterion:
    """Returns whether held-out perplexity improved over the untuned model."""
    before, after = likelihood(base), likelihood(tuned)
    better = sum(t.nll_sum_nats < b.nll_sum_nats for b, t in zip(base, tuned, strict=True))
    return Criterion(
        after.perplexity < before.perplexity,
        f"Perplexity {before.perplexity:.3f} -> {after.perplexity:.3f} "
        f"({after.perplexity / before.perplexity - 1:+.1%}) on {after.num_examples} held-out "
        f"examples, {after.num_targets:,} tokens; better on {better} of them.",
    )


def efficiency(parameters: Parameters) -> Criterion:
    """Returns whether far fewer parameters train than in full fine-tuning."""
    frac = parameters.trainable / parameters.base
    return Criterion(
        frac < _FEW,
        f"{parameters.trainable:,} parameters train, {frac:.2%} of the {parameters.base:,} "
        f"of full fine-tuning.",
    )


@dataclass(frozen=True)
class Repeat:
    """The part of a run that repeats of one signature are compared by."""

    name: str
    """Folder of the run."""
    adapter_sha256: str
    losses: tuple[float, ...]
    """Training loss of each step, nats per token."""
    final_loss_nats_per_token: float


def reproducibility(this: Repeat, *, others: Sequence[Repeat]) -> Criterion:
    """Returns whether the same run gave the same result before; None without a repeat."""
    if not others:
        return Criterion(None, "No other run with this signature yet; run it again to tell.")
    exact = [
        other
        for other in others
        if other.adapter_sha256 == this.adapter_sha256 and other.losses == this.losses
    ]
    loss = this.final_loss_nats_per_token
    gap = max(abs(other.final_loss_nats_per_token - loss) / loss for other in others)
    if len(exact) == len(others):
        evidence = (
            f"Bit-identical adapter and losses in {len(others)} earlier run(s) of this signature "
            f"(sha256 {this.adapter_sha256[:12]}), latest {others[-1].name}."
        )
    else:
        evidence = (
            f"{len(exact)} of {len(others)} earlier run(s) of this signature are bit-identical; "
            f"validation losses differ by at most {gap:.2e} relative."
        )
    return Criterion(gap <= _CONSISTENT, evidence)


def repeats_of(run: Path, *, signature: str) -> list[Repeat]:
    """Returns the finished runs with this signature beside the folder ``run``."""
    return [
        Repeat(
            name=path.name,
            adapter_sha256=result.adapter_sha256,
            losses=tuple(row["loss_nats_per_token"] for row in read_jsonl(path / STEPS)),
            final_loss_nats_per_token=result.quality.tuned.loss_nats_per_token,
        )
        for path, result in sound_results(run.parent)
        if path != run and result.signature == signature
    ]
