"""A value is what it looks like: the core schema of YAML 1.2, in a file and on a command line."""

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.config.files import dump_yaml
from loracle.config.strict_yaml import load_value, load_yaml
from loracle.errors import ConfigError
from loracle.text import active_character

BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
SCALARS = {
    "012": 12,
    "0777": 777,
    "-08": -8,
    "+5": 5,
    "0o17": 15,
    "0x1F": 31,
    "0b11": "0b11",
    "1_000": "1_000",
    "1:30": "1:30",
    "20:10:05": "20:10:05",
    "1e3": 1000.0,
    "3e-4": 3e-4,
    ".5": 0.5,
    "5.": 5.0,
    "1.2.3": "1.2.3",
    ".inf": math.inf,
    "-.INF": -math.inf,
    "true": True,
    "FALSE": False,
    "tRue": "tRue",
    "yes": "yes",
    "no": "no",
    "on": "on",
    "Off": "Off",
    "y": "y",
    "null": None,
    "~": None,
    "nUll": "nUll",
    "None": "None",
    "2024-01-01": "2024-01-01",
    "2001-12-14t21:59:43.10-05:00": "2001-12-14t21:59:43.10-05:00",
    "=": "=",
    "<<": "<<",
    "path:/a/b#c": "path:/a/b#c",
}


@pytest.mark.parametrize(("word", "value"), SCALARS.items())
def test_a_word_is_the_same_in_a_file_in_a_list_and_on_the_command_line(word, value):
    found = [
        load_value(word, origin="--set x"),
        load_value(f"[{word}]", origin="--set x")[0],
        load_yaml(f"x: {word}", origin="a file")["x"],
    ]
    assert found == [value] * 3
    assert {type(one) for one in found} == {type(value)}


@pytest.mark.parametrize(
    "text", [*SCALARS, "", " ", "#", "a: b", "- a", "a\n\n b", "\u00e9 #", "'"]
)
def test_a_text_that_is_dumped_is_that_text_for_every_reader(text):
    tree = {"a": text, "b": [text], "c": 1e-8, "d": 1e22, "e": -3, "f": False, "g": None}
    dumped = dump_yaml(tree)
    assert load_yaml(dumped, origin="x") == yaml.safe_load(dumped) == tree


@settings(deadline=None, max_examples=200)
@given(st.text().filter(lambda text: active_character(text) is None))
def test_any_text_is_dumped_as_itself(text):
    """Texts that would act on a screen are refused, wherever they stand."""
    dumped = dump_yaml({"a": text, "b": [text]})
    assert load_yaml(dumped, origin="x") == yaml.safe_load(dumped) == {"a": text, "b": [text]}


@settings(deadline=None)
@given(st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_read_as_python_writes_them(whole, real):
    assert load_value(str(whole), origin="x") == load_value(f"{whole:+025d}", origin="x") == whole
    assert load_value(repr(real), origin="x") == real
    tree = {"a": whole, "b": real}
    assert load_yaml(dump_yaml(tree), origin="x") == tree


@pytest.mark.parametrize(
    "word", ["a #b", "#b", "a: b", "- a", "&a", "*a", "!!int 3", "|", "? a", "@a", "%a", "a\tb"]
)
def test_on_the_command_line_only_brackets_and_quotes_have_a_meaning(word):
    assert load_value(word, origin="--set x") == word
    assert load_value(f"  {word} ", origin="--set x") == word
    assert load_value(f'{{k: "{word}"}}', origin="--set x") == {"k": word}


def test_merged_and_repeated_parts_are_read():
    text = "a: &a {b: 1, c: 2}\nd: {<<: *a, c: 3}\ne: *a\nf: {g: &g {<<: *a, b: 0}}\nh: {<<: *g}"
    tree = load_yaml(text, origin="x")
    assert tree["d"] == {"b": 1, "c": 3}
    assert tree["e"] == tree["a"] == {"b": 1, "c": 2}
    assert tree["h"] == tree["f"]["g"] == {"b": 0, "c": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "x:2: key 'c' is given twice"),
        ("a: 1\n<<: {b: 1}\n<<: {c: 1}", "x:3: key '<<' is given twice"),
        ("012: 1", "x:1: key 012 is not a word"),
        ("true: 1", "x:1: key true is not a word"),
        ("null: 1", "x:1: key null is not a word"),
        ("{a: 1}: 1", "x:1: a list or mapping cannot be a key"),
        ("a: &a [1, *a]", "x:1: a part that stands inside of itself"),
        ("a: *a", "x:1: found undefined alias 'a'"),
        ("a: !!int 1:30", "x:1: '1:30' is no int"),
        ("a: !!bool yes", "x:1: 'yes' is no bool"),
        ("a: !!float 0x1", "x:1: '0x1' is no float"),
        ("a: !!str [b]", "x:1: expected a scalar node, but found sequence"),
        ("a: !!timestamp 2001-01-01", "x:1: could not determine a constructor for the tag"),
        ("a: !!set {b, c}", "x:1: could not determine a constructor for the tag"),
        ("a: 9223372036854775808", "x:1: 9223372036854775808 is too large for a whole number"),
        ("a: " + "9" * 9999, "x:1: 9999"),
        (BOMB, "x: repeats its parts to more than 100,000 values"),
        ("[" * 5000, "x: nested too deeply"),
        ("a: \udcff", "x: not valid YAML (unacceptable character"),
    ],
)
def test_what_has_no_one_meaning_is_refused_with_its_line(text, message):
    with pytest.raises(ConfigError) as caught:
        load_yaml(text, origin="x")
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 120


def test_written_out_kinds_are_of_the_same_schema():
    text = "{a: !!int 012, b: !!str 012, c: !!float 12, d: !!null ~}"
    assert load_yaml(text, origin="x") == {"a": 12, "b": "012", "c": 12.0, "d": None}


def test_a_value_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match=r"^--set x: value: holds the character U\+DCFF"):
        load_value("a\udcff", origin="--set x")
    with pytest.raises(ConfigError, match="too large"):
        load_value("9" * 30, origin="--set x")
