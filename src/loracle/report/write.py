"""Writes a study's report: page, figures, tables, paper and verdicts, from its records alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loracle.analysis.verdicts import judge
from loracle.records.files import disk_faults, strict_json, write_durably
from loracle.records.names import PAGE, REPORT, VERDICTS
from loracle.records.study_folder import read_study
from loracle.report.contents import Contents, contents_of
from loracle.report.figures.vega import pdf_of, svg_of, themed
from loracle.report.page.page import page_of
from loracle.report.paper.paper import limits_file, macros_file, paper_of
from loracle.report.tables.table import latex_of, markdown_of
from loracle.report.text.markdown import markdown_paragraph


def write_report(study_folder: Path, *, out: Path | None = None) -> Path:
    """Writes the report of a study, by default into its folder, and returns the page.

    The same records give the same bytes: dates come from the results. Figures and tables of an
    earlier report are removed.

    Raises:
        RunFolderError: If there is no study with a completed run, or it cannot be written.
    """
    study = read_study(study_folder)
    verdicts = judge(study)
    contents = contents_of(study, verdicts)
    folder = out or study_folder / REPORT
    files = dict(_files(contents))
    with disk_faults(folder):
        for name in ("figures", "tables"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            _remove_others(folder / name, keep=set(files))
    for path, content in files.items():
        write_durably(folder / path, content)
    return folder / PAGE


def study_markdown(study_folder: Path) -> str:
    """Returns a study's answer and its verdict table as Markdown.

    Raises:
        RunFolderError: If there is no study with a completed run.
    """
    study = read_study(study_folder)
    contents = contents_of(study, judge(study))
    answer = [markdown_paragraph(sentence) for sentence in contents.answer]
    return "\n\n".join([*answer, markdown_of(contents.tables.verdicts)])


def _files(contents: Contents) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of every file; the page last, so that it follows the others."""
    for figure in contents.figures.on_paper():
        if figure.spec is not None:
            svg = svg_of(themed(figure.spec))
            yield f"figures/{figure.name}.svg", svg.encode()
            yield f"figures/{figure.name}.pdf", pdf_of(svg)
    for table in contents.tables:
        yield f"tables/{table.name}.md", markdown_of(table).encode()
        yield f"tables/{table.name}.tex", latex_of(table).encode()
    yield "tables/limits.tex", limits_file(contents).encode()
    yield "macros.tex", macros_file(contents).encode()
    yield "paper.tex", paper_of(contents).encode()
    verdicts = strict_json(contents.verdicts.to_json(), origin=VERDICTS, indent=2)
    yield VERDICTS, (verdicts + "\n").encode()
    yield PAGE, page_of(contents).encode()


def _remove_others(folder: Path, *, keep: set[str]) -> None:
    """Removes files of an earlier report that this one does not write."""
    for path in folder.iterdir():
        is_ours = path.suffix in (".svg", ".pdf", ".md", ".tex")
        if is_ours and f"{folder.name}/{path.name}" not in keep:
            path.unlink()
