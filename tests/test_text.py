"""Text that a terminal, a page or a figure must show and never obey."""

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from loracle.screen import screen
from loracle.text import active_character, inert, one_line

# Any character, half pairs of surrogates too, the dangerous ones often.
ANYTHING = st.text(st.one_of(st.characters(), st.sampled_from("\x00\x1b\r\n\x9b\u202e\ud800\\[")))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("loss\t1.5\n", "loss\t1.5\n"),
        ("a\r\nb", "a\nb"),
        ("a\rb", "a\\x0db"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b2J\x07", "\\x9b2J\\x07"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\u2066a\u2069", "\\u2066a\\u2069"),
        ("\udcff", "\\udcff"),
        ("\ufffe\U000e0041", "\\ufffe\\U000e0041"),
        ("naïve 漢字 עברית 👩‍👩‍👧", "naïve 漢字 עברית 👩‍👩‍👧"),
    ],
)
def test_what_acts_is_shown_as_its_code(text, shown):
    assert inert(text) == shown


@given(ANYTHING)
def test_inert_text_holds_nothing_that_acts_and_stays_as_it_is(text):
    shown = inert(text)
    shown.encode()
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"]
    assert active_character(shown) is None
    assert inert(shown) == shown
    assert (active_character(text.replace("\r\n", "\n")) is None) == (
        shown == text.replace("\r\n", "\n")
    )


@given(ANYTHING)
def test_one_line_is_one_line(text):
    assert len(one_line(text + "a").splitlines()) == 1


@given(ANYTHING)
def test_the_screen_prints_no_code_but_its_own(text):
    file = io.StringIO()
    table = Table(text, title=text)
    table.add_row(text)
    console = screen(file=file, width=200)
    for printed in (text, Text(text), table):
        console.print(printed)
    assert active_character(file.getvalue()) is None


def test_on_a_terminal_only_styles_of_ours_are_obeyed():
    file = io.StringIO()
    console = screen(file=file, force_terminal=True, width=200)
    console.print(Text("\x1b[2J[bold]x[/]:smile:", style="bold"))
    console.print("[red]\x1b]0;title\x07[/nothing]")
    assert file.getvalue() == (
        "\x1b[1m\\x1b[2J[bold]x[/]:smile:\x1b[0m\n[red]\\x1b]0;title[/nothing]\n"
    )
