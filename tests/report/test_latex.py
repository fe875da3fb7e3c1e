"""Text as LaTeX takes it: nothing in a name can be a command."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.report.text.latex import escape, escape_number, macro_name, macros_of

# Commands and braces that escape itself may write.
OURS = re.compile(
    r"\\[&%$#_{}]|\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar"
    r"|textquotedbl)\{\}|\$(\\times|\\pm|\\alpha|\\beta|-)\$|~|^\{[*\[]\}"
)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("last_8 & 50%", r"last\_8 \& 50\%"),
        ("a\\b{c}", r"a\textbackslash{}b\{c\}"),
        ("p < 0.05", r"p \textless{} 0.05"),
        ("two\nlines", "two lines"),
        ("*bold", "{*}bold"),
        ("[1]", "{[}1]"),
        ("\u4f60", "U+4F60"),
    ],
)
def test_special_characters_are_printed(text, escaped):
    assert escape(text) == escaped


@given(st.text())
def test_no_text_can_be_a_command(text):
    rest = OURS.sub("", escape(text))
    assert not set(rest) & set("\\{}$&#%_^~\n")


def test_only_the_sign_of_a_number_becomes_a_minus():
    assert escape_number("-0.5 [-1.0, +2.0] last-8") == "$-$0.5 [$-$1.0, +2.0] last-8"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("loss", "last-8"), "LossLastEight"),
        (("gap", "attention_qv"), "GapAttentionQv"),
        (("x", "every-2nd"), "XEveryTwond"),
    ],
)
def test_a_macro_is_named_in_letters(words, name):
    assert macro_name(*words) == name


def test_macros_are_escaped():
    text = macros_of({"Answer": "50% & more"})
    assert r"\newcommand{\Answer}{50\% \& more}" in text
