"""The split: what asks the same is on one side, the count is the nearest, order does not matter."""

import itertools
import os
import random
import subprocess
import sys
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_alpaca import record, records_of

from loracle.data import Record, split_records
from loracle.data.split import draw_records, group_records, normalized
from loracle.errors import DataError

SEEDS = st.integers(min_value=0, max_value=2**31)
FRACTIONS = st.floats(min_value=0.01, max_value=0.99)


def spelled(index: int, style: int) -> str:
    """One text in several spellings."""
    text = f"Describe: item {index}"
    return (text, text.upper() + "!", f"  {text}\n . ", text.replace(": ", "\u00a0\t"))[style]


def asked(one: Record) -> str:
    """What a record asks, by a reading of its own: letters, numbers and symbols."""
    text = unicodedata.normalize("NFKC", f"{one.instruction} {one.input}").casefold()
    return " ".join("".join(" " if char in ":!.,'" else char for char in text).split())


@st.composite
def recurring_records(draw):
    """Records that recur in groups of any size, in several spellings, in one or two fields."""
    names = draw(st.lists(st.integers(0, 12), min_size=2, max_size=40))
    names += [0, 1]
    styles = [(draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in names]
    where = draw(st.sampled_from(["instruction", "input", "both"]))
    records = []
    for row, (name, (one, other)) in enumerate(zip(names, styles, strict=True), start=1):
        if where == "instruction":
            records.append(record(spelled(name, one), row=row))
        elif where == "input":
            records.append(record("Sort it.", context=spelled(name, one), row=row))
        else:
            texts = {"context": spelled(name % 5, other)} if name % 5 else {}
            records.append(record(spelled(name, one), **texts, row=row))
    return records


@given(records=recurring_records(), validation_frac=FRACTIONS, seed=SEEDS)
def test_what_asks_the_same_never_straddles_and_no_record_is_lost(records, validation_frac, seed):
    split = split_records(records, validation_frac=validation_frac, seed=seed)
    train, validation = ({asked(one) for one in part} for part in (split.train, split.validation))
    assert train
    assert validation
    assert not train & validation
    assert sorted([*split.train, *split.validation], key=lambda one: one.row) == records
    for part in (split.train, split.validation):
        assert [one.row for one in part] == sorted(one.row for one in part)


@pytest.mark.parametrize("num_instructions", [1, 2, 5])
@pytest.mark.parametrize("validation_frac", [0.1, 0.2, 0.5])
def test_few_instructions_with_many_inputs_are_split_at_the_fraction(
    num_instructions, validation_frac
):
    records = [
        record(f"Do task {row % num_instructions}.", context=f"item {row}", row=row)
        for row in range(1, 201)
    ]
    split = split_records(records, validation_frac=validation_frac, seed=0)
    assert len(split.validation) == 200 * validation_frac
    assert len({one.instruction for one in split.validation}) == num_instructions
    assert len({one.instruction for one in split.train}) == num_instructions


def test_inputs_do_not_move_a_record_whose_instruction_is_its_own():
    plain = records_of(*(f"item {index // 2}" for index in range(60)))
    with_inputs = [replace(one, input=f"as {one.instruction}") for one in plain]
    rows = [
        [one.row for one in split_records(records, validation_frac=0.2, seed=0).validation]
        for records in (plain, with_inputs)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("Name three colors: red, ...", ""), ("name three colors red", "")),
        (("Sum up.", "A cat -- it's black."), ("sum up", "a cat, its black")),
        (("Translate:", "Hello, you!"), ("Translate", "HELLO you")),
        (("Translate: Hello", ""), ("Translate:", "Hello")),
    ],
)
def test_near_duplicates_are_one_group(one, other):
    records = [record(*pair[:1], context=pair[1], row=row) for row, pair in enumerate((one, other))]
    assert len(group_records(records)) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("Add.", "1 + 2"), ("Add.", "1 + 3")),
        (("Add.", "1 + 2"), ("Add.", "1 = 2")),
        (("Judge.", "?"), ("Judge.", "!")),
        (("Judge.", ""), ("Judge.", "It rains.")),
        (("Add.", "1.5"), ("Add.", "15")),
        (("a\0b", ""), ("a", "b")),
    ],
)
def test_records_that_ask_differently_are_two_groups(one, other):
    records = [record(*pair[:1], context=pair[1], row=row) for row, pair in enumerate((one, other))]
    assert sorted(map(len, group_records(records).values())) == [1, 1]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=9),
    validation_frac=FRACTIONS,
    seed=SEEDS,
)
def test_the_validation_count_is_the_nearest_that_whole_groups_reach(sizes, validation_frac, seed):
    records = records_of(*(f"item {i}" for i, size in enumerate(sizes) for _ in range(size)))
    count = len(split_records(records, validation_frac=validation_frac, seed=seed).validation)
    reachable = {
        sum(chosen)
        for number in range(1, len(sizes))
        for chosen in itertools.combinations(sizes, number)
    }
    expected = validation_frac * len(records)
    assert count in reachable
    assert abs(count - expected) == min(abs(total - expected) for total in reachable)


