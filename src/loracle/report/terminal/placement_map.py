"""Map of a plan's adapters, module kinds against layers, for ``loracle study --plan``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from loracle.placement import Inventory, ModulePlan
from loracle.report.terminal.module_rows import Row, rows_of, ruler

# Marks of several ranks, the lowest first.
_RISING = "123456789abcdefghijklmnopqrstuvwxyz"
_NO_ADAPTER, _NO_MODULE = ".", " "


def placement_map(plan: ModulePlan, inventory: Inventory, *, columns: int = 100) -> RenderableType:
    """Returns a map of module kinds against layers, one character per layer, with ranks.

    Below the map: adapted modules outside the layers, a legend, and ranks above the highest that an
    update can have. Models deeper than ``columns`` are shown in pieces.
    """
    ranks = {module.name: module.rank for module in plan.modules}
    marks = _marks(ranks.values())
    rows = [_ranked(row, ranks=ranks) for row in rows_of(inventory)]
    inside = [row for row in rows if any(layer is not None for layer in row.highest)]
    outside = [row for row in rows if row.highest.get(None)]
    return Group(
        _heading(plan),
        *_lines(inside, marks=marks, num_layers=inventory.num_layers, columns=columns),
        *(Text(f"{row.label}: rank {row.ranks}") for row in outside),
        _legend(marks),
        *_overranked(plan),
    )


@dataclass(frozen=True)
class _RankedRow:
    """A row of the map."""

    label: str
    highest: Mapping[int | None, int]
    """Highest rank by layer; 0: modules without adapters."""
    ranks: str
    """``16``, ``8-32``, or nothing."""


def _ranked(row: Row, *, ranks: Mapping[str, int]) -> _RankedRow:
    highest: dict[int | None, int] = defaultdict(int)
    for module in row.modules:
        highest[module.layer] = max(highest[module.layer], ranks.get(module.name, 0))
    adapted = [ranks[module.name] for module in row.modules if module.name in ranks]
    return _RankedRow(row.label, highest, _span(adapted))


def _span(numbers: Sequence[int]) -> str:
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _heading(plan: ModulePlan) -> Text:
    first, count = plan.modules[0], len(plan.modules)
    ranks = _span([module.rank for module in plan.modules])
    scaling = first.alpha / first.rank
    scale = f"alpha / r {scaling:g}" if "-" in ranks else f"alpha {first.alpha:g}"
    share = 100 * plan.trainable_params / plan.base_params
    return Text.assemble(
        (plan.placement, "bold"),
        f": {count:,} module{'s' if count > 1 else ''}, rank {ranks}, {scale}, "
        f"{plan.trainable_params:,} parameters ({share:.2f}% of the base)",
    )


def _marks(ranks: Iterable[int]) -> dict[int, str]:
    """Returns a character per rank: ``#`` for a single one, else rising digits and letters."""
    distinct = sorted(set(ranks))
    if len(distinct) == 1:
        return {distinct[0]: "#"}
    last = len(_RISING) - 1
    return {rank: _RISING[min(place, last)] for place, rank in enumerate(distinct)}


def _lines(
    rows: Sequence[_RankedRow], *, marks: Mapping[int, str], num_layers: int, columns: int
) -> Iterator[Text]:
    label = max(len(label) for label in ("layer", *(row.label for row in rows)))
    ranks = max((len(row.ranks) for row in rows), default=0)
    step = max(10, (columns - label - ranks - 4) // 10 * 10)
    for start in range(0, num_layers, step):
        layers = range(start, min(start + step, num_layers))
        lines = [f"{'layer':<{label}}  {ruler(layers)}".rstrip()]
        for row in rows:
            cells = "".join(_mark(row.highest.get(layer), marks) for layer in layers)
            lines.append(f"{row.label:<{label}}  {cells}  {row.ranks:>{ranks}}".rstrip())
        yield Text("\n".join(lines))


def _mark(highest: int | None, marks: Mapping[int, str]) -> str:
    if highest is None:
        return _NO_MODULE
    return marks[highest] if highest else _NO_ADAPTER


def _legend(marks: Mapping[int, str]) -> Text:
    meanings: dict[str, list[int]] = defaultdict(list)
    for rank, mark in marks.items():
        meanings[mark].append(rank)
    parts = [f"{mark} rank {_span(ranks)}" for mark, ranks in meanings.items()]
    return Text("   ".join([*parts, f"{_NO_ADAPTER} no adapter"]), style="dim")


def _overranked(plan: ModulePlan) -> Iterator[Text]:
    worst = {m.kind: f"{m.rank} (of {min(m.in_features, m.out_features)})" for m in plan.overranked}
    if worst:
        kinds = ", ".join(f"{kind} {ranks}" for kind, ranks in worst.items())
        yield Text(f"rank beyond what an update can have, which is wasted: {kinds}", style="yellow")
