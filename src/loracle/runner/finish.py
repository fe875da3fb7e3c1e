"""The end of a run: scores, latency, audit, saved adapter, result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loracle.engine.evaluate import (
    Answer,
    ExampleScore,
    TextScore,
    score_answers,
)
from loracle.engine.measure import Latency
from loracle.model.adapters import save_adapter
from loracle.model.whole import WEIGHTS, save_whole
from loracle.placement import ModulePlan
from loracle.records.files import disk_faults, plain_os_errors, to_json
from loracle.records.result import Audit
from loracle.runner.active_run import (
    MEMORY,
    Session,
)
from loracle.runner.audit import audit_run, audit_whole, require_sound
from loracle.runner.criteria import repeats_of
from loracle.runner.evaluation import recorded_eval
from loracle.runner.probe import latency_of
from loracle.runner.result import Measured, build_result, example_rows
from loracle.sources.cache import sha256_file


def recorded_scores(session: Session, *, step: int, model: str) -> list[ExampleScore]:
    """Returns the scores of each example of a validation that was done."""
    row = recorded_eval(session.folder, step=step, model=model)
    assert row is not None, f"no validation of {model} at step {step}"
    pairs = zip(session.bench.scored, row["nll_sum_nats"], strict=True)
    return [ExampleScore(example.num_targets, nll) for example, nll in pairs]


def recorded_answers(session: Session) -> dict[str, list[Answer]]:
    """Returns the greedy answers of base and tuned model; empty lists if none were wanted."""
    if not session.bench.prompts:
        return {"base": [], "tuned": []}
    kept = session.folder.read_json("answers.json")
    return {key: [Answer(**answer) for answer in kept[key]] for key in kept}


def text_score(session: Session, answers: Sequence[Answer]) -> TextScore | None:
    """Returns BLEU and chrF of the answers; None if there are none."""
    references = [example.record.output for example in session.bench.answered]
    return score_answers(answers, references=references) if answers else None


def session_latency(session: Session) -> dict[str, Latency | None]:
    """Returns the latency of the arm alone; of full fine-tuning none, it is the base's."""
    if session.plan.is_full:
        return dict.fromkeys(("base", "unmerged", "merged"))
    if session.isolated is not None:
        return dict(session.isolated.latency)
    return latency_of(session.bench, adapter=session.adapter.name)


def audit_of(session: Session, scores: Sequence[ExampleScore], *, digest_after: str) -> Audit:
    """Saves the adapter and proves the run; see ``audit.Audit`` for the claims.

    Args:
        session: The run, trained.
        scores: Its final scores.
        digest_after: ``base.weights_digest()`` from after training.
    """
    bench = session.bench
    saved = _save(session)
    examples = bench.scored[: session.config.audit.reload_examples]
    with bench.screen.phase(f"{session.label}audit", total=len(examples)) as advance:
        given: dict[str, Any] = {
            "saved": saved,
            "model_folder": bench.model.path,
            "examples": examples,
            "scores": scores[: len(examples)],
            "progress": bench.stopping(advance),
        }
        if session.plan.is_full:
            return audit_whole(bench.base, trained=session.adapter, **given)
        return audit_run(
            bench.base,
            adapter=session.adapter,
            digest_before=bench.weights_digest,
            digest_after=digest_after,
            **given,
        )


def saved_weights(run: Path, *, plan: ModulePlan) -> Path:
    """Returns the file of what a run trained: its adapter's, or the whole model's."""
    if plan.is_full:
        return run / "model" / WEIGHTS
    return run / "adapter" / "adapter_model.safetensors"


def _save(session: Session) -> Path:
    """Writes what was trained to ``adapter`` or ``model`` of the run's folder, and returns that.

    The adapter's files lie there whatever it is called on the base.
    """
    folder = saved_weights(session.folder.path, plan=session.plan).parent
    with disk_faults(folder), plain_os_errors():
        if session.plan.is_full:
            return save_whole(session.bench.base, folder=folder)
        written = save_adapter(session.bench.base, name=session.adapter.name, folder=folder)
        if written != folder:
            for file in written.iterdir():
                file.replace(folder / file.name)
            written.rmdir()
    return folder


def conclude(session: Session, *, digest_after: str) -> None:
    """Measures, audits and records a run that has trained and answered."""
    folder, bench = session.folder, session.bench
    base_scores = recorded_scores(session, step=0, model="base")
    tuned_scores = recorded_scores(session, step=session.run.step, model="tuned")
    answers = recorded_answers(session)
    latency = session_latency(session)
    audit = audit_of(session, tuned_scores, digest_after=digest_after)
    isolated = session.isolated
    measured = Measured(
        base_scores=base_scores,
        tuned_scores=tuned_scores,
        base_text=text_score(session, answers["base"]),
        tuned_text=text_score(session, answers["tuned"]),
        step_rows=folder.steps(),
        probed_rows=isolated.step_rows if isolated else None,
        trunk=session.trunk,
        memory=isolated.memory if isolated else session.memory,
        latency=latency,
        audit=audit,
        adapter_sha256=sha256_file(saved_weights(folder.path, plan=session.plan)),
    )
    result = build_result(
        config=session.config,
        signature=session.signature,
        environment=session.environment,
        arm=session.arm,
        plan=session.plan,
        train_examples=len(bench.data.train),
        measured=measured,
        repeats=repeats_of(folder.path, signature=session.signature),
    )
    rows = example_rows(
        bench.data.validation, base_scores=base_scores, tuned_scores=tuned_scores, answers=answers
    )
    folder.write_jsonl("examples.jsonl", rows)
    folder.write_result(result)
    for name in ("answers.json", MEMORY):
        (folder.path / name).unlink(missing_ok=True)
    session.tracker.summarize(to_json(result))
    require_sound(audit)
    folder.set_status("completed", phase="done", step=session.run.step)
    session.result = result
    session.tracker.finish(0)
