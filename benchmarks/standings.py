"""From the blocks of a benchmark to its report, its table and its loss curves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from figures import bootstrap, quartiles, table

Row = dict[str, Any]

_OURS = "loracle"


def summarise(blocks: Sequence[Row], *, tuned: str | None) -> Row:
    """Returns the report: every step, medians, and ratios to ours with their intervals."""
    from contenders import CONTENDERS, NOT_TRIED, TUNED, tuned_pair

    known = CONTENDERS | (tuned_pair(tuned) if tuned else {})
    counted = {name: counted_rows(blocks, name) for name in known}
    ours = counted[_OURS]
    standings = {
        name: _standing(rows, ours=ours, grouped=known[name].grouped)
        | {"label": known[name].label, "peak_gib": _peak(blocks, name), **_start(blocks, name)}
        for name, rows in counted.items()
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
        "loss_table": loss_table(counted),
        "steps": {name: rows for name, rows in counted.items() if rows},
    }


def counted_rows(blocks: Sequence[Row], name: str) -> list[Row]:
    """Returns a contender's steps of all rounds without the warm-ups, in order."""
    mine = sorted(_of(blocks, name), key=lambda block: block["spec"]["round"])
    return [
        {"round": block["spec"]["round"], **row}
        for block in mine
        for row in block["rows"]
        if not row["warm_up"]
    ]


def _of(blocks: Sequence[Row], name: str) -> list[Row]:
    return [b for b in blocks if b["spec"]["contender"] == name and b["error"] is None]


def _peak(blocks: Sequence[Row], name: str) -> float:
    return max(block["peak_gib"] for block in _of(blocks, name))


def _start(blocks: Sequence[Row], name: str) -> Row:
    return {
        key: statistics.median(block[key] for block in _of(blocks, name))
        for key in ("import_and_data_s", "load_and_build_s")
    }


def _standing(rows: Sequence[Row], *, ours: Sequence[Row], grouped: bool) -> Row:
    per_token = [row["step_time_s"] / row["num_tokens"] for row in rows]
    total = sum(row["step_time_s"] for row in rows) / sum(row["num_tokens"] for row in rows)
    mean_tokens = statistics.fmean(row["num_tokens"] for row in ours)
    standing = {
        "num_steps": len(rows),
        "step_time_s": quartiles([row["step_time_s"] for row in rows]),
        "ms_per_token": quartiles([1e3 * each for each in per_token]),
        "padded_over_real": sum(r["num_padded"] for r in rows) / sum(r["num_tokens"] for r in rows),
        "compared_by": "seconds per real token" if grouped else "same batches",
        "step_time_of_mean_tokens_s": total * mean_tokens,
    }
    return standing | (_ratio_by_token(rows, ours) if grouped else _ratio_by_step(rows, ours))


def _ratio_by_step(rows: Sequence[Row], ours: Sequence[Row]) -> Row:
    """Returns the ratio of medians; each step is drawn together with ours on the same batch."""
    mine = {(row["round"], row["step"]): row["step_time_s"] for row in ours}
    pairs = [(row["step_time_s"], mine[row["round"], row["step"]]) for row in rows]
    return {
        "times_ours": _ratio_of_medians(pairs),
        "times_ours_95": bootstrap(pairs, _ratio_of_medians),
    }


def _ratio_of_medians(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(p[0] for p in pairs) / statistics.median(p[1] for p in pairs)


def _ratio_by_token(rows: Sequence[Row], ours: Sequence[Row]) -> Row:
    """Returns the ratio of seconds per real token; the steps of each side are drawn apart."""
    paired = [(rows[i % len(rows)], ours[i % len(ours)]) for i in range(max(len(rows), len(ours)))]

    def ratio(pairs: Sequence[tuple[Row, Row]]) -> float:
        theirs, mine = zip(*pairs, strict=True)
        return _rate(theirs) / _rate(mine)

    return {"times_ours": _rate(rows) / _rate(ours), "times_ours_95": bootstrap(paired, ratio)}


def _rate(rows: Sequence[Row]) -> float:
    return sum(r["step_time_s"] for r in rows) / sum(r["num_tokens"] for r in rows)


def _floor(blocks: Sequence[Row], *, ours: Sequence[Row]) -> Row | None:
    """Returns the floor's share of our step time, batch by batch."""
    rows = counted_rows(blocks, "floor")
    if not rows:
        return None
    mine = {(row["round"], row["step"]): row["step_time_s"] for row in ours}
    base = [row["base_s"] for row in rows]
    both = [row["base_s"] + row["lora_s"] for row in rows]
    steps = [mine[row["round"], row["step"]] for row in rows]
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

    found = [block for block in blocks if block["spec"]["contender"] == f"tune:{name}"]
    rows = [row for block in found for row in block["rows"] if not row["warm_up"]]
    return {
        "settings": TUNED[name].label,
        "error": found[0]["error"] if found else "not run",
        "ms_per_token": 1e3 * _rate(rows) if rows else None,
    }


def loss_table(counted: Mapping[str, Sequence[Row]]) -> str:
    """Returns the losses of all contenders beside each other, a line per step.

    Contenders draw dropout each in their own way, so same batches give like and not equal losses.
    """
    names = [name for name, rows in counted.items() if rows]
    places = sorted({(row["round"], row["step"]) for rows in counted.values() for row in rows})
    losses = {
        name: {(r["round"], r["step"]): f"{r['loss_nats_per_token']:.4f}" for r in counted[name]}
        for name in names
    }
    width = max(map(len, names), default=8)
    head = "round step " + " ".join(f"{name:>{width}}" for name in names)
    return "\n".join(
        [
            head,
            *(
                f"{round_ + 1:5} {step:4} "
                + " ".join(f"{losses[name].get((round_, step), '-'):>{width}}" for name in names)
                for round_, step in places
            ),
        ]
    )


def markdown(report: Mapping[str, Any]) -> str:
    """Returns README's table of a report."""
    standings = report["contenders"]
    ordered = sorted(standings.values(), key=lambda each: each["step_time_of_mean_tokens_s"])
    lines = [
        table(
            ("same work", "s per step", "times ours", "peak GiB"),
            [_line(each, ours=each is standings[_OURS]) for each in ordered],
        )
    ]
    return "\n".join([*lines, "", _footnote(report)])


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
    if any(each["compared_by"] != "same batches" for each in report["contenders"].values()):
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
