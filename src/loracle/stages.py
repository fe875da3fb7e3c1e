"""The stages of a run besides training; each leaves its outcome in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from loracle.audit import Audit, audit_run
from loracle.durable import disk_faults, plain_os_errors
from loracle.evaluate import (
    Answer,
    ExampleScore,
    TextScore,
    answer_prompts,
    likelihood,
    score_answers,
    score_examples,
)
from loracle.measure import Latency, measure_latency
from loracle.model.adapters import save_adapter
from loracle.record import RunFolder
from loracle.screen import Advance
from loracle.session import ADAPTER, Session
from loracle.signals import StopRequest
from loracle.tracking import Tracker


def evaluate_if_due(session: Session, tracker: Tracker) -> None:
    """Scores the validation set if this step calls for it and it is not recorded yet."""
    step, every = session.run.step, session.config.eval.every_steps
    due = step == 0 or session.run.is_done or (every > 0 and step % every == 0)
    model = "base" if step == 0 else "tuned"
    if not due or recorded_eval(session.folder, step=step, model=model):
        return
    title = "validate the untuned base" if step == 0 else f"validate step {step}"
    with (
        session.screen.phase(title, total=len(session.scored)) as advance,
        session.memory.phase("evaluate"),
    ):
        scores = score_examples(
            session.base,
            session.scored,
            adapter=None if step == 0 else session.adapter.name,
            batch_tokens=session.config.eval.batch_tokens,
            progress=_checked(session.stop, advance),
        )
    found = likelihood(scores)
    row = {"step": step, "model": model, **asdict(found), "perplexity": found.perplexity}
    session.folder.append_eval({**row, "nll_sum_nats": [score.nll_sum_nats for score in scores]})
    tracker.log({f"validation/{key}": value for key, value in row.items()}, step=step)
    session.screen.notice(
        f"step {step}: validation loss {found.loss_nats_per_token:.4f} nats per token, "
        f"perplexity {found.perplexity:.3f} ({found.num_examples} examples)"
    )


def _checked(stop: StopRequest, advance: Advance) -> Callable[[int], None]:
    """Returns ``advance`` that also stops where the state is whole."""

    def progress(count: int) -> None:
        stop.check()
        advance(count)

    return progress


def recorded_eval(folder: RunFolder, *, step: int, model: str) -> dict[str, Any] | None:
    """Returns the row of a validation that was done, or None."""
    rows = (row for row in folder.evals() if row["step"] == step and row["model"] == model)
    return next(rows, None)


def recorded_scores(session: Session, *, step: int, model: str) -> list[ExampleScore]:
    """Returns the scores of each example of a validation that was done."""
    row = recorded_eval(session.folder, step=step, model=model)
    assert row is not None, f"no validation of {model} at step {step}"
    pairs = zip(session.scored, row["nll_sum_nats"], strict=True)
    return [ExampleScore(example.num_targets, nll) for example, nll in pairs]


def answer(session: Session) -> dict[str, list[Answer]]:
    """Returns the greedy answers of base and tuned model; empty lists if none are wanted."""
    examples = session.answered
    path = session.folder.path / "answers.json"
    if path.exists():
        kept = session.folder.read_json("answers.json")
        return {key: [Answer(**answer) for answer in kept[key]] for key in kept}
    answers: dict[str, list[Answer]] = {"base": [], "tuned": []}
    if not examples:
        return answers
    prompts = [example.input_ids[: example.num_prompt] for example in examples]
    for key, adapter in (("base", None), ("tuned", session.adapter.name)):
        with (
            session.screen.phase(f"answer ({key})", total=len(prompts)) as advance,
            session.memory.phase("generate"),
        ):
            answers[key] = answer_prompts(
                session.base,
                prompts,
                adapter=adapter,
                max_new_tokens=session.config.eval.max_new_tokens,
                batch_size=session.config.eval.generate_batch_size,
                progress=_checked(session.stop, advance),
            )
    session.folder.write_json(
        "answers.json", {key: [asdict(answer) for answer in answers[key]] for key in answers}
    )
    return answers


def text_score(session: Session, answers: Sequence[Answer]) -> TextScore | None:
    """Returns BLEU and chrF of the answers; None if there are none."""
    references = [example.record.output for example in session.answered]
    return score_answers(answers, references=references) if answers else None


def latency_of(session: Session) -> dict[str, Latency | None]:
    """Returns the latency of the three variants on the validation prompt of median length."""
    measure = session.config.measure
    if not measure.latency_trials:
        return dict.fromkeys(("base", "unmerged", "merged"))
    by_length = sorted(session.data.validation, key=lambda example: example.num_prompt)
    middle = by_length[len(by_length) // 2]
    with session.screen.phase("latency", total=3 * (measure.latency_trials + 1)) as advance:
        return measure_latency(
            session.base,
            middle.input_ids[: middle.num_prompt],
            adapter=session.adapter.name,
            new_tokens=measure.latency_new_tokens,
            trials=measure.latency_trials,
            progress=_checked(session.stop, advance),
        )


def audit_of(session: Session, scores: Sequence[ExampleScore]) -> Audit:
    """Saves the adapter and proves the run; see ``audit.Audit`` for the claims."""
    folder = session.folder.path / "adapter"
    with disk_faults(folder), plain_os_errors():
        saved = save_adapter(session.base, name=ADAPTER, folder=folder)
    examples = session.scored[: session.config.audit.reload_examples]
    with session.screen.phase("audit", total=len(examples)) as advance:
        return audit_run(
            session.base,
            adapter=session.adapter,
            saved=saved,
            model_folder=session.model.path,
            digest_before=session.frozen_digest,
            examples=examples,
            scores=scores[: len(examples)],
            progress=_checked(session.stop, advance),
        )
