"""What is cached is not computed again, and nothing else is taken for it."""

import json
import math
from pathlib import Path

import pytest

from loracle.engine.answers import Answer
from loracle.engine.evaluate import ExampleScore
from loracle.errors import NonFiniteError
from loracle.runner.untuned_cache import UntunedCache, untuned_cache_folder

SCORES = [ExampleScore(3, 0.1 + 0.2), ExampleScore(7, 1e-300)]
ANSWERS = [Answer("Mars\n\u2028é", hit_limit=False), Answer("", hit_limit=True)]
KEY = "ab12"


def never() -> list:
    raise AssertionError("computed although known")


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path, notices) -> UntunedCache:
    return UntunedCache(tmp_path / "cache" / "known", notice=notices.append)


def entry_of(cache: UntunedCache) -> Path:
    (path,) = cache.folder.glob("*.json")
    return path


def test_results_are_computed_once_and_come_back_bit_for_bit(cache, notices):
    assert cache.scores(KEY, lambda: SCORES) == (SCORES, False)
    assert cache.answers(KEY, lambda: ANSWERS) == (ANSWERS, False)
    again = UntunedCache(cache.folder)
    assert again.scores(KEY, never) == (SCORES, True)
    assert again.answers(KEY, never) == (ANSWERS, True)
    assert notices == []


def test_another_key_knows_nothing(cache):
    cache.scores(KEY, lambda: SCORES)
    assert cache.scores("cd34", lambda: SCORES[:1]) == (SCORES[:1], False)
    assert cache.scores(KEY, never) == (SCORES, True)


def changed_number(path: Path) -> None:
    path.write_text(path.read_text().replace("1e-300", "2e-300"))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def without_items(path: Path) -> None:
    path.write_text(json.dumps({"schema": 1}))


def of_another_schema(path: Path) -> None:
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0'))


@pytest.mark.parametrize("damage", [changed_number, cut_short, without_items, of_another_schema])
def test_a_damaged_entry_is_computed_again_with_a_notice(cache, notices, damage):
    cache.scores(KEY, lambda: SCORES)
    damage(entry_of(cache))
    assert cache.scores(KEY, lambda: SCORES) == (SCORES, False)
    assert len(notices) == 1
    assert notices[0].startswith("cached results: ")
    assert notices[0].endswith("; computing it again")
    assert cache.scores(KEY, never) == (SCORES, True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_kept(cache, value):
    found, was_known = cache.scores(KEY, lambda: [ExampleScore(1, value)])
    assert (str(found[0].nll_sum_nats), was_known) == (str(value), False)
    assert cache.scores(KEY, lambda: SCORES) == (SCORES, False)


def test_a_failure_to_compute_leaves_nothing_behind(cache):
    def fail() -> list[ExampleScore]:
        raise NonFiniteError("validation: nan")

    with pytest.raises(NonFiniteError):
        cache.scores(KEY, fail)
    assert cache.scores(KEY, lambda: SCORES) == (SCORES, False)


def test_a_store_that_cannot_be_written_costs_a_notice_and_not_the_result(tmp_path, notices):
    (tmp_path / "file").touch()
    cache = UntunedCache(tmp_path / "file" / "known", notice=notices.append)
    assert cache.scores(KEY, lambda: SCORES) == (SCORES, False)
    (notice,) = notices
    assert notice.startswith(
        "cached results: cannot be stored: a file is where a folder should be; "
    )
    assert notice.endswith("set LORACLE_CACHE to another folder")


def test_a_full_disk_costs_a_notice_and_not_the_result(cache, notices, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loracle.records.files.os.fsync", full)
    assert cache.scores(KEY, lambda: SCORES) == (SCORES, False)
    assert "the disk is full" in notices[0]
    assert list(cache.folder.iterdir()) == []


def test_two_processes_that_compute_at_once_leave_one_whole_entry(cache):
    def slow() -> list[ExampleScore]:
        assert UntunedCache(cache.folder).scores(KEY, lambda: SCORES) == (SCORES, False)
        return SCORES

    assert cache.scores(KEY, slow) == (SCORES, False)
    assert cache.scores(KEY, never) == (SCORES, True)
    entry_of(cache)


def test_the_store_lies_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path))
    assert untuned_cache_folder() == tmp_path / "known"
