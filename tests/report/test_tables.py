"""One table as Markdown and LaTeX."""

import pytest

from loracle.report.tables.table import Column, Table, latex_of, markdown_of


@pytest.fixture
def table():
    return Table(
        name="verdicts",
        caption="Three seeds | one device.",
        columns=(Column("arm", align="left"), Column("loss", "nats per token"), Column("p")),
        rows=(("last_8 | x", "-0.0123 [-0.0200, -0.0010]", "< 0.001"), ("b", "n/a", "n/a")),
        marks=("better", ""),
    )


def test_markdown_has_one_cell_per_column_whatever_is_in_a_name(table):
    lines = markdown_of(table).splitlines()
    assert lines[0] == "| arm | loss, nats per token | p |"
    assert lines[1] == "|---|---:|---:|"
    assert lines[2] == r"| last_8 \| x | -0.0123 [-0.0200, -0.0010] | \< 0.001 |"
    assert lines[-1] == r"Three seeds \| one device."


def test_latex_has_booktabs_rules_units_and_real_minus_signs(table):
    text = latex_of(table)
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count(f"\\{rule}") == 1
    assert r"\begin{tabular}{@{}lrr@{}}" in text
    assert r" & nats per token &  \\" in text
    assert r"last\_8 \textbar{} x & $-$0.0123 [$-$0.0200, $-$0.0010] & \textless{} 0.001 \\" in text
    assert r"\label{tab:verdicts}" in text


def test_a_page_gets_real_minus_signs_in_columns_of_numbers_only(table):
    (mark, cells), _ = table.cells()
    assert mark == "better"
    assert cells[0][1] == "last_8 | x"
    assert cells[1][1].startswith("\N{MINUS SIGN}0.0123")


def test_columns_can_be_chosen_by_title(table):
    narrow = table.only("arm", "p", name="p-values")
    assert [column.title for column in narrow.columns] == ["arm", "p"]
    assert narrow.rows == (("last_8 | x", "< 0.001"), ("b", "n/a"))
    assert narrow.marks == table.marks


def test_a_row_that_does_not_fit_its_columns_is_a_bug():
    with pytest.raises(AssertionError, match="narrow"):
        Table("narrow", "", (Column("a"),), rows=(("1", "2"),))
