"""Maps of layers x modules: ranks of the adapters, and module scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from loracle.placement.inventory import Inventory
from loracle.records.study_folder import ArmRecord, StudyRecord
from loracle.report.figures.palette import INK, SHADE
from loracle.report.figures.vega import Figure, Spec, category, missing, quantity, values
from loracle.report.text.numbers import count
from loracle.text import slug_of

_MAP_PX, _MIN_CELL_PX, _MAX_CELL_PX, _ROW_PX = 250, 5, 24, 13
_OUTSIDE = "outside"
_COLUMNS = 3
_RANK_OPACITY = (0.25, 1.0)
_LABEL_EVERY = 5


@dataclass(frozen=True)
class Grid:
    """The rows and columns that all maps of a study share."""

    kinds: tuple[str, ...]
    """Rows: module kinds in the model's order."""
    layers: tuple[str, ...]
    """Columns: layer indices, and ``outside`` if a module outside the layers is adapted."""

    @property
    def cell_px(self) -> int:
        """Width of a column."""
        return min(_MAX_CELL_PX, max(_MIN_CELL_PX, _MAP_PX // len(self.layers)))


def grid_of(study: StudyRecord) -> Grid:
    """Returns the grid of the modules in layers, and of those that some arm adapts."""
    adapted = {module["name"] for arm in study.arms for module in arm.modules}
    shown = [m for m in study.inventory.modules if m.layer is not None or m.name in adapted]
    layers = [str(layer) for layer in range(study.inventory.num_layers)]
    outside = [_OUTSIDE] if any(module.layer is None for module in shown) else []
    return Grid(
        kinds=tuple(dict.fromkeys(module.kind for module in shown)),
        layers=(*layers, *outside),
    )


def placement_figures(study: StudyRecord) -> list[Figure]:
    """Returns one map per arm, all on one grid and one scale of ranks."""
    grid = grid_of(study)
    highest = _highest_rank(study)
    return [
        Figure(
            f"map-{number}",
            arm.name,
            caption=_in_words(arm),
            spec=_map(arm, grid=grid, inventory=study.inventory, highest=highest),
        )
        for number, arm in enumerate(study.arms, 1)
    ]


def placement_sheet(study: StudyRecord) -> Figure:
    """Returns all maps on one sheet, for paper."""
    specs = [
        {**(figure.spec or {}), "title": {"text": figure.title, "subtitle": figure.caption}}
        for figure in placement_figures(study)
    ]
    return Figure(
        "placement-maps",
        "Placements",
        caption=maps_caption(study),
        spec={"concat": specs, "columns": _COLUMNS, "spacing": 24},
    )


def maps_caption(study: StudyRecord) -> str:
    """Returns how to read the shades."""
    return (
        f"Columns: layers; rows: linear modules. The darker, the higher the rank; "
        f"the highest is {_highest_rank(study)}. Empty cells carry no adapter."
    )


def _highest_rank(study: StudyRecord) -> int:
    ranks = [module["rank"] for arm in study.arms if arm.rank for module in arm.modules]
    return max(ranks, default=1)


def _in_words(arm: ArmRecord) -> str:
    if arm.rank is None:
        return f"full fine-tuning, {count(arm.trainable_params)} parameters"
    ranks = [module["rank"] for module in arm.modules]
    low, high = min(ranks), max(ranks)
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return f"{rank}, {len(ranks)} modules, {count(arm.trainable_params)} parameters"


def _map(arm: ArmRecord, *, grid: Grid, inventory: Inventory, highest: int) -> Spec:
    adapted = _adapted_cells(arm, inventory=inventory, highest=highest)
    empty = [
        {"kind": module.kind, "layer": _column(module.layer)}
        for module in inventory.modules
        if module.kind in grid.kinds and _column(module.layer) in grid.layers
    ]
    position = {
        "x": category(
            "layer", "layer", sort=None, scale={"domain": list(grid.layers)}, axis=_axis()
        ),
        "y": category("kind", None, scale={"domain": list(grid.kinds)}, axis={"ticks": False}),
    }
    floor: Spec = {
        "data": values(list({tuple(row.items()): row for row in empty}.values())),
        "mark": {"type": "rect", "color": INK, "fillOpacity": 0.07},
        "encoding": position,
    }
    shades: Spec = {
        "data": values(adapted),
        "mark": {"type": "rect", "color": SHADE},
        "encoding": {
            **position,
            "fillOpacity": quantity(
                "rank",
                None,
                scale={"domain": [0, highest], "range": list(_RANK_OPACITY)},
                legend=None,
            ),
            "tooltip": [
                category("kind", "module"),
                category("layer", "layer"),
                category("shown", "rank"),
                quantity("modules", "modules in this cell"),
            ],
        },
    }
    return {
        "width": {"step": grid.cell_px},
        "height": {"step": _ROW_PX},
        "layer": [floor, shades] if adapted else [floor],
    }


def _adapted_cells(arm: ArmRecord, *, inventory: Inventory, highest: int) -> list[dict[str, Any]]:
    """Returns layer, kind and rank of each adapted cell; every cell for full fine-tuning."""
    if arm.rank is None:
        cells = [
            (_column(m.layer), m.kind, highest) for m in inventory.modules if m.layer is not None
        ]
    else:
        cells = [(_column(m["layer"]), m["kind"], m["rank"]) for m in arm.modules]
    ranks: dict[tuple[str, str], list[int]] = {}
    for column, kind, rank in cells:
        ranks.setdefault((column, kind), []).append(rank)
    return [
        {
            "layer": column,
            "kind": kind,
            "rank": max(in_cell),
            "shown": "every weight" if arm.rank is None else str(max(in_cell)),
            "modules": len(in_cell),
        }
        for (column, kind), in_cell in ranks.items()
    ]


def _column(layer: int | None) -> str:
    return _OUTSIDE if layer is None else str(layer)


def _axis() -> Spec:
    shown = f"datum.value % {_LABEL_EVERY} == 0 || datum.value == '{_OUTSIDE}' ? datum.value : ''"
    return {"labelExpr": shown, "labelAngle": 0, "ticks": False, "labelOverlap": False}


def score_figures(study: StudyRecord) -> list[Figure]:
    """Returns one heat map per score, or the sentence why there is none."""
    if not study.scores:
        why = "No arm of this study was chosen by scores, so none were computed."
        return [missing("scores", "Scores of the modules", why=why)]
    return [
        Figure(
            f"scores-{slug_of(name)}",
            f"Score: {name}",
            caption="Shade: the share of modules that score lower (dark: this module is among the "
            "highest). Computed on the frozen base with training examples only.",
            spec=_heat_map(scores, inventory=study.inventory),
        )
        for name, scores in study.scores.items()
    ]


def _heat_map(scores: Mapping[str, float], *, inventory: Inventory) -> Spec:
    cells: dict[tuple[str, str], list[float]] = {}
    for module in inventory.modules:
        if module.name in scores:
            cell = (_column(module.layer), module.kind)
            cells.setdefault(cell, []).append(scores[module.name])
    means = {cell: fmean(in_cell) for cell, in_cell in cells.items()}
    others = max(1, len(means) - 1)
    rows = [
        {
            "layer": layer,
            "kind": kind,
            "score": mean,
            "above": sum(other < mean for other in means.values()) / others,
        }
        for (layer, kind), mean in means.items()
    ]
    layers = [str(layer) for layer in range(inventory.num_layers)]
    layers += [_OUTSIDE] if any(row["layer"] == _OUTSIDE for row in rows) else []
    kinds = list(dict.fromkeys(str(row["kind"]) for row in rows))
    return {
        "width": {"step": max(12, min(_MAX_CELL_PX, 2 * _MAP_PX // len(layers)))},
        "height": {"step": 18},
        "data": values(rows),
        "mark": {"type": "rect", "color": SHADE},
        "encoding": {
            "x": category("layer", "layer", sort=None, scale={"domain": layers}, axis=_axis()),
            "y": category("kind", None, scale={"domain": kinds}, axis={"ticks": False}),
            "fillOpacity": quantity(
                "above", "share of modules scoring lower", scale={"range": [0.05, 1]}
            ),
            "tooltip": [
                category("kind", "module"),
                category("layer", "layer"),
                quantity("score", "score", format=".4~g"),
                quantity("above", "share scoring lower", format=".0%"),
            ],
        },
    }
