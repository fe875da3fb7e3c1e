"""The whole report of a simulated study: self-contained, same bytes, nothing typed, nothing run."""

import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from analysis.stats.simulated import ARMS, SimulatedArm, simulated_study, write_study
from loracle.analysis.verdicts import judge
from loracle.errors import RunFolderError
from loracle.report import study_markdown, write_report
from loracle.report.terminal.verdicts import verdict_view
from loracle.report.text.latex import macro_name

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & {{ 7 * 7 }}"
EVIL_ARM = "<img src=x onerror=alert(3)> & {{ 7 * 7 }} %"


class Tags(HTMLParser):
    """Every tag with its attributes, and the text outside scripts and styles."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self._inside = [], [], None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text.append(data)

    def all(self, tag):
        return [attributes for found, attributes in self.tags if found == tag]


@pytest.fixture(scope="module")
def page(report):
    return Tags((report / "index.html").read_text(encoding="utf-8"))


def test_the_report_has_its_files(report):
    names = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    assert {"index.html", "paper.tex", "macros.tex", "verdicts.json"} <= names
    for stem in ("forest", "loss-training", "loss-gap", "loss-validation", "placement-maps"):
        assert {f"figures/{stem}.svg", f"figures/{stem}.pdf"} <= names
    for stem in ("verdicts", "untuned", "bleu", "costs", "tradeoffs", "orderings", "criteria"):
        assert {f"tables/{stem}.md", f"tables/{stem}.tex"} <= names
    for pdf in report.glob("figures/*.pdf"):
        assert pdf.read_bytes().startswith(b"%PDF")


def test_same_records_give_the_same_bytes(study, report, tmp_path):
    again = write_report(study.path, out=tmp_path / "again").parent
    for path in report.rglob("*"):
        if path.is_file():
            assert (again / path.relative_to(report)).read_bytes() == path.read_bytes(), path.name


def test_the_page_asks_for_nothing_outside_itself(report, page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith("#"), (tag, name)
    assert not page.all("link")
    assert not page.all("iframe")
    html = (report / "index.html").read_text(encoding="utf-8")
    without_scripts = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert "http://" not in without_scripts
    assert "https://" not in without_scripts
    assert "url(" not in without_scripts
    assert "@import" not in without_scripts
    specs = re.search(r'id="figures">(.*?)</script>', html, flags=re.DOTALL)[1]
    assert "http" not in specs


def test_the_contents_lead_to_the_sections_in_order(page):
    links = [attributes["href"][1:] for attributes in page.all("a")]
    assert len(links) == 10
    anchors = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert [anchor for anchor in anchors if anchor in links] == links
    assert len(set(anchors)) == len(anchors)


def test_every_drawn_figure_has_its_data_and_its_words(report, page):
    html = (report / "index.html").read_text(encoding="utf-8")
    specs = json.loads(re.search(r'id="figures">(.*?)</script>', html, flags=re.DOTALL)[1])
    places = [attributes for attributes in page.all("div") if "data-figure" in attributes]
    assert {place["data-figure"] for place in places} == set(specs)
    assert all(len(place["aria-label"]) > 30 for place in places)


def test_the_verdict_table_comes_first_and_is_sorted_by_effect(page, study, report):
    tables = [attributes["id"] for attributes in page.all("table")]
    assert tables[0] == "table-verdicts"
    lines = (report / "tables" / "verdicts.md").read_text(encoding="utf-8").splitlines()
    arms = [line.split(" | ")[0].removeprefix("| ") for line in lines[2 : 2 + len(ARMS)]]
    verdicts = judge(study)
    losses = [0.0 if arm == "all-linear" else verdicts.comparison(arm).difference for arm in arms]
    assert losses == sorted(losses)


def test_the_page_says_what_failed_and_where_it_comes_from(page):
    text = " ".join("".join(page.text).split())
    assert "step 7: the loss is nan" in text
    assert "3 seeds, 60 validation examples" in text
    assert "Which placement learns most for the parameters it trains?" in text
    assert "What this study cannot show" in text


def test_no_text_of_a_study_can_become_markup(tmp_path):
    path = write_study(
        tmp_path / "study",
        arms=(SimulatedArm("all-linear"), SimulatedArm(EVIL_ARM)),
        seeds=(0, 1),
        num_examples=8,
        num_answers=4,
        repeats=0,
        extra_seeds=(),
    )
    for file in path.glob("runs/*/examples.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[0] |= {"instruction": EVIL, "input": EVIL, "reference": EVIL, "generated": EVIL}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tags = Tags(write_report(path).read_text(encoding="utf-8"))
    assert len(tags.all("script")) == 3
    assert not tags.all("img")
    text = "".join(tags.text)
    assert EVIL in text
    assert EVIL_ARM in text


def test_answers_are_shown_beside_reference_and_untuned(page, study, arm_names):
    text = "".join(page.text)
    first = study.runs[0].examples[0]
    assert first["reference"] in text
    assert first["base_generated"] in text
    assert "Write sentence 0." in text
    for arm in arm_names:
        assert study.runs_of(arm)[0].examples[0]["generated"] in text
    assert len(page.all("article")) == 4 * (2 + len(arm_names))
    assert "cut at the token limit" in text


def test_the_verdicts_are_those_of_the_statistics(report, study):
    data = json.loads((report / "verdicts.json").read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(judge(study).to_json()))


def test_the_paper_types_no_number(report):
    text = (report / "paper.tex").read_text(encoding="utf-8")
    body = text.split(r"\begin{document}")[1]
    assert not re.search(r"\d", body)


def test_the_paper_uses_only_what_there_is(report):
    text = (report / "paper.tex").read_text(encoding="utf-8")
    macros = (report / "macros.tex").read_text(encoding="utf-8")
    defined = re.findall(r"\\newcommand\{\\(\w+)\}", macros)
    assert len(set(defined)) == len(defined)
    body = text.split(r"\begin{document}")[1]
    ours = set(re.findall(r"\\([A-Z]\w+)", body))
    assert ours
    assert ours <= set(defined)
    for file in re.findall(r"\\input\{([^}]+)\}", text):
        assert (report / f"{file}.tex").is_file(), file
    for figure in re.findall(r"\\panel\{([^}]+)\}", body):
        assert (report / "figures" / f"{figure}.pdf").is_file(), figure
    labels = set(re.findall(r"\\ref\{tab:(\w+)\}", body))
    assert labels <= {path.stem for path in report.glob("tables/*.tex")}


def test_macros_hold_the_figures_of_the_verdicts(report, study):
    macros = (report / "macros.tex").read_text(encoding="utf-8")
    found = judge(study).comparison("attention")
    value = f"+{found.difference:.4f} [+{found.interval[0]:.4f}, +{found.interval[1]:.4f}]"
    assert f"\\newcommand{{\\{macro_name('loss-difference', 'attention')}}}{{{value}}}" in macros


def test_every_latex_file_closes_what_it_opens(report):
    for path in report.rglob("*.tex"):
        text = path.read_text(encoding="utf-8")
        opened = re.findall(r"\\begin\{(\w+)\}", text)
        closed = re.findall(r"\\end\{(\w+)\}", text)
        assert sorted(opened) == sorted(closed), path.name
        plain = re.sub(r"\\[{}\\]|(?<!\\)%.*", "", text)
        assert plain.count("{") == plain.count("}"), path.name


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="TeX is not installed")
def test_the_paper_compiles(report, tmp_path):
    folder = shutil.copytree(report, tmp_path / "paper")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    for _ in range(2):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:]
    assert "undefined" not in done.stdout
    assert "Overfull" not in done.stdout, "something is wider than the page"
    assert (folder / "paper.pdf").stat().st_size > 10_000


def test_arms_with_names_alike_keep_their_own_macros(tmp_path):
    path = write_study(
        tmp_path,
        arms=(SimulatedArm("all-linear"), SimulatedArm("a b", 0.1), SimulatedArm("a-b", 0.2)),
        num_answers=0,
    )
    folder = write_report(path).parent
    macros = (folder / "macros.tex").read_text(encoding="utf-8")
    assert macros.count(r"\newcommand{\LossDifferenceAB}") == 1
    assert macros.count(r"\newcommand{\LossDifferenceABAgain}") == 1
    assert "No answers were generated" in (folder / "paper.tex").read_text(encoding="utf-8")
    assert not (folder / "tables" / "bleu.tex").exists()


def test_a_bare_study_has_sentences_instead_of_panels(bare_study, tmp_path):
    tags = Tags(write_report(bare_study.path, out=tmp_path / "report").read_text(encoding="utf-8"))
    text = " ".join("".join(tags.text).split())
    assert "without a second seed there is no interval" in text
    assert "No run of this study generated answers." in text
    assert "Every planned run completed." in text
    assert "No completed run measured the latency" in text
    assert "n/a" in text


def test_figures_of_an_earlier_report_do_not_stay(bare_study, tmp_path):
    out = tmp_path / "report"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "forest-of-old.svg").write_text("old")
    (out / "figures" / "notes.txt").write_text("mine")
    write_report(bare_study.path, out=out)
    assert not (out / "figures" / "forest-of-old.svg").exists()
    assert (out / "figures" / "notes.txt").read_text() == "mine"


def test_a_report_stands_in_its_study_unless_told_otherwise(tmp_path):
    path = write_study(tmp_path, arms=ARMS[:2], seeds=(0, 1), num_examples=5, num_answers=0)
    assert write_report(path) == path / "report" / "index.html"


def test_what_is_no_study_has_no_report(tmp_path):
    with pytest.raises(RunFolderError, match="not a study"):
        write_report(tmp_path)


def test_a_place_that_cannot_be_written_is_one_clear_line(bare_study, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="a file is where a folder should be"):
        write_report(bare_study.path, out=tmp_path / "file")


def test_a_study_without_environment_files_still_reports(tmp_path):
    study = simulated_study(tmp_path, arms=ARMS[:2], seeds=(0, 1), num_examples=5, num_answers=0)
    for run in study.runs:
        (run.path / "environment.json").unlink()
        (run.path / "data.json").unlink()
    text = "".join(Tags(write_report(tmp_path).read_text(encoding="utf-8")).text)
    assert "commit n/a" in text
    assert "n/a training" in text


def test_a_report_needs_no_torch():
    code = "import sys, loracle.report as _; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_terminal_shows_whole_words_at_any_width(study):
    verdicts = judge(study)
    for width in (80, 140):
        console = Console(width=width, file=io.StringIO())
        console.print(verdict_view(study, verdicts, width=width))
        shown = console.file.getvalue()
        assert "…" not in shown
        for arm in study.arms:
            assert arm.name in shown
        assert ("p (Holm)" in shown) == (width == 140)


def test_markdown_is_the_answer_and_the_verdict_table(tmp_path):
    folder = write_study(tmp_path / "study")
    text = study_markdown(folder)
    write_report(folder)
    table = (folder / "report" / "tables" / "verdicts.md").read_text(encoding="utf-8")
    assert text.endswith(table)
    assert text.startswith("By validation loss, of ")
