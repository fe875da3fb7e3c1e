"""What of a source a run does not see as it stands: counted for ``data.json``, and in words.

Left out, cut, unread, joined or doubled: each is said on the screen, with the first rows that it
concerns; what is left out of more than a tenth of the records is a warning that reports repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from loracle.data.records import Reading, count_drops
from loracle.data.rows import Drop
from loracle.data.tokens import Example
from loracle.text import listed, plural

# assumed: what a reader of a table would want to know of
_WARNED_FRAC = 0.1
_RECORDED_ROWS = 10
_SHOWN_ROWS = 5
_listed = partial(listed, most=5)

# Reasons to leave out a record that was read and drawn.
_UNFIT = frozenset({"no_prompt_tokens", "no_response_tokens", "prompt_too_long"})
_REASONS = {
    "not_an_object": "no object",
    "wrong_field_count": "more or fewer fields than the header",
    "missing_instruction": "no instruction",
    "missing_output": "no output",
    "empty_instruction": "an empty instruction",
    "empty_output": "an empty output",
    "not_text": "a number or list for a text",
    "not_unicode": "half a character",
    "no_prompt_tokens": "no tokens in the prompt",
    "no_response_tokens": "no tokens in the response",
    "prompt_too_long": "prompt longer than data.max_tokens {max_tokens} allows",
}


def account_of(
    reading: Reading, *, unfit: Sequence[Drop], examples: Sequence[Example]
) -> dict[str, Any]:
    """Returns the keys of ``data.json`` on what is left out, cut, unread, doubled or joined.

    Args:
        reading: What the source holds.
        unfit: Drawn records that cannot become examples.
        examples: The examples of both parts.
    """
    cut = sorted(example.record.row for example in examples if example.truncated)
    return {
        "dropped": _describe_drops([*reading.drops, *unfit]),
        "truncated": _tally(cut),
        "unread_columns": {_shown(name): _tally(rows) for name, rows in reading.unread.items()},
        "doubled_keys": _tally(reading.doubled),
        "files": [{"name": _shown(name), "num_rows": count} for name, count in reading.files],
        "unread_files": [_shown(name) for name in reading.others],
    }


def _describe_drops(drops: Iterable[Drop]) -> dict[str, Any]:
    """Returns the number and the row numbers of dropped rows by reason."""
    drops = sorted(drops, key=lambda drop: drop.row)
    return {
        reason: {"count": count, "rows": [drop.row for drop in drops if drop.reason == reason]}
        for reason, count in count_drops(drops).items()
    }


def notices_of(report: Mapping[str, Any]) -> list[str]:
    """Returns what the content of ``data.json`` leaves to be said, a line each; often nothing."""
    left_out = [
        f"warning: {line}" if frac > _WARNED_FRAC else line for frac, line in _left_out(report)
    ]
    return [*left_out, *_unread(report), *_changed(report), *_split(report)]


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """Returns the lines that belong beside every result, because of what it does not speak of."""
    return [line for frac, line in _left_out(report) if frac > _WARNED_FRAC]


def _left_out(report: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """Yields which part of the records was left out, in figures and in words.

    One line for all reasons, unless only some of the readable records were drawn.
    """
    read, drawn = report["num_records_read"], report["num_records_used"]
    unfit = {name: drops for name, drops in report["dropped"].items() if name in _UNFIT}
    unread = {name: drops for name, drops in report["dropped"].items() if name not in _UNFIT}
    if drawn + sum(drops["count"] for drops in unread.values()) == read:
        stages = [(read, "record", report["dropped"])]
    else:
        stages = [(read, "record", unread), (drawn, "drawn record", unfit)]
    for total, noun, dropped in stages:
        count = sum(drops["count"] for drops in dropped.values())
        if count:
            reasons = "; ".join(_reason(name, report, total=count) for name in dropped)
            verb = "is" if count == 1 else "are"
            yield count / total, f"{count} of {plural(total, noun)} {verb} left out: {reasons}"


def _reason(name: str, report: Mapping[str, Any], *, total: int) -> str:
    drops = report["dropped"][name]
    words = _REASONS[name].format(max_tokens=report["max_tokens"])
    count = "" if drops["count"] == total else f", {drops['count']}"
    return f"{words}{count} ({_rows(drops)})"


def _unread(report: Mapping[str, Any]) -> Iterator[str]:
    columns = report["unread_columns"]
    if columns:
        named = [
            f"{name} ({plural(rows['count'], 'record')}, {_rows(rows)})"
            for name, rows in columns.items()
        ]
        yield f"{plural(len(columns), 'column')} not read: {_listed(named)}"
    if others := report["unread_files"]:
        yield f"{plural(len(others), 'data file')} of the folder not read: {_listed(others)}"


def _changed(report: Mapping[str, Any]) -> Iterator[str]:
    files, doubled, cut = report["files"], report["doubled_keys"], report["truncated"]
    if len(files) > 1:
        named = [f"{file['name']} ({file['num_rows']})" for file in files]
        yield f"{len(files)} files are read as one, their rows numbered through: {_listed(named)}"
    if doubled["count"]:
        who = plural(doubled["count"], "record")
        yield f"{who} with duplicate keys, of which the last value counts ({_rows(doubled)})"
    if cut["count"]:
        who = plural(cut["count"], "response")
        yield f"{who} cut at data.max_tokens {report['max_tokens']} ({_rows(cut)})"


def _split(report: Mapping[str, Any]) -> Iterator[str]:
    held_out = report["validation"]["num_examples"]
    total = held_out + report["train"]["num_examples"]
    asked = report["validation_frac_asked"]
    # Less than a record is rounding.
    if abs(held_out - asked * total) >= 1:
        yield (
            f"{held_out} of {plural(total, 'record')} are held out, {100 * held_out / total:.1f} % "
            f"and not the {100 * asked:.1f} % of data.validation_frac, because records that ask "
            "the same stay together and those left out were of either part"
        )


def _tally(rows: Sequence[int]) -> dict[str, Any]:
    return {"count": len(rows), "rows": list(rows[:_RECORDED_ROWS])}


def _rows(tally: Mapping[str, Any]) -> str:
    shown = ", ".join(map(str, tally["rows"][:_SHOWN_ROWS]))
    more = ", ..." if tally["count"] > _SHOWN_ROWS else ""
    return f"{'row' if tally['count'] == 1 else 'rows'} {shown}{more}"


def _shown(name: str) -> str:
    """Returns a name of a column or file as one harmless line."""
    return name if name.isprintable() else ascii(name)
