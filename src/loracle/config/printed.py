"""A configuration as a YAML file that says of every field what it is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from loracle.config.files import dump_yaml
from loracle.config.run import Section

_WIDTH = 100


def commented_yaml(section: Section) -> str:
    """Returns every field with its description as a comment, also those at their defaults.

    The file reads back as the same configuration.
    """
    return "".join(f"{line}\n" for line in _lines(section))


def _lines(section: Section) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        words = " ".join((field.description or "").split())
        comment = f"# {words}"
        if isinstance(value, Section):
            yield f"{name}:  {comment}"
            yield from (f"  {line}" for line in _lines(value))
            continue
        written = dump_yaml({name: value}).rstrip("\n").split("\n")
        if len(written) == 1 and len(f"{written[0]}  {comment}") <= _WIDTH:
            yield f"{written[0]}  {comment}"
        else:
            yield from (f"# {line}" for line in textwrap.wrap(words, _WIDTH - 4))
            yield from written
