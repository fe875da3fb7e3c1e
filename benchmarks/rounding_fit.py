"""From logged passes to the spread of rounding, the audit's rate of false alarms, and its power.

The difference d of an example's sum of -ln p between two passes is divided by the root of its t
target tokens: z = d / sqrt(t). The audit looks at the total of d and at the root mean square of z
(``loracle/runner/audit.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from figures import Row, table
from loracle.runner.audit import tolerated, tolerated_spread

Floats = NDArray[np.float64]

RUNS = 200_000
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "nf4": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_NUM_EXAMPLES = (1, 2, 8, 32, 128)
_MORE_EXAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_POWER = 0.99


def fitted(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns spreads by model and dtype, their growth with depth, false alarms, and power.

    Args:
        rows: Logged passes of ``rounding.py``.
    """
    groups = {name: _group(found) for name, found in _by_setting(rows).items()}
    real = {name.split()[1]: group for name, group in groups.items() if "random" not in name}
    if not real:
        raise SystemExit("the real model needs two orders of one dtype first")
    loss = next(iter(real.values()))["loss_nats_per_token"]
    faults = dict(_faults(rows))
    return {
        "spreads": {name: _told(group) for name, group in groups.items()},
        "growth_with_depth": _growth(groups),
        "false_alarms": [
            {"dtype": dtype, "num_examples": count, **_alarms(group, dtype, count, loss=loss)}
            for dtype, group in real.items()
            for count in _NUM_EXAMPLES
        ],
        "faults": [
            {"fault": fault, **_power(shift, real, loss=loss)} for fault, shift in faults.items()
        ],
    }


