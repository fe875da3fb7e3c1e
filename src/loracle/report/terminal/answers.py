"""Two answers side by side."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loracle.engine.answers import Answer
from loracle.runner.sample import Answers


def answers_view(answers: Answers) -> RenderableType:
    """Returns the untuned and the tuned model's answers next to each other."""
    table = Table(expand=True, show_lines=False)
    for title in ("untuned", "tuned"):
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(_cell(answers.base), _cell(answers.tuned))
    return table


def _cell(answer: Answer) -> Text:
    text = Text(answer.text.strip() or "(empty)")
    if answer.hit_limit:
        text.append(" ... [cut at the token limit]", style="dim")
    return text
