"""Splits records into train and validation; what asks the same is never on both sides.

Records ask the same if instruction and input do but for case, punctuation, white space and
compatibility forms, also where one record writes as its instruction what another has as its input.
One instruction with many inputs is as many groups, so few instructions, or one, make a good split.

A group's place in the draw is a hash of the seed and its text, not a position in the file: the same
records split alike in any order and format, whatever the model, and beside any unusable row.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from loracle.data.records import Record
from loracle.errors import DataError
from loracle.seeds import stream_seed


@dataclass(frozen=True)
class Split:
    """The two parts, each in source order."""

    train: tuple[Record, ...]
    """Records to learn from."""
    validation: tuple[Record, ...]
    """Records held out."""
    group_sizes: tuple[int, ...]
    """How many records ask the same, for each group of both parts."""


def normalized(instruction: str) -> str:
    """Returns the instruction without compatibility forms (NFKC), case and trailing punctuation.

    White space is collapsed. An instruction of punctuation alone keeps it.
    """
    text = instruction.lower() if instruction.isascii() else _folded(instruction)
    text = " ".join(text.split())
    end = len(text)
    while end and (text[end - 1] == " " or unicodedata.category(text[end - 1]).startswith("P")):
        end -= 1
    return text[:end] or text


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


Key = tuple[str, ...]
"""Normalised instruction, and input where that is needed to tell groups apart."""


def group_records(records: Sequence[Record]) -> dict[Key, list[Record]]:
    """Returns the records that ask the same, by a key of their own, in order of appearance.

    The key is the normalised instruction, if no other group has it, else with the input: it does
    not change for a data set whose instructions alone tell its records apart.
    """
    groups: dict[bytes, list[Record]] = {}
    texts: dict[bytes, set[tuple[str, str]]] = {}
    for record in records:
        pair = normalized(record.instruction), normalized(record.input)
        asked = _digest_of_words(pair)
        groups.setdefault(asked, []).append(record)
        texts.setdefault(asked, set()).add(pair)
    owners = Counter(name for pairs in texts.values() for name in {pair[0] for pair in pairs})
    return {_key(texts[asked], owners): group for asked, group in groups.items()}


def _key(pairs: Iterable[tuple[str, str]], owners: Mapping[str, int]) -> Key:
    return min((pair[:1] if owners[pair[0]] == 1 else pair) for pair in pairs)


def _digest_of_words(texts: Iterable[str]) -> bytes:
    """Returns a digest that is equal for records that ask the same."""
    return hashlib.blake2b(" ".join(filter(None, map(_words, texts))).encode()).digest()


def _words(text: str) -> str:
    """Returns a text without punctuation, unless it is nothing else."""
    return " ".join(text.translate(_punctuation()).split()) or text


@cache
def _punctuation() -> Mapping[int, str]:
    """Returns a space for every mark, and nothing for an apostrophe."""
    # The last character that Unicode calls punctuation is below this one.
    codes = (code for code in range(0x20000) if unicodedata.category(chr(code)).startswith("P"))
    return dict.fromkeys(codes, " ") | {ord("'"): ""}


def draw_records(
    records: Sequence[Record], *, max_records: int | None, seed: int
) -> tuple[Record, ...]:
    """Returns ``max_records`` of the records in source order; all of them if null or fewer.

    A smaller draw of a seed is part of every larger one.
    """
    if max_records is None or max_records >= len(records):
        return tuple(records)

    def place(record: Record) -> tuple[int, int]:
        texts = (record.instruction, record.input, record.output)
        return stream_seed(seed, "draw", *texts), record.row

    drawn = {record.row for record in sorted(records, key=place)[:max_records]}
    return tuple(record for record in records if record.row in drawn)


def split_records(records: Sequence[Record], *, validation_frac: float, seed: int) -> Split:
    """Returns the records in two parts, neither of which asks what the other asks.

    Groups go to validation in the order of the draw while they fit; where that misses the requested
    count, the nearest count that whole groups can reach is taken.

    Raises:
        DataError: If the records are too few, or too alike, for one in each part.
    """
    groups = group_records(records)
    if len(groups) < 2:
        same = f", all of which ask {next(iter(groups))[0][:60]!r}" if groups else ""
        raise DataError(
            f"data.validation_frac: too few records to split ({len(records)}{same}); train and "
            "validation need at least one each that asks something else"
        )
    keys = sorted(groups, key=lambda key: (stream_seed(seed, "split", *key), key))
    sizes = [len(groups[key]) for key in keys]
    chosen = _choose(sizes, size=validation_frac * len(records))
    held_out = {record.row for index in chosen for record in groups[keys[index]]}
    return Split(
        train=tuple(record for record in records if record.row not in held_out),
        validation=tuple(record for record in records if record.row in held_out),
        group_sizes=tuple(sizes),
    )


def _choose(sizes: Sequence[int], *, size: float) -> set[int]:
    """Returns groups whose sizes sum as near to ``size`` as possible: at least one, not all.

    First fit nearly always ends at the exact count (any record that is alone in its group fills the
    last gap); only otherwise is the exact search needed.
    """
    chosen: set[int] = set()
    gap = min(max(round(size), 1), sum(sizes) - 1)
    for index, group_size in enumerate(sizes):
        if group_size <= gap:
            chosen.add(index)
            gap -= group_size
    return chosen if gap == 0 else _choose_exactly(sizes, target=size)


def _choose_exactly(sizes: Sequence[int], *, target: float) -> set[int]:
    """Subset sum over the distinct sizes; bit k of ``sums`` is set if the sum k can be reached."""
    classes: dict[int, list[int]] = {}
    for index, size in enumerate(sizes):
        classes.setdefault(size, []).append(index)
    sums = [1]
    for size, members in classes.items():
        sums.append(_add_class(sums[-1], size=size, count=len(members)))
    reachable = [total for total in range(1, sum(sizes)) if sums[-1] >> total & 1]
    nearest = min(reachable, key=lambda total: abs(total - target))
    return _trace_back(classes, sums, total=nearest)


def _add_class(sums: int, *, size: int, count: int) -> int:
    """Returns the sums that up to ``count`` more groups of one size can reach."""
    part = 1
    while count:
        part = min(part, count)
        sums |= sums << (part * size)
        count -= part
        part *= 2
    return sums


def _trace_back(
    classes: Mapping[int, Sequence[int]], sums: Sequence[int], *, total: int
) -> set[int]:
    """Returns groups that sum to ``total``; ``sums[i]`` are the sums of the first i sizes."""
    chosen: set[int] = set()
    for (size, members), before in zip(reversed(list(classes.items())), sums[-2::-1], strict=True):
        count = next(n for n in range(len(members) + 1) if before >> (total - n * size) & 1)
        chosen.update(members[:count])
        total -= count * size
    return chosen
