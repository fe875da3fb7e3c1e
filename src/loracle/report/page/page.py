"""The report as one self-contained HTML file."""

from __future__ import annotations

import json
from typing import Any

from loracle.report.contents import Contents
from loracle.report.figures.palette import css_variables
from loracle.report.figures.vega import embedding_script, for_page, themed
from loracle.text import inert, plural

_SECTIONS = (
    ("answer", "Answer"),
    ("verdicts", "Verdicts"),
    ("losses", "Loss curves"),
    ("tradeoffs", "Loss against cost"),
    ("placements", "Placements"),
    ("costs", "Memory and time"),
    ("answers", "Answers"),
    ("criteria", "Criteria"),
    ("published", "Published orderings"),
    ("methods", "Methods and limits"),
)


def page_of(contents: Contents) -> str:
    """Returns the report as one HTML file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("loracle.report.page")
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_shown
    )
    return templates.get_template("page.html.j2").render(
        contents=contents,
        study=contents.study.study,
        tables=contents.tables,
        figures=contents.figures,
        samples_caption=_samples_caption(contents),
        commands=_commands(contents),
        sections=_SECTIONS,
        style=_safe(templates.get_template("page.css.j2").render(colours=css_variables())),
        specs=_safe(_specs(contents)),
        vega=_safe(embedding_script()),
        script=_safe(loader.get_source(templates, "page.js")[0]),
    )


def _shown(value: Any) -> Any:
    """Returns what stands in the page: any text `inert`, and then escaped."""
    return inert(value) if type(value) is str else value


def _safe(text: str) -> Any:
    """Returns text that goes into the page unescaped."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 - style, script, and JSON without a "<"


def _specs(contents: Contents) -> str:
    """Returns the figures as JSON that is safe in a script element."""
    specs = {
        figure.name: for_page(themed(figure.spec))
        for figure in contents.figures.on_page()
        if figure.spec is not None
    }
    return json.dumps(specs, separators=(",", ":")).replace("<", "\\u003c")


def _samples_caption(contents: Contents) -> str:
    seeds = " and ".join(map(str, contents.sample_seeds))
    return (
        f"The first {plural(len(contents.samples), 'instruction')} of the validation set that "
        f"every arm answered, greedily, with the lowest seed that it completed (seed {seeds}). "
        f"Nobody chose them."
    )


def _commands(contents: Contents) -> list[str]:
    commits = contents.provenance.commits
    checkout = [f"git checkout {commits[0].removesuffix('+changes')}"] if commits else []
    name = contents.study.path.name or contents.study.name
    return [
        *checkout,
        f"loracle study {contents.study.name}     # runs what is missing, then writes the report",
        f"loracle report {name}      # writes this report again from the records",
    ]
