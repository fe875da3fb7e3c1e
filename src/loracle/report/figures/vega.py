"""Figures as Vega-Lite, one description for the page, the notebook and the paper.

The page embeds figures with Vega's own script, the paper gets them through vl-convert, a notebook
through Altair. Text and rules are in ``currentColor``: right on light pages, dark ones and paper.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from loracle.report.figures.palette import INK, css_variables
from loracle.text import inert

if TYPE_CHECKING:
    import altair

Spec = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

# source (ECMAScript): the properties of Object.prototype
_MEMBERS = re.compile(
    "constructor|hasOwnProperty|isPrototypeOf|propertyIsEnumerable|toLocaleString|toString|valueOf"
    "|__proto__|__(define|lookup)[GS]etter__"
)

_FONT = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
_SMALL_PX, _TEXT_PX = 11, 12

# Two or more entries of a resource dictionary, e.g. ``      /xo7 42 0 R``.
_RESOURCES = re.compile(rb"(?:^ +/[a-z]+\d+ \d+ 0 R\n){2,}", re.MULTILINE)

_CONFIG: Spec = {
    "aria": False,  # the page describes each figure as a whole
    "background": "transparent",
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        "domainColor": INK,
        "domainOpacity": 0.4,
        "gridColor": INK,
        "gridOpacity": 0.1,
        "labelColor": INK,
        "labelFontSize": _SMALL_PX,
        "labelLimit": 220,
        "tickColor": INK,
        "tickOpacity": 0.4,
        "titleColor": INK,
        "titleFontSize": _SMALL_PX,
        "titleFontWeight": "normal",
    },
    "legend": {
        "labelColor": INK,
        "labelFontSize": _SMALL_PX,
        "labelLimit": 220,
        "titleColor": INK,
        "titleFontSize": _SMALL_PX,
        "titleFontWeight": "normal",
    },
    "title": {
        "anchor": "start",
        "color": INK,
        "fontSize": _TEXT_PX,
        "fontWeight": "normal",  # two fonts would stand in a PDF in an order of chance
        "subtitleColor": INK,
        "subtitleFontSize": _SMALL_PX,
    },
    "text": {"color": INK, "fontSize": _SMALL_PX},
    "rule": {"color": INK},
}


@dataclass(frozen=True)
class Figure:
    """One panel of the report."""

    name: str
    """Stem of its files, and its anchor."""
    title: str
    """What it shows."""
    caption: str
    """How to read it."""
    spec: Spec | None
    """Vega-Lite; None: there is nothing to draw."""
    absent: str | None = None
    """Why there is nothing to draw."""

    def __post_init__(self) -> None:
        assert (self.spec is None) == bool(self.absent), self.name


def missing(name: str, title: str, *, why: str) -> Figure:
    """Returns a panel with the reason why it has nothing to show."""
    return Figure(name, title, caption="", spec=None, absent=why)


def themed(spec: Spec) -> Spec:
    """Returns ``spec`` with the common theme, its texts as `figure_text`."""
    return {**_texts(spec), "config": _CONFIG}


def _texts(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _texts(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_texts(value) for value in part]
    return figure_text(part) if isinstance(part, str) else part


@lru_cache(maxsize=1 << 16)
def figure_text(text: str) -> str:
    """Returns text that a figure can hold.

    A character that XML forbids ends the converter's process, and a name that every JavaScript
    object has (``constructor``) is found where Vega looks for its own: a blank tells them apart.
    """
    shown = inert(text)
    return f"{shown} " if _MEMBERS.fullmatch(shown) else shown


def quantity(field: str, title: str | None, **more: Any) -> Spec:
    """Returns the encoding of a number; ``title`` names it with its unit."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def category(field: str, title: str | None, **more: Any) -> Spec:
    """Returns the encoding of a name."""
    return {"field": field, "type": "nominal", "title": title, **more}


def values(rows: Rows) -> Spec:
    """Returns rows as Vega-Lite's inline data."""
    return {"values": [dict(row) for row in rows]}


def for_page(spec: Spec) -> Spec:
    """Returns ``spec`` with colours that the page's style sheet sets, light or dark."""
    text = json.dumps(spec)
    for name, light, _ in css_variables():
        text = text.replace(f'"{light}"', f'"var({name})"')
    coloured: Spec = json.loads(text)
    return coloured


def for_paper(spec: Spec) -> Spec:
    """Returns ``spec`` without its invisible marks for tooltips."""
    layers = [layer for layer in spec.get("layer", ()) if layer.get("name") != "hover"]
    return {**spec, "layer": layers} if layers else spec


def svg_of(spec: Spec) -> str:
    """Returns a figure as SVG."""
    import vl_convert

    return str(vl_convert.vegalite_to_svg(for_paper(spec))).rstrip() + "\n"


def pdf_of(svg: str) -> bytes:
    """Returns a figure as PDF, its text still text; same figure, same bytes.

    The converter lists a page's resources in the order of a hash table, another one each time.
    Sorting them moves nothing else: the block keeps its length.
    """
    import vl_convert

    return _RESOURCES.sub(
        lambda block: b"".join(sorted(block[0].splitlines(keepends=True))),
        bytes(vl_convert.svg_to_pdf(svg)),
    )


@cache
def embedding_script() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed as one script that needs no network."""
    import vl_convert

    # Inside an HTML script element these two mean something, even in a string.
    # vl-convert types its first argument as required; None is its own default.
    script = str(vl_convert.javascript_bundle(None))  # type: ignore[arg-type]
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def as_altair(figure: Figure) -> altair.TopLevelMixin:
    """Returns a figure that has a spec for a notebook, validated against Vega-Lite's schema."""
    import altair

    assert figure.spec is not None, figure.absent
    spec = themed(figure.spec)
    chart: altair.TopLevelMixin = altair.Chart.from_dict(spec)
    return chart
