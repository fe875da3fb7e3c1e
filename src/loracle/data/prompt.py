"""Prompt templates: render a record as the text before its response."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from loracle.config.run import TemplateConfig
from loracle.data.literal import Part
from loracle.data.records import Record

_FIELD = re.compile(r"\{(instruction|input)\}")


@dataclass(frozen=True)
class Template:
    """A prompt in two forms, with placeholders ``{instruction}`` and ``{input}``."""

    name: str
    """``alpaca``, or ``custom`` for one from the config."""
    with_input: str
    """Prompt of a record that has an input."""
    without_input: str
    """Prompt of a record that has none."""

    def render(self, record: Record) -> str:
        """Returns the prompt of a record.

        Substituted in one pass, never with ``str.format``: braces in a record are plain text, and
        an instruction that contains ``{input}`` stays as it is.
        """
        return "".join(part.text for part in self.parts(record))

    def parts(self, record: Record) -> list[Part]:
        """Returns the prompt of a record in pieces, each with whose text it is."""
        form = self.with_input if record.input else self.without_input
        texts = {"instruction": record.instruction, "input": record.input}
        # Split by a pattern with one group: the template's texts and its fields in turn.
        pieces = _FIELD.split(form)
        return [
            Part(texts[piece], from_record=True) if index % 2 else Part(piece, from_record=False)
            for index, piece in enumerate(pieces)
        ]

    @property
    def digest(self) -> str:
        """12 hex digits, equal for templates that render alike."""
        text = f"{self.with_input}\0{self.without_input}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


ALPACA = Template(
    name="alpaca",
    with_input=(
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    without_input=(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
    ),
)
"""Stanford Alpaca's two forms, to the character; no newline follows the last colon.

Source: PROMPT_DICT in train.py, tatsu-lab/stanford_alpaca (Taori et al. 2023).
"""


def template_of(template: Literal["alpaca"] | TemplateConfig) -> Template:
    """Returns the template of ``data.template``."""
    if isinstance(template, TemplateConfig):
        return Template("custom", template.with_input, template.without_input)
    return ALPACA