@given(records=recurring_records(), seed=SEEDS, shuffle=st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_the_file(records, seed, shuffle):
    held_out = {
        one.row for one in split_records(records, validation_frac=0.3, seed=seed).validation
    }
    shuffled = list(records)
    shuffle.shuffle(shuffled)
    split = split_records(shuffled, validation_frac=0.3, seed=seed)
    assert {one.row for one in split.validation} == held_out


def test_seeds_split_differently_and_a_seed_splits_alike():
    records = records_of(*(f"item {index}" for index in range(100)))
    splits = [split_records(records, validation_frac=0.2, seed=seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0].validation != splits[2].validation
    assert [len(split.validation) for split in splits] == [20, 20, 20]


def test_over_seeds_every_record_is_held_out_at_its_fraction():
    records = records_of(*(f"item {index}" for index in range(20)))
    counts = dict.fromkeys(range(1, 21), 0)
    for seed in range(1000):
        for one in split_records(records, validation_frac=0.2, seed=seed).validation:
            counts[one.row] += 1
    # Binomial(1000, 0.2): standard deviation 12.6, so 5 of them is 63.
    assert all(137 <= count <= 263 for count in counts.values())


def test_the_split_does_not_depend_on_hash_randomisation():
    script = (
        "from loracle.data import Record, split_records\n"
        "records = [Record(i, f'item {i % 30}', '', 'x') for i in range(1, 60)]\n"
        "print([one.row for one in split_records(records, validation_frac=.2, seed=3).validation])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    records = [Record(i, f"item {i % 30}", "", "x") for i in range(1, 60)]
    here = split_records(records, validation_frac=0.2, seed=3).validation
    assert outputs == {f"{[one.row for one in here]}\n"}


@pytest.mark.parametrize("texts", [[], ["a"], ["Name it.", "name  it", "NAME IT!"]])
def test_too_few_instructions_to_split_is_an_error(texts):
    with pytest.raises(DataError) as caught:
        split_records(records_of(*texts), validation_frac=0.2, seed=0)
    message = str(caught.value)
    assert message.startswith(f"data.validation_frac: too few records to split ({len(texts)}")
    assert ("'name it'" in message) == (len(texts) == 3)
    assert "\n" not in message


@pytest.mark.parametrize("validation_frac", [0.001, 0.999])
def test_each_part_gets_at_least_one(validation_frac):
    split = split_records(records_of("a", "b", "c"), validation_frac=validation_frac, seed=0)
    assert min(len(split.train), len(split.validation)) == 1


def test_many_records_in_pairs_split_at_once_to_the_nearest_pair():
    records = records_of(*(f"item {index // 2}" for index in range(2 * 20_001)))
    split = split_records(records, validation_frac=0.1, seed=0)
    assert len(split.validation) == 4000


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Name three colors.", "name three  COLORS"),
        ("What is it?", "What is it ?!"),
        ("\uff46ull width", "full width"),
        ("Straße", "STRASSE"),
        ("cafe\u0301", "café"),
        ("a\u00a0b\n", "a b"),
    ],
)
def test_instructions_that_ask_the_same_are_one(one, other):
    assert normalized(one) == normalized(other)


@pytest.mark.parametrize(("one", "other"), [("Add 1", "Add 2"), ("?", "!"), ("a-b", "ab")])
def test_instructions_that_ask_differently_are_two(one, other):
    assert normalized(one) != normalized(other)


@given(text=st.text(min_size=1).filter(str.strip))
def test_normalising_twice_changes_nothing(text):
    assert normalized(normalized(text)) == normalized(text)
    assert normalized(text)


@given(count=st.integers(1, 30), seed=SEEDS)
def test_a_smaller_draw_is_part_of_a_larger_one_in_source_order(count, seed):
    records = records_of(*(f"item {index}" for index in range(30)))
    smaller = draw_records(records, max_records=count, seed=seed)
    larger = draw_records(records, max_records=count + 5, seed=seed)
    assert len(smaller) == count
    assert set(smaller) <= set(larger)
    assert [one.row for one in smaller] == sorted(one.row for one in smaller)


def test_no_limit_or_a_large_one_draws_all():
    records = records_of("a", "b")
    assert draw_records(records, max_records=None, seed=0) == tuple(records)
    assert draw_records(records, max_records=5, seed=0) == tuple(records)


def test_the_draw_depends_on_the_records_and_not_on_their_rows():
    records = records_of(*(f"item {index}" for index in range(50)))
    moved = [record(one.instruction, row=51 - one.row) for one in reversed(records)]
    random.Random(0).shuffle(moved)
    drawn = {one.instruction for one in draw_records(records, max_records=10, seed=0)}
    assert {one.instruction for one in draw_records(moved, max_records=10, seed=0)} == drawn
