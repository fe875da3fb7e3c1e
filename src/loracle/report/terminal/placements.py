"""The view of ``loracle placements MODEL``: modules, parameters of each preset, and a layer map.

Plain ASCII and at most 80 columns, for logs, pipes and notebooks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loracle.errors import PlacementError
from loracle.placement import Inventory, ModulePlan, Role, resolve_placement
from loracle.placement.names import layer_ranges
from loracle.placement.plan import FULL
from loracle.placement.presets import PRESETS, counted_names
from loracle.report.terminal.module_rows import Row, rows_of, ruler
from loracle.report.terminal.table import add_numbers, borderless

_BYTES_PER_PARAM = 4  # fp32: adapters are trained and saved in it
_MIB = 1024**2
_COLUMNS = 80
_MAX_RANGES_CHARS = 9  # longer ones leave no room for the counts
_MARKS = (".", "#", *"23456789", "+")
"""By number of modules."""
_ROLES: tuple[Role, ...] = ("attention", "feed-forward", "other", "head")


def placements_table(
    inventory: Inventory, *, rank: int, alpha: float, model_name: str
) -> RenderableType:
    """Returns the module kinds, the presets at this rank and the layer map of a model."""
    rows = rows_of(inventory)
    return Group(
        _heading(inventory, rank=rank, alpha=alpha, model_name=model_name),
        *_section("Linear modules", _kinds_table(rows, rank=rank)),
        *_section("Placements", *_presets(inventory, rank=rank, alpha=alpha)),
        *_section("Layers", *_layer_map(rows, num_layers=inventory.num_layers)),
    )


def _section(title: str, *parts: RenderableType) -> tuple[RenderableType, ...]:
    return (Text(f"\n{title}", style="bold"), *parts)


def _heading(inventory: Inventory, *, rank: int, alpha: float, model_name: str) -> Text:
    linear = sum(module.in_features * module.out_features for module in inventory.modules)
    share = 100 * linear / inventory.total_params
    return Text.assemble(
        (model_name, "bold"),
        f": {inventory.total_params:,} parameters, {inventory.num_layers} layers\n",
        f"{len(inventory.modules):,} linear modules hold {linear:,} of them ({share:.1f}%)\n",
        f"Only these can carry adapters, counted here at rank {rank}, alpha {alpha:g}",
    )


def _kinds_table(rows: Sequence[Row], *, rank: int) -> Table:
    table = borderless()
    table.add_column("module", overflow="fold")
    add_numbers(table, "features\nin x out", "layers", "count", "params\neach", "adapter\nparams")
    for role in _ROLES:
        members = [row for row in rows if row.role == role]
        if members:
            table.add_row(role, style="italic")
        for row in members:
            table.add_row(*_kind_cells(row, rank=rank))
    return table


def _kind_cells(row: Row, *, rank: int) -> tuple[str, ...]:
    first = row.modules[0]
    params = rank * (first.in_features + first.out_features)
    layers = layer_ranges(row.layers) or "-"
    return (
        f"  {row.label}",
        f"{first.in_features:,} x {first.out_features:,}",
        layers if len(layers) <= _MAX_RANGES_CHARS else "see map",
        f"{len(row.modules):,}",
        f"{params:,}",
        f"{params * len(row.modules):,}",
    )


def _presets(inventory: Inventory, *, rank: int, alpha: float) -> Iterator[RenderableType]:
    table = borderless()
    table.add_column("placement", no_wrap=True)
    add_numbers(
        table, "modules", "trainable\nparams", "% of full\nfine-tuning", "adapter\nMiB (fp32)"
    )
    half = max(1, inventory.num_layers // 2)
    absent: dict[str, list[str]] = defaultdict(list)
    for name in (*PRESETS, *counted_names(half)[:2], counted_names(2)[2], FULL):
        try:
            plan = resolve_placement(name, inventory=inventory, rank=rank, alpha=alpha)
        except PlacementError as error:
            absent[str(error).removeprefix(f"placement '{name}': ")].append(name)
            table.add_row(name, *["n/a"] * 4, style="dim")
        else:
            table.add_row(name, *_costs(plan))
    yield table
    yield Text("first-N, last-N and every-Nth take any N; a module's name is a placement too")
    for reason, names in absent.items():
        yield Text(f"n/a {', '.join(names)}: {reason}")


def _costs(plan: ModulePlan) -> tuple[str, str, str, str]:
    return (
        "n/a" if plan.is_full else f"{len(plan.modules):,}",
        f"{plan.trainable_params:,}",
        f"{100 * plan.trainable_params / plan.base_params:.3f}",
        f"{plan.trainable_params * _BYTES_PER_PARAM / _MIB:.1f}",
    )


def _layer_map(rows: Sequence[Row], *, num_layers: int) -> Iterator[RenderableType]:
    """Yields module kinds against layers, in pieces that fit, and the legend."""
    inside = [row for row in rows if row.layers]
    width = max((len(row.label) for row in inside), default=0)
    step = max(10, (_COLUMNS - width - 2) // 10 * 10)
    for start in range(0, num_layers, step):
        layers = range(start, min(start + step, num_layers))
        yield Text("\n".join(_map_lines(inside, layers=layers, width=width)))
    yield Text("# one module   2-9 modules   + ten or more   . none", style="dim")


def _map_lines(rows: Sequence[Row], *, layers: range, width: int) -> Iterator[str]:
    yield f"{'layer':<{width}}  {ruler(layers)}".rstrip()
    for row in rows:
        counts = Counter(row.layers)
        yield f"{row.label:<{width}}  " + "".join(
            _MARKS[min(counts[layer], 10)] for layer in layers
        )