def _by_setting(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        spec = row["spec"]
        if spec["fault"] == "none":
            length = f" {spec['length']}" if spec["length"] else ""
            found.setdefault(f"{spec['model']} {spec['dtype']}{length}", []).append(row)
    return {name: group for name, group in found.items() if len(group) > 1}


def _group(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns z and tokens of each pair of orders, and what they are like."""
    tokens = np.array(rows[0]["tokens"], dtype=np.float64)
    sums = {row["spec"]["order"]: np.array(row["nll_sum_nats"]) for row in rows}
    pairs = {
        f"{one}, {other}": (sums[one] - sums[other]) / np.sqrt(tokens)
        for one, other in itertools.combinations(sums, 2)
    }
    z = np.concatenate(list(pairs.values()))
    return {
        "z": z,
        "tokens": np.tile(tokens, len(pairs)),
        "loss_nats_per_token": float(next(iter(sums.values())).sum() / tokens.sum()),
        "pairs": {name: _rms(values) for name, values in pairs.items()},
    }


def _told(group: Mapping[str, Any]) -> Row:
    z, tokens = group["z"], group["tokens"]
    nonzero = z != 0
    slope = _slope(tokens[nonzero], np.abs(z[nonzero])) if len(set(tokens)) > 2 else None
    return {
        "num_differences": len(z),
        "std_nats_per_root_token": _rms(z),
        "smallest_pair": min(group["pairs"].items(), key=lambda pair: pair[1]),
        "largest_pair": max(group["pairs"].items(), key=lambda pair: pair[1]),
        "kurtosis": float(np.mean(z**4) / max(np.mean(z**2) ** 2, 1e-300)),
        "mean_nats_per_token": float(np.sum(z * np.sqrt(tokens)) / tokens.sum()),
        "exponent_of_tokens_beyond_root": slope,
        "loss_nats_per_token": group["loss_nats_per_token"],
    }


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _slope(x: Floats, y: Floats) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _growth(groups: Mapping[str, Mapping[str, Any]]) -> Row:
    """Returns the exponent of depth in the spread of random models at one length, by dtype."""
    found: dict[str, dict[int, float]] = {}
    for name, group in groups.items():
        model, dtype, *length = name.split()
        if model.startswith("random-") and length == ["128"]:
            found.setdefault(dtype, {})[int(model.partition("-")[2])] = _rms(group["z"])
    return {
        dtype: _slope(np.array(sorted(by)), np.array([by[depth] for depth in sorted(by)]))
        for dtype, by in found.items()
        if len(by) > 1
    }


def _drawn(group: Mapping[str, Any], count: int, *, shift: Floats | None = None) -> Iterator[Any]:
    """Yields blocks of runs of ``count`` examples: differences and tokens, (runs, examples).

    With ``shift``, nats by which a fault moves each example, an example is drawn with its shift.
    """
    draw = np.random.default_rng(0)
    size = len(group["z"])
    block = max(1, 2_000_000 // count)
    for start in range(0, RUNS if shift is None else 2_000, block):
        runs = min(block, (RUNS if shift is None else 2_000) - start)
        noise = draw.integers(size, size=(runs, count))
        if shift is None:
            tokens = group["tokens"][noise]
            yield group["z"][noise] * np.sqrt(tokens), tokens
        else:
            chosen = draw.integers(len(shift), size=(runs, count))
            if count <= len(shift):
                chosen = np.tile(np.arange(count), (runs, 1))
            tokens = group["tokens"][chosen]
            yield shift[chosen] + group["z"][noise] * np.sqrt(tokens), tokens


def _judged(gaps: Floats, tokens: Floats, dtype: str, *, loss: float) -> tuple[Floats, Floats]:
    """Returns total and spread of each run over their limits: above 1 is an alarm."""
    totals = tokens.sum(axis=1)
    allowed = np.array(
        [tolerated(_DTYPES[dtype], loss=loss, num_tokens=int(total)) * loss for total in totals]
    )
    spread = np.sqrt((gaps**2 / tokens).mean(axis=1))
    limit = tolerated_spread(_DTYPES[dtype], num_examples=gaps.shape[1])
    return np.abs(gaps.sum(axis=1)) / totals / allowed, spread / limit


def _alarms(group: Mapping[str, Any], dtype: str, count: int, *, loss: float) -> Row:
    blocks = [_judged(gaps, tokens, dtype, loss=loss) for gaps, tokens in _drawn(group, count)]
    total, spread = (np.concatenate(values) for values in zip(*blocks, strict=True))
    return {
        "num_runs": len(total),
        "alarms": int(np.sum((total > 1) | (spread > 1))),
        "total_over_limit_at_1e-4": _tail(total),
        "spread_over_limit_at_1e-4": _tail(spread),
    }


def _tail(values: Floats) -> float:
    return float(np.quantile(values, 1 - 1e-4))


def _faults(rows: Sequence[Row]) -> Iterator[tuple[str, Floats]]:
    sound = next(
        row
        for row in rows
        if (row["spec"]["dtype"], row["spec"]["order"], row["spec"]["fault"])
        == ("float32", "machine", "none")
    )
    before = np.array(sound["nll_sum_nats"])
    for row in rows:
        if row["spec"]["fault"] != "none":
            after = np.array(row["nll_sum_nats"])
            yield row["spec"]["fault"], after - before[: len(after)]


def _power(shift: Floats, real: Mapping[str, Mapping[str, Any]], *, loss: float) -> Row:
    """Returns what a fault does to single examples, and how surely it is seen in each dtype."""
    found: Row = {}
    for dtype, group in real.items():
        seen = {}
        for count in _MORE_EXAMPLES:
            blocks = [
                _judged(gaps, tokens, dtype, loss=loss)
                for gaps, tokens in _drawn(group, count, shift=shift)
            ]
            total, spread = (np.concatenate(values) for values in zip(*blocks, strict=True))
            seen[count] = float(np.mean((total > 1) | (spread > 1)))
        enough = [count for count in _MORE_EXAMPLES if seen[count] >= _POWER]
        found[dtype] = {
            "seen_with_32": seen[32],
            "examples_for_99_percent": min(enough, default=None),
        }
    tokens = next(iter(real.values()))["tokens"][: len(shift)]
    return {
        "mean_nats_per_token": float(shift.sum() / tokens.sum()),
        "std_nats_per_root_token": _rms(shift / np.sqrt(tokens)),
        **found,
    }


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """Returns the report's tables as Markdown."""
    spreads = [
        [
            name, f"{row['std_nats_per_root_token']:.2g}", f"{row['largest_pair'][1]:.2g}",
            f"{row['kurtosis']:.1f}", f"{row['num_differences']}",
        ]
        for name, row in report["spreads"].items()
    ]  # fmt: skip
    alarms = [
        [
            f"{row['dtype']} {row['num_examples']}", f"{row['alarms']} of {row['num_runs']}",
            f"{row['total_over_limit_at_1e-4']:.2f}", f"{row['spread_over_limit_at_1e-4']:.2f}",
        ]
        for row in report["false_alarms"]
    ]  # fmt: skip
    dtypes = list(dict.fromkeys(row["dtype"] for row in report["false_alarms"]))
    faults = [
        [row["fault"], f"{row['mean_nats_per_token']:.2g}", f"{row['std_nats_per_root_token']:.2g}"]
        + [f"{row[d]['seen_with_32']:.2f} / {row[d]['examples_for_99_percent']}" for d in dtypes]
        for row in report["faults"]
    ]
    return [
        table(["", "std, nats per root token", "widest pair", "kurtosis", "n"], spreads),
        "",
        table(["examples", "alarms", "total / limit", "spread / limit"], alarms),
        "",
        table(["fault", "nats per token", "std", *dtypes], faults),
    ]
