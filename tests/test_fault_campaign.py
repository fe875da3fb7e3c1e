"""The fault campaign is as large as promised, repeats its draws, and tells good ends from bad."""

import random

import pytest

from fault_cells import CELLS, summary
from fault_damage import harmed
from fault_ground import Ended
from fault_outcomes import OUTCOMES, judged, one_line
from faults import markdown


def test_it_has_hundreds_of_trials_over_many_cells():
    assert len({cell.name for cell in CELLS}) == len(CELLS) >= 12
    assert sum(cell.trials for cell in CELLS) >= 500


@pytest.mark.parametrize(
    ("code", "err", "is_clear"),
    [
        ("2", "step 3: fine\nRunFolderError: a/b: the disk is full\n", True),
        ("1", "OutOfMemory: out of memory\n", True),
        ("0", "RunFolderError: a\n", False),
        ("hang", "", False),
        ("-6", "RunFolderError: a\n", False),
        ("1", "Traceback (most recent call last):\nKeyError: 'a'\n", False),
        ("1", "", False),
    ],
)
def test_a_clear_line_is_told_from_a_traceback_an_abort_and_silence(code, err, is_clear):
    assert one_line(Ended(code, "", err)) is is_clear


class Ground:
    """Runs that come to what they are said to come to."""

    expected = "bits"

    def __init__(self, again, found):
        self._again, self._found = again, found

    def again(self, run):
        return Ended(self._again, "", "")

    def facts(self, run):
        return self._found


@pytest.mark.parametrize(
    ("first", "again", "found", "outcome"),
    [
        ("-9", "0", "bits", "survived"),
        ("0", "unused", "bits", "survived"),
        ("-9", "0", "others", "silent"),
        ("0", "unused", "others", "silent"),
        ("2", "2", "bits", "lost"),
        ("hang", "0", "bits", "lost"),
    ],
)
def test_a_trial_is_judged_by_the_bits_it_comes_to(tmp_path, first, again, found, outcome):
    ended = Ended(first, "", "")
    assert judged(Ground(again, found), tmp_path, ended, "kill").kind == outcome


def test_harm_repeats_with_its_seed_and_always_harms(tmp_path):
    path, sound = tmp_path / "a.json", bytes(range(200))
    for seed in range(40):
        path.write_bytes(sound)
        what, content = harmed(path, random.Random(seed)), path.read_bytes()
        assert content != sound
        path.write_bytes(sound)
        assert harmed(path, random.Random(seed)) == what
        assert path.read_bytes() == content


def test_the_table_counts_every_outcome():
    rows = [
        {"cell": CELLS[0].name, "outcome": kind, "what": "", "trial": n, "seconds": 0.1}
        for n, kind in enumerate((*OUTCOMES, "survived"))
    ]
    assert summary(rows) == [
        {"cell": CELLS[0].name, "trials": 5, "survived": 2, "refused": 1, "lost": 1, "silent": 1}
    ]
    assert f"| {CELLS[0].name} | 5 | 2 | 1 | 1 | 1 |" in markdown(rows, seed=0)
