"""What the commands take: options and arguments that several share, or that name a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from loracle.config.files import at_home
from loracle.errors import UsageError


class Words(TyperGroup):
    """Refuses words that are not UTF-8: no record, page or configuration could hold them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the words of a command, after looking at each."""
        for word in args:
            if any("\ud800" <= character <= "\udfff" for character in word):
                raise UsageError(f"'{word}': not UTF-8; rename the file or folder")
        return super().parse_args(ctx, args)


ConfigArgument = Annotated[
    str, typer.Argument(metavar="[CONFIG]", help="YAML file, or name of a shipped configuration.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key, e.g. train.max_steps=100; can be repeated.",
    ),
]
FitOption = Annotated[
    bool,
    typer.Option(
        "--fit",
        help="Fit the device's memory: choose tokens per pass, gradient checkpointing and, last, "
        "4-bit weights.",
    ),
]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Print Markdown.")]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an unfinished run: the one in --out, or the newest of this configuration.",
    ),
]
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        parser=at_home,
        metavar="DIR",
        help="Run folder.",
        show_default="runs/<config>-<time>",
    ),
]
StudyOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        parser=at_home,
        metavar="DIR",
        help="Study folder; an existing study is resumed.",
        show_default="runs/<config>",
    ),
]
FolderArgument = Annotated[
    Path,
    typer.Argument(
        parser=at_home, metavar="DIR", help="Folder of a study, a run, or several runs."
    ),
]
RunArgument = Annotated[
    Path, typer.Argument(parser=at_home, metavar="RUN", help="Folder of a finished run.")
]
