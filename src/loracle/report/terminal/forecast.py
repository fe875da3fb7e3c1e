"""A plan for the terminal and as Markdown: memory by part, time, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loracle.forecast.fit import Fit
from loracle.forecast.predict import Phase, Prediction
from loracle.forecast.time_shares import Shares
from loracle.model.live_bytes import Part
from loracle.report.terminal.table import borderless
from loracle.report.text.markdown import markdown_paragraph, markdown_table, markdown_text
from loracle.report.text.numbers import NOT_MEASURED
from loracle.study.forecast import PlanReport
from loracle.text import in_words

_PARTS: tuple[Part, ...] = ("weights", "adapters", "gradients", "optimizer", "activations", "head")
_PHASES: dict[Phase, str] = {
    "train": "train",
    "evaluate": "eval",
    "generate": "answers",
    "measure": "measure",
}


def plan_report_view(report: PlanReport) -> RenderableType:
    """Returns the plan for the terminal, within 80 columns for names of usual length."""
    parts: list[RenderableType] = [Text("\n".join(_heading(report)))]
    for title, header, rows in _tables(report):
        parts += [Text(), _table(header, rows, title=title)]
    return Group(*parts, Text(), Text("\n".join(_footing(report))))


def plan_report_markdown(report: PlanReport) -> str:
    """Returns the plan as Markdown."""
    blocks = ["\n".join(map(markdown_paragraph, _heading(report)))]
    for title, header, rows in _tables(report):
        right = [False, *[True] * (len(header) - 1)]
        blocks += [f"**{markdown_text(title)}**"]
        blocks += ["\n".join(markdown_table(header, rows, right=right))]
    blocks += map(markdown_paragraph, _footing(report))
    return "\n\n".join(blocks) + "\n"


def _tables(report: PlanReport) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yields title, header and rows of each table."""
    parts = [*_PARTS, *(_PHASES[phase] for phase in _phases(report)), "fits"]
    yield "Peak memory, GiB", ["arm", *parts], _memory_rows(report)
    columns = ["arm", "trainable", "adapter MiB", "step", "epoch", "run", "runs"]
    yield "Size and time", columns, _time_rows(report)
    if isinstance(report.fit, Fit) and report.fit.changes:
        title = f"What each setting does to {report.fit.arm}, on top of those before (peak in GiB)"
        yield title, ["setting", "peak", "step"], _fit_rows(report.fit)


def _heading(report: PlanReport) -> list[str]:
    config, device = report.arms.config, report.target.device
    first = next(iter(report.predictions.values()))
    base = f"{first.dtype} + {first.quantization}" if first.quantization else first.dtype
    lengths = report.lengths
    return [
        (
            f"{report.arms.title}: {config.model} on {config.data.source}, "
            f"{config.train.max_steps} steps of {config.train.batch_size} examples, for "
            f"{device.name} ({device.memory_gib:.1f} GiB)"
        ),
        (
            f"base in {base}, passes of {first.micro_batch_tokens} tokens, gradient checkpointing "
            f"{'on' if first.checkpointing else 'off'}; examples of {lengths.tokens:.0f} tokens, "
            f"{lengths.num_records:,} of them ({lengths.basis})"
        ),
    ]


def _footing(report: PlanReport) -> list[str]:
    name, largest = max(report.predictions.items(), key=lambda item: item[1].peak_gib)
    runtime = largest.memory[largest.largest_phase].runtime_gib
    lines = [
        "Parts are those of training at its peak; train, eval, answers, measure (audit and merged "
        "latency): the peak of each phase"
        + (f", {runtime:.2f} GiB of the device's runtime included." if runtime else "."),
        f"The largest peak: {largest.peak_gib:.2f} GiB, {name}, {_PHASES[largest.largest_phase]}.",
        "Memory is that of a pass that fills its budget, traced from the code that runs, plus "
        "what the device keeps for itself."
        if report.target.device.is_gpu
        else "Memory is that of live tensors in a pass that fills its budget, traced from the "
        "code that runs; Python and libraries come on top.",
        f"Time: {report.target.basis}.",
        *_share_lines(report),
    ]
    if report.arms.stand_ins:
        lines.append(
            f"{', '.join(report.arms.stand_ins)}: its modules are chosen when the study runs; as "
            "many others stand in."
        )
    total = _study_seconds(report)
    if total is not None and sum(report.arms.num_runs.values()) > 1:
        lines.append(
            f"All {sum(report.arms.num_runs.values())} runs, one after another: {in_words(total)}."
        )
    all_fit = all(prediction.fits for prediction in report.predictions.values())
    if report.target.device.is_gpu and all_fit and len(report.predictions) > 1:
        together = min(prediction.num_together for prediction in report.predictions.values())
        lines.append(
            f"Memory holds {together} of these runs on one base at once; how many of them train "
            "together is measured when the study starts."
            if together > 1
            else "Memory holds one of these runs at a time."
        )
    if isinstance(report.fit, Fit):
        lines.append(_fit_words(report.fit, is_fitted=report.is_fitted))
    elif report.fit is not None:
        lines.append(report.fit)
    return lines


