"""Loss of every held-out example before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loracle.records.study_folder import StudyRecord
from loracle.report.figures.palette import GOOD, INK
from loracle.report.figures.vega import Figure, Spec, category, missing, quantity, values

_SIDE_PX, _WORDS = 320, 90
_BEFORE = "untuned, nats per token"
_AFTER = "tuned, nats per token"


def example_figure(study: StudyRecord) -> Figure:
    """Returns each example's loss under the untuned model and the tuned reference arm."""
    runs = study.runs_of(study.reference)
    rows = _rows(runs[min(runs)].examples) if runs else []
    title = f"Every held-out example, {study.reference}"
    if not rows:
        return missing("examples", title, why=f"No run of {study.reference} scored an example.")
    worse = sum(row["tuned"] > row["untuned"] for row in rows)
    return Figure(
        "examples",
        title,
        caption=f"Seed {min(runs)}. Points above the diagonal have a higher loss after training: "
        f"{worse} of {len(rows)}. The larger a point, the more target tokens.",
        spec=_scatter(rows),
    )


def _rows(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "instruction": row["instruction"][:_WORDS],
            "tokens": row["tokens"],
            "untuned": row["base_nll_sum_nats"] / row["tokens"],
            "tuned": row["nll_sum_nats"] / row["tokens"],
        }
        for row in examples
        if row["nll_sum_nats"] is not None and row["base_nll_sum_nats"] is not None
    ]


def _scatter(rows: Sequence[Mapping[str, Any]]) -> Spec:
    highest = max(max(row["untuned"], row["tuned"]) for row in rows)
    scale = {"domain": [0, highest], "nice": True}
    diagonal: Spec = {
        "data": {"values": [{"untuned": end, "tuned": end} for end in (0, highest)]},
        "mark": {"type": "line", "color": INK, "opacity": 0.4, "strokeWidth": 1},
        "encoding": {
            "x": quantity("untuned", _BEFORE, scale=scale),
            "y": quantity("tuned", _AFTER, scale=scale),
        },
    }
    points: Spec = {
        "data": values(rows),
        "mark": {"type": "point", "filled": True, "color": GOOD, "opacity": 0.5},
        "encoding": {
            "x": quantity("untuned", _BEFORE, scale=scale),
            "y": quantity("tuned", _AFTER, scale=scale),
            "size": quantity("tokens", "target tokens", scale={"range": [8, 160]}),
            "tooltip": [
                category("instruction", "instruction"),
                quantity("tokens", "target tokens"),
                quantity("untuned", "untuned", format=".3f"),
                quantity("tuned", "tuned", format=".3f"),
            ],
        },
    }
    return {"width": _SIDE_PX, "height": _SIDE_PX, "layer": [diagonal, points]}
