"""The report, table and losses of a benchmark, from its logged blocks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from figures import Row, bootstrap, counted, quartiles, seconds_per_token, table

_OURS = "loracle"


def summarise(blocks: Sequence[Row], *, tuned: str | None) -> Row:
    """Returns the report: every step, medians, and ratios to ours with intervals."""
    from contenders import CONTENDERS, NOT_TRIED, TUNED, tuned_pair

    contenders = CONTENDERS | (tuned_pair(tuned) if tuned else {})
    steps = {name: counted_rows(blocks, name) for name in contenders}
    ours = steps[_OURS]
    standings = {
        name: _standing(rows, ours=ours, grouped=contenders[name].grouped)
        | {"label": contenders[name].label, **_costs(_of(blocks, name))}
        for name, rows in steps.items()
        if rows
    }
    first = next(block for block in blocks if block["error"] is None)
    return {
        "schema": 1,
        "what": "seconds per optimizer step after a warm-up step, each block its own process",
        "begun_at": min(block["ended_at"] for block in blocks),
        "ended_at": max(block["ended_at"] for block in blocks),
        "settings": first["settings"],
        "environment": first["environment"],
        "mean_tokens_per_step": statistics.fmean(row["num_tokens"] for row in ours),
        "contenders": standings,
        "floor": _floor(blocks, ours=ours),
        "tuning": {
            "chosen": tuned,
            "tried": {name: _trial(blocks, name) for name in TUNED} if tuned else {},
            "not_tried": NOT_TRIED,
        },
        "loss_table": loss_table(steps),
        "steps": {name: rows for name, rows in steps.items() if rows},
    }


def counted_rows(blocks: Sequence[Row], name: str) -> list[Row]:
    """Returns a contender's steps of all rounds without the warm-ups, in order."""
    in_order = sorted(_of(blocks, name), key=lambda block: block["spec"]["round"])
    return [
        {"round": block["spec"]["round"], **row}
        for block in in_order
        for row in counted(block["rows"])
    ]


def _of(blocks: Sequence[Row], name: str) -> list[Row]:
    return [b for b in blocks if b["spec"]["contender"] == name and b["error"] is None]


def _costs(blocks: Sequence[Row]) -> Row:
    return {
        "peak_gib": max(block["peak_gib"] for block in blocks),
        **{
            key: statistics.median(block[key] for block in blocks)
            for key in ("import_and_data_s", "load_and_build_s")
        },
    }


def _standing(rows: Sequence[Row], *, ours: Sequence[Row], grouped: bool) -> Row:
    mean_tokens = statistics.fmean(row["num_tokens"] for row in ours)
    standing = {
        "num_steps": len(rows),
        "step_time_s": quartiles([row["step_time_s"] for row in rows]),
        "ms_per_token": quartiles([1e3 * (row["step_time_s"] / row["num_tokens"]) for row in rows]),
        "padded_over_real": sum(r["num_padded"] for r in rows) / sum(r["num_tokens"] for r in rows),
        "compared_by": "seconds per real token" if grouped else "same batches",
        "step_time_of_mean_tokens_s": seconds_per_token(rows) * mean_tokens,
    }
    return standing | (_ratio_by_token(rows, ours) if grouped else _ratio_by_step(rows, ours))


def _ratio_by_step(rows: Sequence[Row], ours: Sequence[Row]) -> Row:
    """Returns the ratio of medians; a step is resampled together with ours on the same batch."""
    pairs = list(zip((row["step_time_s"] for row in rows), _same_steps(rows, ours), strict=True))
    return {
        "times_ours": _ratio_of_medians(pairs),
        "times_ours_95": bootstrap(pairs, _ratio_of_medians),
    }


def _same_steps(rows: Sequence[Row], ours: Sequence[Row]) -> list[float]:
    """Returns the seconds of our step on the batch of each row."""
    times = {(row["round"], row["step"]): row["step_time_s"] for row in ours}
    return [times[row["round"], row["step"]] for row in rows]


