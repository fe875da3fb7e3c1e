"""Packing keeps every token and target, and batches keep order and budget."""

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.data import Example, Record
from loracle.data.packing import batches_by_tokens, pack

LENGTHS = st.lists(st.integers(1, 40), max_size=30)


def example(*ids: int, prompt: int) -> Example:
    return Example(Record(1, "Say.", "", "Said."), ids, prompt, False)


def test_a_row_by_hand():
    row = pack([example(11, 12, 13, 14, prompt=2), example(21, 22, 23, prompt=1)])
    assert row.input_ids.tolist() == [[11, 12, 13, 14, 21, 22, 23]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert row.lengths == (4, 3)
    assert row.num_tokens == 7
    assert row.targets.tolist() == [13, 14, 22, 23]
    assert row.source.tolist() == [1, 2, 4, 5]
    assert row.num_targets == (2, 2)
    assert row.ends.tolist() == [0, 4, 7]
    assert row.ends.dtype == torch.int32


def test_the_first_token_is_never_a_target():
    row = pack([example(11, 12, prompt=0), example(21, prompt=0), example(31, 32, prompt=1)])
    assert row.targets.tolist() == [12, 32]
    assert row.num_targets == (1, 0, 1)
    assert row.source.tolist() == [0, 3]


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    result = []
    for _ in range(draw(st.integers(1, 8))):
        ids = draw(st.lists(st.integers(0, 99), min_size=2, max_size=12))
        result.append(example(*ids, prompt=draw(st.integers(1, len(ids) - 1))))
    return result


@settings(deadline=None)
@given(examples())
def test_every_target_is_predicted_from_the_token_before_it(group):
    row = pack(group)
    expected = [token for one in group for token in one.input_ids[one.num_prompt :]]
    assert row.targets.tolist() == expected
    assert sum(row.num_targets) == len(expected)
    assert row.num_targets == tuple(one.num_targets for one in group)
    flat = row.input_ids[0]
    assert torch.equal(flat[row.source + 1], row.targets)
    sequence = torch.repeat_interleave(torch.arange(len(group)), torch.tensor(row.lengths))
    assert torch.equal(sequence[row.source], sequence[row.source + 1])
    assert flat.tolist() == [token for one in group for token in one.input_ids]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 60))
def test_batches_cover_everything_in_order_within_the_budget(lengths, budget):
    batches = batches_by_tokens(lengths, budget=budget)
    assert [index for batch in batches for index in batch] == list(range(len(lengths)))
    for batch in batches:
        total = sum(lengths[index] for index in batch)
        assert total <= budget or len(batch) == 1
        assert len(batch) > 0


def fewest_then_smallest(lengths: list[int], budget: int) -> tuple[int, int]:
    """Over every way to cut the list: the fewest batches, and then the smallest largest one."""
    result = []
    for cuts in product([False, True], repeat=len(lengths) - 1):
        groups = [[lengths[0]]]
        for length, cut in zip(lengths[1:], cuts, strict=True):
            groups.append([length]) if cut else groups[-1].append(length)
        if all(sum(group) <= budget or len(group) == 1 for group in groups):
            result.append((len(groups), max(map(sum, groups))))
    return min(result)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 60))
def test_batches_are_as_few_and_then_as_equal_as_they_can_be(lengths, budget):
    batches = batches_by_tokens(lengths, budget=budget)
    largest = max(sum(lengths[index] for index in batch) for batch in batches)
    assert (len(batches), largest) == fewest_then_smallest(lengths, budget)


def test_the_last_batch_is_not_a_leftover():
    assert batches_by_tokens([10] * 11, budget=100) == [range(6), range(6, 11)]


def test_a_sequence_longer_than_the_budget_has_a_batch_to_itself():
    assert batches_by_tokens([3, 100, 2, 2], budget=8) == [range(1), range(1, 2), range(2, 4)]
    assert batches_by_tokens([], budget=8) == []
