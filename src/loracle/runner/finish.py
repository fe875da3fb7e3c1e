"""The end of a run: latency, saved weights, audit, result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loracle.engine.answers import Answer, TextScore, score_answers
from loracle.engine.evaluate import ExampleScore
from loracle.engine.latency import Latency
from loracle.engine.out_of_memory import free_memory, memory_faults
from loracle.model.adapters import save_adapter, save_tokenizer
from loracle.model.whole import WEIGHTS, save_whole
from loracle.records.files import disk_faults, plain_os_errors, to_json, write_durably
from loracle.records.names import (
    ADAPTER,
    ADAPTER_CARD,
    ADAPTER_WEIGHTS,
    ANSWERS,
    EXAMPLES,
    MEMORY,
    MODEL,
    RESULT,
)
from loracle.records.result import Audit
from loracle.records.signature import signature
from loracle.runner.active_run import ActiveRun
from loracle.runner.adapter_card import adapter_card
from loracle.runner.audit import audit_run, require_sound
from loracle.runner.criteria import repeats_of
from loracle.runner.evaluation import recorded_eval
from loracle.runner.probe import latency_of
from loracle.runner.result import Measured, build_result, example_rows
from loracle.sources.cache import sha256_file

_ONE_AT_A_TIME = (
    "it scores one example at a time on the base; free memory that other programs hold and go on "
    "with --resume, which keeps the training, or lower data.max_tokens"
)


def recorded_scores(run: ActiveRun, *, step: int, model: str) -> list[ExampleScore]:
    """Returns the scores of each example of a validation that was done."""
    row = recorded_eval(run.folder, step=step, model=model)
    assert row is not None, f"no validation of {model} at step {step}"
    return _scores(run, row)


def _scores(run: ActiveRun, row: Mapping[str, Any]) -> list[ExampleScore]:
    pairs = zip(run.shared.scored, row["nll_sum_nats"], strict=True)
    return [ExampleScore(example.num_targets, nll) for example, nll in pairs]


def recorded_validations(run: ActiveRun) -> dict[int, list[ExampleScore]]:
    """Returns the scores of every validation of the tuned model, by step."""
    return {row["step"]: _scores(run, row) for row in run.folder.evals() if row["model"] == "tuned"}


def recorded_answers(run: ActiveRun) -> dict[str, list[Answer]]:
    """Returns the greedy answers of base and tuned model; empty lists if there were no prompts."""
    if not run.shared.prompts:
        return {"base": [], "tuned": []}
    stored = run.folder.read_json(ANSWERS)
    return {model: [Answer(**answer) for answer in stored[model]] for model in stored}


def _text_score(run: ActiveRun, answers: Sequence[Answer]) -> TextScore | None:
    """Returns BLEU and chrF of the answers; None if there are none."""
    references = [example.record.output for example in run.shared.answered]
    if not answers:
        return None
    tokenizer = run.shared.bleu.tokenizer
    return score_answers(answers, references=references, tokenizer=tokenizer)


def measure_arm_latency(run: ActiveRun) -> Mapping[str, Latency | None]:
    """Returns the latency of the arm alone; full fine-tuning has none, its is the base's."""
    if run.prepared.plan.is_full:
        return dict.fromkeys(("base", "unmerged", "merged"))
    if run.probe is not None:
        return run.probe.latency
    return latency_of(run.shared, adapter=run.adapter_name)


def audit_weights(run: ActiveRun, *, digest_after: str) -> Audit:
    """Saves the trained weights and proves the run; see ``audit.Audit`` for the claims.

    ``digest_after`` is ``base.weights_digest()`` from after training.
    """
    shared = run.shared
    scores = recorded_scores(run, step=run.state.step, model="tuned")
    saved = _save(run)
    if run.prepared.plan.is_full:
        # The audit reads the model anew in the memory of these.
        run.state.optimizer.state.clear()
    examples = shared.scored[: run.config.audit.reload_examples]
    free_memory()
    with (
        shared.progress.phase(f"{run.label}audit", total=len(examples)) as advance,
        memory_faults(f"{run.prepared.name}: audit", remedy=_ONE_AT_A_TIME),
    ):
        return audit_run(
            shared.base,
            trained=run.state.adapter,
            saved=saved,
            model_folder=shared.model.path,
            digest_before=shared.identity.weights_sha256,
            digest_after=digest_after,
            examples=examples,
            scores=scores[: len(examples)],
            progress=shared.stopping(advance),
        )


