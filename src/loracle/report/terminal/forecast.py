"""A forecast for the terminal and as Markdown: memory by part, time, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loracle.forecast.fit import Fit
from loracle.model.live_bytes import Part
from loracle.study.forecast import PlanReport
from loracle.text import in_words

_PARTS: tuple[Part, ...] = (
    "weights", "adapters", "gradients", "optimizer", "activations", "head"
)  # fmt: skip
_NONE = "n/a"


def plan_report_view(report: PlanReport) -> RenderableType:
    """Returns the forecast for the terminal, in 80 columns for names of usual length."""
    memory = _table(_memory_header(), _memory_rows(report), title="Peak memory, GiB")
    parts: list[RenderableType] = [Text("\n".join(_heading(report))), Text(), memory]
    parts += [Text(), _table(_time_header(), _time_rows(report), title="Size and time")]
    if rows := _fit_rows(report):
        parts += [Text(), _table(_FIT_HEADER, rows, title=_fit_title(report))]
    return Group(*parts, Text(), Text("\n".join(_footing(report))))


def plan_report_markdown(report: PlanReport) -> str:
    """Returns the forecast as Markdown."""
    blocks = [
        "\n".join(_heading(report)),
        "**Peak memory, GiB**",
        _markdown(_memory_header(), _memory_rows(report)),
        "**Size and time**",
        _markdown(_time_header(), _time_rows(report)),
    ]
    if rows := _fit_rows(report):
        blocks += [f"**{_fit_title(report)}**", _markdown(_FIT_HEADER, rows)]
    blocks.append("\n\n".join(_footing(report)))
    return "\n\n".join(blocks) + "\n"


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
    lines = [
        "Parts are those of training at its peak; train, eval, answers: the peak of each phase.",
        "Memory is the peak of a pass that fills its budget, traced from the code that runs, plus "
        "the device's runtime."
        if report.target.device.is_gpu
        else "Memory is the peak of live tensors in a pass that fills its budget, traced from the "
        "code that runs; Python and libraries are not included.",
        f"Time: {report.target.basis}.",
    ]
    if report.arms.stand_ins:
        lines.append(
            f"{', '.join(report.arms.stand_ins)}: its modules are chosen when the study runs; as "
            "many random ones stand in."
        )
    total = _study_seconds(report)
    if total is not None and sum(report.arms.num_runs.values()) > 1:
        lines.append(
            f"All {sum(report.arms.num_runs.values())} runs, one after another: {in_words(total)}."
        )
    if report.target.device.is_gpu and _all_fit(report) and len(report.predictions) > 1:
        together = min(arm.num_together for arm in report.predictions.values())
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


def _all_fit(report: PlanReport) -> bool:
    return all(prediction.fits for prediction in report.predictions.values())


def _fit_words(fit: Fit, *, is_fitted: bool) -> str:
    if not fit.changes:
        return "Everything fits as configured."
    settings = " ".join(f"--set {override}" for override in fit.overrides)
    words = f"{'Fitted' if is_fitted else 'It fits'} with: {settings}"
    words += f" (at most {fit.peak_gib:.1f} GiB)."
    if "quantization" in fit.changes:
        words += " A base in 4 bits is another model; do not mix its results with others."
    return words


_FIT_HEADER = ["setting", "peak", "step"]


def _fit_title(report: PlanReport) -> str:
    assert isinstance(report.fit, Fit)
    return f"What each setting does to {report.fit.arm}, on top of those before (peak in GiB)"


def _fit_rows(report: PlanReport) -> list[list[str]]:
    """Returns the steps from the settings given to those that fit; empty if nothing changes."""
    if not isinstance(report.fit, Fit) or not report.fit.changes:
        return []
    return [
        [
            step.setting or "as given",
            f"{step.peak_gib:.2f}",
            f"{step.step_s:.3g} s" if step.step_s is not None else _NONE,
        ]
        for step in report.fit.steps
    ]


def _study_seconds(report: PlanReport) -> float | None:
    total = 0.0
    for name, prediction in report.predictions.items():
        if prediction.times is None:
            return None
        total += report.arms.num_runs[name] * prediction.times.run_s
    return total


def _memory_header() -> list[str]:
    return ["arm", *_PARTS, "runtime", "train", "eval", "answers", "fits"]


def _memory_rows(report: PlanReport) -> list[list[str]]:
    return [
        [
            name,
            *(f"{prediction.memory['train'].parts.get(part, 0.0):.2f}" for part in _PARTS),
            f"{prediction.memory['train'].runtime_gib:.2f}",
            *(f"{phase.total_gib:.2f}" for phase in prediction.memory.values()),
            "yes" if prediction.fits else "no",
        ]
        for name, prediction in report.predictions.items()
    ]


def _time_header() -> list[str]:
    return ["arm", "trainable", "adapter MiB", "step", "epoch", "run", "runs"]


def _time_rows(report: PlanReport) -> list[list[str]]:
    rows = []
    for name, prediction in report.predictions.items():
        times = prediction.times
        rows.append(
            [
                name,
                f"{prediction.plan.trainable_params:,}",
                _NONE if prediction.plan.is_full else f"{prediction.adapter_mib:.1f}",
                f"{times.step_s:.3g} s" if times else _NONE,
                in_words(times.epoch_s) if times else _NONE,
                in_words(times.run_s) if times else _NONE,
                str(report.arms.num_runs[name]),
            ]
        )
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=title,
        title_justify="left",
        title_style="bold",
    )
    for index, column in enumerate(header):
        table.add_column(_SHORT.get(column, column), justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


_SHORT = {
    "weights": "wghts",
    "adapters": "adapt",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "runtime": "rt",
    "answers": "answ",
}
"""Short titles of columns that would be wider than their numbers."""


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, marks, *rows))