def _ratio_of_medians(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(p[0] for p in pairs) / statistics.median(p[1] for p in pairs)


def _ratio_by_token(rows: Sequence[Row], ours: Sequence[Row]) -> Row:
    """Returns the ratio of seconds per real token; steps are resampled independently."""
    paired = [(rows[i % len(rows)], ours[i % len(ours)]) for i in range(max(len(rows), len(ours)))]

    def ratio(pairs: Sequence[tuple[Row, Row]]) -> float:
        candidate, reference = zip(*pairs, strict=True)
        return seconds_per_token(candidate) / seconds_per_token(reference)

    times = seconds_per_token(rows) / seconds_per_token(ours)
    return {"times_ours": times, "times_ours_95": bootstrap(paired, ratio)}


def _floor(blocks: Sequence[Row], *, ours: Sequence[Row]) -> Row | None:
    """Returns the floor's share of our step time, batch by batch."""
    rows = counted_rows(blocks, "floor")
    if not rows:
        return None
    base = [row["base_s"] for row in rows]
    both = [row["base_s"] + row["lora_s"] for row in rows]
    steps = _same_steps(rows, ours)
    return {
        "base_s": quartiles(base),
        "base_and_lora_s": quartiles(both),
        "share_of_our_step": quartiles([f / s for f, s in zip(base, steps, strict=True)]),
        "share_with_lora": quartiles([f / s for f, s in zip(both, steps, strict=True)]),
        "gflop_per_s": sum(r["base_gflop"] for r in rows) / sum(base),
        "steps": rows,
    }


def _trial(blocks: Sequence[Row], name: str) -> Row:
    from contenders import TUNED

    trials = [block for block in blocks if block["spec"]["contender"] == f"tune:{name}"]
    rows = [row for block in trials for row in counted(block["rows"])]
    return {
        "settings": TUNED[name].label,
        "error": trials[0]["error"] if trials else "not run",
        "ms_per_token": 1e3 * seconds_per_token(rows) if rows else None,
    }


def loss_table(steps: Mapping[str, Sequence[Row]]) -> str:
    """Returns the losses of all contenders side by side, a line per step.

    Contenders draw dropout differently, so losses on the same batch are similar, not equal.
    """
    losses = {
        name: {(r["round"], r["step"]): f"{r['loss_nats_per_token']:.4f}" for r in rows}
        for name, rows in steps.items()
        if rows
    }
    width = max(map(len, losses), default=8)
    lines = ["round step " + " ".join(f"{name:>{width}}" for name in losses)]
    for turn, step in sorted({key for by_step in losses.values() for key in by_step}):
        row = (f"{by_step.get((turn, step), '-'):>{width}}" for by_step in losses.values())
        lines.append(f"{turn + 1:5} {step:4} {' '.join(row)}")
    return "\n".join(lines)


def markdown(report: Mapping[str, Any]) -> str:
    """Returns README's table of a report."""
    standings = report["contenders"]
    ordered = sorted(standings.values(), key=lambda row: row["step_time_of_mean_tokens_s"])
    rows = [_line(standing, ours=standing is standings[_OURS]) for standing in ordered]
    header = ("same work", "s per step", "times ours", "peak GiB")
    return f"{table(header, rows)}\n\n{_footnote(report)}"


def _line(standing: Mapping[str, Any], *, ours: bool) -> tuple[str, str, str, str]:
    if standing["compared_by"] == "same batches":
        time_s, mark = f"{standing['step_time_s']['median']:.2f}", ""
    else:
        time_s, mark = f"{standing['step_time_of_mean_tokens_s']:.2f}", " †"
    low, high = standing["times_ours_95"]
    ratio = "1" if ours else f"{standing['times_ours']:.1f} [{low:.1f} to {high:.1f}]"
    return standing["label"] + mark, time_s, ratio, f"{standing['peak_gib']:.2f}"


def _footnote(report: Mapping[str, Any]) -> str:
    environment, settings = report["environment"], report["settings"]
    versions = environment["versions"]
    ours = report["contenders"][_OURS]
    day = date.fromisoformat(report["ended_at"][:10])
    text = (
        f"Medians of {ours['num_steps']} optimizer steps in alternating blocks, 95 % bootstrap "
        f"intervals; {settings['model']}, {settings['lora']['placement']} r "
        f"{settings['lora']['rank']}, dropout {settings['lora']['dropout']:g}, batch "
        f"{settings['train']['batch_size']}, mean {report['mean_tokens_per_step']:.0f} tokens a "
        f"step. {environment['device']['name']}, {environment['torch_settings']['num_threads']} "
        f"threads; torch {versions['torch']}, transformers {versions['transformers']}, peft "
        f"{versions['peft']}, trl {versions['trl']}; {day}."
    )
    if any(row["compared_by"] != "same batches" for row in report["contenders"].values()):
        text += (
            " † groups examples of like length, so its batches differ: compared by seconds per "
            "real token, shown for our mean step."
        )
    if report["floor"]:
        share = report["floor"]["share_of_our_step"]["median"]
        with_lora = report["floor"]["share_with_lora"]["median"]
        text += (
            f" The step's matrix products with frozen weights alone take "
            f"{report['floor']['base_s']['median']:.2f} s: {share:.2f} of our step "
            f"({with_lora:.2f} with the adapters' products)."
        )
    return text