def saved_weights(run: Path, *, is_full: bool) -> Path:
    """Returns the file of what a run trained: its adapter's, or the whole model's."""
    return run / MODEL / WEIGHTS if is_full else run / ADAPTER / ADAPTER_WEIGHTS


def _save(run: ActiveRun) -> Path:
    """Writes what was trained to ``adapter`` or ``model`` of the run's folder, and returns that.

    The adapter's files lie there whatever it is called on the base.
    """
    is_full = run.prepared.plan.is_full
    folder = saved_weights(run.folder.path, is_full=is_full).parent
    with disk_faults(folder), plain_os_errors():
        # If a file has that name, this says so; PEFT's own message does not.
        folder.mkdir(parents=True, exist_ok=True)
        if is_full:
            return save_whole(run.shared.base, folder=folder)
        written = save_adapter(run.shared.base, name=run.adapter_name, folder=folder)
        if written != folder:
            for file in written.iterdir():
                file.replace(folder / file.name)
            written.rmdir()
        save_tokenizer(run.shared.base, folder=folder)
    return folder


def finish_run(run: ActiveRun, *, latency: Mapping[str, Latency | None], audit: Audit) -> None:
    """Writes the result of a run that was measured and audited; "completed" is written last.

    Raises:
        AuditError: If a claim of the audit does not hold; the result then says so.
    """
    folder, shared, prepared, probe = run.folder, run.shared, run.prepared, run.probe
    line = signature(
        config=run.config,
        model=f"{run.config.model}@{shared.model.revision}",
        data=shared.data.fingerprint,
        placement=prepared.plan.placement,
        environment=run.environment,
    )
    base_scores = recorded_scores(run, step=0, model="base")
    validations = recorded_validations(run)
    tuned_scores = validations[run.state.step]
    answers = recorded_answers(run)
    weights = saved_weights(folder.path, is_full=prepared.plan.is_full)
    result = build_result(
        config=run.config,
        signature=line,
        environment=run.environment,
        arm=prepared.arm,
        plan=prepared.plan,
        train_examples=len(shared.data.train),
        data_warnings=shared.data.report["warnings"],
        measured=Measured(
            base_scores=base_scores,
            tuned_scores=tuned_scores,
            base_text=_text_score(run, answers["base"]),
            tuned_text=_text_score(run, answers["tuned"]),
            step_rows=folder.steps(),
            probed_rows=probe.step_rows if probe else None,
            trunk=shared.trunk.uses.get(prepared.trunk_layer) if shared.trunk else None,
            memory=probe.memory if probe else run.memory,
            latency=latency,
            audit=audit,
            adapter_sha256=sha256_file(weights),
            validations=validations,
        ),
        repeats=repeats_of(folder.path, signature=line),
    )
    rows = example_rows(
        shared.data.validation, base_scores=base_scores, tuned_scores=tuned_scores, answers=answers
    )
    folder.write_jsonl(EXAMPLES, rows)
    if not prepared.plan.is_full:
        card = adapter_card(result, config=run.config, plan=prepared.plan, base=shared.model)
        write_durably(folder.path / ADAPTER / ADAPTER_CARD, card.encode())
    folder.write_json(RESULT, to_json(result))
    for name in (ANSWERS, MEMORY):
        (folder.path / name).unlink(missing_ok=True)
    run.tracker.summarize(to_json(result))
    require_sound(audit)
    folder.set_status("completed", phase="done", step=run.state.step)
    run.result = result
    run.tracker.finish(0)
