"""The page: one file with everything in it, which no network is asked for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loracle.report.contents import Contents
from loracle.report.figures.palette import css_variables
from loracle.report.figures.vega import embedding_script, for_page, themed
from loracle.text import plural

if TYPE_CHECKING:
    import jinja2

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
    templates = _templates()
    return templates.get_template("page.html.j2").render(
        page=_view(contents),
        sections=_SECTIONS,
        style=_safe(templates.get_template("page.css.j2").render(colours=css_variables())),
        specs=_safe(_specs(contents)),
        vega=_safe(embedding_script()),
        script=_safe(_source(templates, "page.js")),
    )


def _templates() -> jinja2.Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("loracle.report.page"), autoescape=True, undefined=StrictUndefined
    )


def _safe(text: str) -> Any:
    """Returns text of ours that goes into the page as it is."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 - style, script, and JSON without a "<"


def _source(templates: jinja2.Environment, name: str) -> str:
    assert templates.loader is not None
    return templates.loader.get_source(templates, name)[0]


def _specs(contents: Contents) -> str:
    """Returns the figures as JSON that can stand in a script element, whatever an arm is called."""
    specs = {
        figure.name: for_page(themed(figure.spec))
        for figure in contents.figures.on_page()
        if figure.spec is not None
    }
    return json.dumps(specs, separators=(",", ":")).replace("<", "\\u003c")


def _view(contents: Contents) -> dict[str, Any]:
    """Returns what the template asks for by name."""
    tables, figures = contents.tables, contents.figures
    return {
        "name": contents.study.name,
        "question": contents.study.study["question"],
        "answer": (*contents.answer, *contents.advice[:1]),
        "provenance": contents.provenance.line,
        "verdicts": tables.verdicts,
        "forest": figures.forest,
        "noise": contents.noise,
        "untuned": tables.untuned,
        "losses": figures.losses,
        "recommendation": contents.advice,
        "tradeoff_table": tables.tradeoffs,
        "tradeoffs": figures.tradeoffs,
        "maps_caption": contents.maps_caption,
        "maps": figures.maps,
        "scores": figures.scores,
        "costs": tables.costs,
        "cost_figures": figures.costs,
        "samples": contents.samples,
        "samples_caption": _samples_caption(contents),
        "criteria": tables.criteria,
        "evidence": tables.evidence,
        "unfinished": tables.unfinished,
        "search": tables.search,
        "predicted": tables.predicted,
        "orderings": tables.orderings,
        "orderings_note": contents.orderings_note,
        "methods": contents.methods,
        "limits": contents.limits,
        "environment": contents.environment,
        "signatures": contents.signatures,
        "commands": _commands(contents),
    }


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
