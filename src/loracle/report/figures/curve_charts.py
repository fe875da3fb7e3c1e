"""The panels of the losses: training, training beside the reference, validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loracle.records.study_folder import StudyRecord
from loracle.report.figures.curves import Curves, loss_curves, validation_curves
from loracle.report.figures.palette import Look, arm_scale
from loracle.report.figures.vega import Figure, Rows, Spec, category, missing, quantity, values

_WIDTH_PX, _HEIGHT_PX = 560, 300
# Which arms are shown; named with its layer, because each layer would define it once more.
_PICKED: Spec = {
    "name": "picked",
    "select": {"type": "point", "fields": ["arm"], "toggle": "true"},
    "bind": "legend",
    "views": ["lines"],
}
_NAMES = {
    "loss-training": "Training loss",
    "loss-gap": "Training loss beside the reference",
    "loss-validation": "Validation loss",
}


def loss_figures(study: StudyRecord, *, looks: Mapping[str, Look]) -> list[Figure]:
    """Returns the three panels of the losses."""
    curves = loss_curves(study)
    return [
        _training(curves, looks=looks),
        _gap(curves, reference=study.reference, looks=looks),
        _validation(study, looks=looks),
    ]


def _training(curves: Curves | None, *, looks: Mapping[str, Look]) -> Figure:
    name = "loss-training"
    if curves is None:
        return missing(name, _NAMES[name], why="No completed run recorded the loss of a step.")
    title = "training loss, nats per token"
    stride = curves.stride_steps
    faint = (
        "single steps, mean over seeds"
        if stride == 1
        else f"means of {stride} consecutive steps over seeds"
    )
    raw: Spec = {
        "data": values(curves.raw),
        "mark": {"type": "line", "strokeWidth": 0.7},
        "encoding": {
            **_step_and_loss(title),
            "color": _colour(looks),
            "opacity": _where_shown(0.22, 0.0),
        },
    }
    return Figure(
        name,
        _NAMES[name],
        caption=f"Lines: running mean over {curves.window_steps} steps, then mean over seeds. "
        f"{_band(curves.smooth)} Faint: {faint}. "
        "Arms see the same batches, so their noise is shared.",
        spec=_panel([*_band_layers(curves.smooth, title, looks), raw], curves.smooth, title, looks),
    )


def _gap(curves: Curves | None, *, reference: str, looks: Mapping[str, Look]) -> Figure:
    name = "loss-gap"
    if curves is None or not curves.gaps:
        return missing(name, _NAMES[name], why=f"No arm shares a seed with {reference}.")
    title = f"training loss minus {reference}'s, nats per token"
    others = {arm: look for arm, look in looks.items() if arm != reference}
    zero: Spec = {
        "data": {"values": [{"loss": 0}]},
        "mark": {"type": "rule", "strokeWidth": 1.2},
        "encoding": {"y": quantity("loss", title)},
    }
    return Figure(
        name,
        _NAMES[name],
        caption=f"The difference on the same batch of the same seed, which removes the noise that "
        f"arms share: running mean over {curves.window_steps} steps. "
        f"{_band(curves.gaps)} Below zero: lower loss than {reference}.",
        spec=_panel([zero, *_band_layers(curves.gaps, title, others)], curves.gaps, title, others),
    )


def _validation(study: StudyRecord, *, looks: Mapping[str, Look]) -> Figure:
    name = "loss-validation"
    rows = validation_curves(study)
    if not rows:
        return missing(name, _NAMES[name], why="No completed run recorded a validation.")
    if len({row["step"] for row in rows}) == 1:
        why = "Every run was validated before and after training only: the tables have it."
        return missing(name, _NAMES[name], why=why)
    title = "validation loss, nats per token"
    untuned = study.runs[0].result.quality.base.loss_nats_per_token
    points: Spec = {
        "name": "points",
        "data": values(rows),
        "mark": {"type": "point", "filled": True, "size": 55},
        "encoding": {
            **_step_and_loss(title),
            "color": _colour(looks),
            "shape": category("arm", None, scale=arm_scale(looks, "shape"), legend=None),
            "opacity": _where_shown(1.0, 0.05),
            "tooltip": _tooltip(),
        },
    }
    return Figure(
        name,
        _NAMES[name],
        caption=f"All validation examples, token-weighted; mean over seeds. {_band(rows)} "
        f"Before training it was {untuned:.4f}.",
        spec={
            "width": _WIDTH_PX,
            "height": _HEIGHT_PX,
            "params": [_PICKED],
            "layer": [*_band_layers(rows, title, looks), _line(rows, title, looks), points],
        },
    )


def _panel(below: list[Spec], rows: Rows, title: str, looks: Mapping[str, Look]) -> Spec:
    """Returns a panel of lines over ``below``, with tooltips on top."""
    hover: Spec = {
        "name": "hover",
        "data": values(rows),
        "mark": {"type": "point", "size": 90, "opacity": 0, "filled": True},
        "encoding": {**_step_and_loss(title), "tooltip": _tooltip()},
    }
    return {
        "width": _WIDTH_PX,
        "height": _HEIGHT_PX,
        "params": [_PICKED],
        "layer": [*below, _line(rows, title, looks), hover],
    }


def _line(rows: Rows, title: str, looks: Mapping[str, Look]) -> Spec:
    """Returns the lines; clicks in their legend pick arms."""
    return {
        "name": "lines",
        "data": values(rows),
        "mark": {"type": "line", "strokeWidth": 1.8},
        "encoding": {
            **_step_and_loss(title),
            "color": _colour(looks),
            "strokeDash": category("arm", None, scale=arm_scale(looks, "dash")),
            "opacity": _where_shown(1.0, 0.05),
        },
    }


def _band_layers(rows: Rows, title: str, looks: Mapping[str, Look]) -> list[Spec]:
    if all(row["seeds"] < 2 for row in rows):
        return []
    step = _step_and_loss(title)["x"]
    return [
        {
            "data": values(rows),
            "mark": {"type": "area"},
            "encoding": {
                "x": step,
                "y": quantity("low", title, scale={"zero": False}),
                "y2": {"field": "high"},
                "color": _colour(looks),
                "opacity": _where_shown(0.1, 0.0),
            },
        }
    ]


def _band(rows: Rows) -> str:
    seeds = max(row["seeds"] for row in rows)
    return "Bands: lowest to highest over seeds." if seeds > 1 else "One seed: there is no band."


def _step_and_loss(title: str) -> dict[str, Any]:
    return {
        "x": quantity("step", "optimizer step", scale={"nice": False, "zero": True}),
        "y": quantity("loss", title, scale={"zero": False}),
    }


def _colour(looks: Mapping[str, Look]) -> Spec:
    # Lines as they are drawn, and opaque, though bands and single steps are faint.
    legend = {"symbolType": "stroke", "symbolStrokeWidth": 2, "symbolSize": 170}
    legend |= {"symbolOpacity": 1, "rowPadding": 3}
    return category("arm", None, scale=arm_scale(looks, "colour"), legend=legend)


def _where_shown(shown: float, faded: float) -> Spec:
    return {"condition": {"param": "picked", "value": shown}, "value": faded}


def _tooltip() -> list[Spec]:
    return [
        category("arm", "arm"),
        quantity("step", "step"),
        quantity("loss", "nats per token", format=".4f"),
        quantity("low", "lowest seed", format=".4f"),
        quantity("high", "highest seed", format=".4f"),
    ]