def _share_lines(report: PlanReport) -> list[str]:
    """Returns the share of validations in the arm whose run takes longest."""
    timed = {name: p.times for name, p in report.predictions.items() if p.times}
    if not timed:
        return []
    name, times = max(timed.items(), key=lambda item: item[1].run_s)
    shares = Shares(
        validation=times.validation_s,
        rest=times.training_s + times.answers_s,
        num_examples=report.lengths.num_validation(report.arms.config),
        num_validations=report.arms.config.num_validations,
    )
    training, answers = times.training_s / times.run_s, times.answers_s / times.run_s
    words = f"A run of {name}: training {training:.0%} of the time, answers {answers:.0%}"
    return [f"{words}, {shares.words()}."]


def _fit_words(fit: Fit, *, is_fitted: bool) -> str:
    if not fit.changes:
        return "Everything fits as configured."
    settings = " ".join(f"--set {override}" for override in fit.overrides)
    words = f"{'Fitted' if is_fitted else 'It fits'} with: {settings}"
    words += f" (at most {fit.peak_gib:.1f} GiB)."
    if "quantization" in fit.changes:
        words += " A base in 4 bits is another model; do not mix its results with others."
    return words


def _fit_rows(fit: Fit) -> list[list[str]]:
    """Returns the way from the given settings to those that fit."""
    return [
        [step.setting or "as given", f"{step.peak_gib:.2f}", _seconds(step.step_s)]
        for step in fit.steps
    ]


def _seconds(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.3g} s"


def _study_seconds(report: PlanReport) -> float | None:
    seconds = [
        count * times.run_s
        for name, count in report.arms.num_runs.items()
        if (times := report.predictions[name].times) is not None
    ]
    return sum(seconds) if len(seconds) == len(report.arms.num_runs) else None


def _memory_rows(report: PlanReport) -> list[list[str]]:
    return [
        [
            name,
            *(f"{prediction.memory['train'].parts.get(part, 0.0):.2f}" for part in _PARTS),
            *(_peak(prediction, phase) for phase in _phases(report)),
            "yes" if prediction.fits else "no",
        ]
        for name, prediction in report.predictions.items()
    ]


def _phases(report: PlanReport) -> list[Phase]:
    """Returns the phases that any arm has."""
    return [p for p in _PHASES if any(p in arm.memory for arm in report.predictions.values())]


def _peak(prediction: Prediction, phase: Phase) -> str:
    memory = prediction.memory.get(phase)
    return NOT_MEASURED if memory is None else f"{memory.total_gib:.2f}"


def _time_rows(report: PlanReport) -> list[list[str]]:
    rows = []
    for name, prediction in report.predictions.items():
        times = prediction.times
        rows.append(
            [
                name,
                f"{prediction.plan.trainable_params:,}",
                NOT_MEASURED if prediction.plan.is_full else f"{prediction.adapter_mib:.1f}",
                _seconds(times.step_s if times else None),
                in_words(times.epoch_s) if times else NOT_MEASURED,
                in_words(times.run_s) if times else NOT_MEASURED,
                str(report.arms.num_runs[name]),
            ]
        )
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str) -> Table:
    table = borderless(title=title)
    for place, column in enumerate(header):
        table.add_column(_SHORT.get(column, column), justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


_SHORT = {
    "weights": "wghts",
    "adapters": "adapt",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "answers": "answ",
    "measure": "meas",
}
"""Short titles on the terminal."""
