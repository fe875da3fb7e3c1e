"""Texts of data, arms, questions and models stay text in every file and view of a report."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from analysis.stats.simulated import SimulatedArm, simulated_study
from loracle.analysis.verdicts import judge
from loracle.report.contents import contents_of
from loracle.report.figures.vega import figure_text, svg_of, themed
from loracle.report.page.page import page_of
from loracle.report.paper.paper import limits_file, macros_file
from loracle.report.tables.baseline import baseline_table
from loracle.report.tables.table import latex_of, markdown_of
from loracle.report.terminal.verdicts import verdict_view
from loracle.report.text.latex import escape
from loracle.report.text.markdown import markdown_code, markdown_paragraph, markdown_text
from loracle.screen import screen
from loracle.text import active_character, inert

TEXTS = {
    "html": '</p></script><script>alert(1)</script><img src=x onerror="alert(2)">&lt;',
    "escape": "\x1b[2J\x1b]0;owned\x07 \x9b31m",
    "nothing": "a\x00b\x7f",
    "direction": "\u202etxt.exe\u2066x",
    "half": "\ud800 \udcff",
    "markdown": "![i](http://x.y/i.png) [a](javascript:b) [c][d] <http://x.y> https://x.y www.x.y",
    "table": "a | b\n| --- |\n# head `code` **bold** _it_ ~~no~~ $x^2$ &amp;",
    "tex": r"\input{/etc/passwd} \write18{x} $a_b^c$ # % & ~ {",
    "formula": '=HYPERLINK("http://x.y")',
    "markup": "[bold red]x[/] [/nothing] :smile: [link=http://x.y]y[/link]",
    "quotes": "a'b\"c\\d\\\\ datum['x'] {{ y }} <% z %>",
    "member": "constructor",
    "lines": "a\r\nb\rc\u2028d\x85e",
}
UNTRUSTED = st.text(
    st.one_of(st.characters(), st.sampled_from("[]()!|<>&*_`#$\\\x1b\x00\ud800:/@."))
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A study that has every text as the name of an arm, and all of them wherever else one goes."""
    names = ["all-linear", *TEXTS]
    study = simulated_study(
        tmp_path_factory.mktemp("hostile"),
        arms=[SimulatedArm(name, 0.01 * place) for place, name in enumerate(names)],
        seeds=(0,),
        num_examples=6,
        num_answers=3,
        num_layers=2,
        max_steps=6,
        repeats=0,
        extra_seeds=(),
        unfinished=[("lines", 0)],
        scores=False,
    )
    everything = " ".join(TEXTS.values())
    config = {**study.study["config"], "model": everything}
    config["data"] = {**config["data"], "source": everything}
    for path in study.path.glob("runs/*/examples.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        texts = ("instruction", "input", "reference", "base_generated", "generated")
        rows[0] |= dict.fromkeys(texts, everything)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(
        study,
        name=everything,
        study={**study.study, "question": everything, "config": config},
        arms=tuple(replace(arm, name=TEXTS.get(arm.name, arm.name)) for arm in study.arms),
        runs=tuple(
            replace(
                run,
                arm=TEXTS.get(run.arm, run.arm),
                result=replace(run.result, device=everything, signature=everything),
            )
            for run in study.runs
        ),
        unfinished=tuple({**run, "error": everything} for run in study.unfinished),
    )


@pytest.fixture(scope="module")
def written(hostile):
    return contents_of(hostile, judge(hostile))


class Page(HTMLParser):
    """Tags with their attributes, scripts by id, and the text outside of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.shown, self.scripts, self._inside = [], [], {}, ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            name = self.tags[-1][1].get("id")
            self.scripts[name] = self.scripts.get(name, "") + data
        elif self._inside != "style":
            self.shown.append(data)


@pytest.fixture(scope="module")
def page(written):
    return Page(page_of(written))


def test_the_page_has_no_tag_of_a_text(page):
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 3
    assert not {"img", "iframe", "object", "link", "base"} & set(names)
    addresses = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert all(address.startswith("#") for address in addresses)
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_page_shows_every_text_as_it_is(page, text):
    shown = "".join(page.shown)
    assert inert(text) in shown
    assert active_character(shown) is None


def test_a_template_s_marks_in_a_text_are_not_read(page):
    assert "{{ y }} <% z %>" in "".join(page.shown)


@pytest.fixture(scope="module")
def markdown(written, hostile):
    """Every Markdown text of a report, by name."""
    one_arm = replace(
        hostile,
        arms=hostile.arms[:1],
        runs=tuple(run for run in hostile.runs if run.arm == "all-linear"),
    )
    texts = {table.name: markdown_of(table) for table in written.tables}
    texts["answer"] = "\n\n".join(map(markdown_paragraph, written.answer))
    return texts | {"baseline": baseline_table(one_arm)}


PLAIN = {
    *("table", "thead", "tbody", "tr", "th", "td", "inline", "paragraph", "text", "softbreak"),
    "text_special",
}


def kinds_of(markdown):
    """The kinds of what a reader of Markdown finds in a text."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(markdown)
    found = [*tokens, *(child for token in tokens for child in token.children or ())]
    return {re.sub("_(open|close)$", "", token.type) for token in found}


@pytest.mark.parametrize(
    "name", ["verdicts", "untuned", "costs", "criteria", "evidence", "unfinished", "answer"]
)
def test_markdown_holds_text_and_tables_only(markdown, name):
    assert kinds_of(markdown[name]) <= PLAIN
    assert active_character(markdown[name]) is None
    assert not re.search(r"(?<!\\):(?=//)|www\.|(?<!\\)\$", markdown[name])


def test_every_row_of_a_table_has_its_cells(markdown):
    lines = [line for line in markdown["verdicts"].splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert len(lines) == 2 + 1 + len(TEXTS)


def test_a_signature_is_one_piece_of_code(markdown):
    assert kinds_of(markdown["baseline"]) <= PLAIN | {"code_inline"}


@pytest.fixture(scope="module")
def latex(written):
    return macros_file(written) + limits_file(written) + "".join(map(latex_of, written.tables))


def test_latex_has_no_command_of_a_text(latex):
    assert not re.search(r"\\(input|write|href)", latex)
    assert active_character(latex) is None
    bare = re.sub(r"\\.", "", latex)
    assert bare.count("{") == bare.count("}")
    starts = [line for line in latex.splitlines() if re.match(r"(\\item )?[\[*]", line)]
    assert not starts


FIGURES = ("forest", "loss-training", "cost-step-time-s", "placement-maps")


@pytest.fixture(scope="module")
def drawn(written):
    figures = {figure.name: figure for figure in written.figures.on_paper()}
    return "".join(svg_of(themed(figures[name].spec)) for name in FIGURES)


def test_a_figure_draws_every_name(written, drawn):
    pieces = [ElementTree.fromstring(piece + "</svg>") for piece in drawn.split("</svg>")[:-1]]
    shown = [text for piece in pieces for text in piece.itertext()]
    assert len(pieces) == len(FIGURES)
    for text in TEXTS.values():
        # A long name is cut on an axis.
        assert any(figure_text(text)[:12].strip() in part for part in shown), text
    assert not re.search("<(script|img|a) ", drawn)


def test_a_figure_in_the_page_cannot_end_its_script(page):
    specs = json.loads(page.scripts["figures"])
    assert inert(TEXTS["html"]) in json.dumps(specs, ensure_ascii=False).replace('\\"', '"')


@pytest.mark.parametrize("width", [60, 160])
def test_the_terminal_obeys_nothing(hostile, width):
    file = io.StringIO()
    screen(file=file, width=width).print(verdict_view(hostile, judge(hostile), width=width))
    assert active_character(file.getvalue()) is None
    assert "[bold red]x[/]" in " ".join(file.getvalue().split())


@given(UNTRUSTED)
def test_no_text_becomes_markdown(text):
    assert kinds_of(markdown_paragraph("a " + text)) <= PLAIN
    assert kinds_of(markdown_paragraph(text)) <= PLAIN
    row = f"| a | b |\n|---|---|\n| {markdown_text(text)} | {markdown_text(text)} |"
    assert kinds_of(row) <= PLAIN
    assert kinds_of(markdown_code(text + "a")) <= PLAIN | {"code_inline"}


@given(UNTRUSTED)
def test_no_text_becomes_latex(text):
    escaped = escape(text)
    assert active_character(escaped) is None
    assert not re.match(r"[\[*]", escaped)
    ours = r"\\(text\w+\{\}|[&%$#_{}])|\$[-\\\w]+\$|^\{[\[*]\}"
    assert not set(re.sub(ours, "", escaped)) & set("\\&%$#_{}~^")
