"""What the report says in words: no more than the verdicts, with n, and what it cannot show."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from analysis.stats.simulated import ARMS, Noise, simulated_study
from loracle.analysis.orderings import published_orderings
from loracle.analysis.verdicts import judge
from loracle.report.contents import contents_of
from loracle.report.paper.paper import macros_file
from loracle.report.tables.baseline import baseline_table
from loracle.report.tables.runs import criteria_table
from loracle.report.terminal.verdicts import verdict_view
from loracle.report.text.advice import advice
from loracle.report.text.answer import answer, largest_smallest_effect, noise_words
from loracle.report.text.limits import limits
from loracle.report.text.methods import methods_paragraphs
from loracle.report.text.provenance import provenance_of
from loracle.report.text.published import why_it_may_differ


def test_the_answer_counts_the_verdicts(contents):
    first, on_bleu, untuned = contents.answer
    losses = [c for c in contents.verdicts.comparisons if c.metric == "loss_nats_per_token"]
    for verdict in ("better", "worse"):
        for comparison in losses:
            if comparison.verdict == verdict:
                assert comparison.arm in first
    assert "of 8 placements compared with all-linear" in first
    assert on_bleu.startswith("By BLEU")
    assert untuned == "Every arm has a lower loss than the untuned model (9 of 9)."


def test_one_seed_establishes_nothing(bare_contents):
    (sentence,) = bare_contents.answer
    assert "without a second seed there is no interval" in sentence
    assert "better or worse" in sentence
    assert largest_smallest_effect(bare_contents.verdicts) is None
    assert any(limit.startswith("One seed") for limit in bare_contents.limits)


def test_every_text_names_the_coverage_that_the_study_asks_for(tmp_path):
    study = simulated_study(tmp_path, arms=ARMS[:3], seeds=(0, 1))
    narrow = replace(study, study={**study.study, "interval": 0.8})
    wide, narrower = judge(study), judge(narrow)
    for ours, theirs in zip(narrower.comparisons, wide.comparisons, strict=True):
        assert (ours.difference, ours.p, ours.verdict) == (
            theirs.difference,
            theirs.p,
            theirs.verdict,
        )
        assert theirs.interval[0] < ours.interval[0] < ours.interval[1] < theirs.interval[1]
    for made, verdicts, level, other in ((study, wide, 95, 80), (narrow, narrower, 80, 95)):
        console = Console(width=200, file=io.StringIO())
        console.print(verdict_view(made, verdicts, width=200))
        contents = contents_of(made, verdicts)
        for text in (console.file.getvalue(), repr(contents.tables), repr(contents.methods)):
            assert re.search(rf"{level} ?% interval", text)
        everything = console.file.getvalue() + repr(contents) + baseline_table(made)
        assert not re.search(rf"\b{other} ?%(?! power)", everything)


def test_a_criterion_of_an_earlier_rule_is_said_to_be_one(bare_study):
    assert "an earlier rule" not in criteria_table(bare_study).caption
    (first, *others) = bare_study.runs
    criteria = first.result.criteria
    old = replace(criteria.convergence, evidence="Training loss by fifths of 60 steps: 1 -> 2.")
    result = replace(first.result, criteria=replace(criteria, convergence=old))
    study = replace(bare_study, runs=(replace(first, result=result), *others))
    caption = criteria_table(study).caption
    assert "Convergence of 1 run was judged when it ended, by an earlier rule" in caption


def test_a_lone_reference_has_nothing_to_compare_with(tmp_path):
    study = simulated_study(tmp_path, arms=ARMS[:1], seeds=(0, 1), num_answers=0)
    assert (
        answer(study, judge(study))[0]
        == "No placement has a completed run to compare with all-linear."
    )


def test_an_arm_that_did_not_learn_is_not_said_to_have(tmp_path):
    lost = replace(ARMS[1], effect_nats=0.2)
    study = simulated_study(tmp_path, arms=(ARMS[0], lost), num_answers=0)
    assert "1 of 2 arms can be told" in answer(study, judge(study))[-1]


def test_noise_is_told_with_its_n(tmp_path, bare_contents, contents):
    loss, *_ = contents.noise
    exact, seeds = loss.split("same. ")
    assert exact == (
        "Noise floor in nats per token: zero; 1 repeat with the same seed gave exactly the "
    )
    assert seeds.startswith("Over 5 seeds of all-linear, the standard deviation is 0.0")
    assert bare_contents.noise == (
        "Noise floor in nats per token: not measured, no run was repeated.",
    )
    noisy = simulated_study(tmp_path, arms=ARMS[:2], num_answers=0, noise=Noise(repeat=0.01))
    assert "the largest difference between a run and 1 repeat" in noise_words(judge(noisy))[0]


def test_advice_sets_limits_that_keep_some_arms_out(study, contents):
    free, memory, time = advice(study, contents.verdicts)
    assert free == contents.advice[0]
    assert memory.startswith("Within 3.9 GiB: ")
    assert re.match(r"Within (2.9|3) s per step: ", time)


@pytest.fixture(scope="module")
def unsearched(tmp_path_factory):
    """Nine arms of ranks 16 to 86 at one rate, which was not searched."""
    return simulated_study(tmp_path_factory.mktemp("one-rate"), searched=False, num_examples=150)


def test_unequal_ranks_at_one_rate_are_not_ranked_as_places(unsearched, study):
    verdicts = judge(unsearched)
    assert [c.verdict for c in verdicts.comparisons].count("worse") >= 3
    caveat, *findings = answer(unsearched, verdicts)
    assert "All arms with adapters ran at one learning rate, 0.0003, with ranks of 16 to" in caveat
    assert "they do not rank places" in caveat
    assert findings[0].startswith("By validation loss")
    marked = contents_of(unsearched, verdicts)
    captions = [table.caption for table in marked.tables if "Holm" in str(table.columns)]
    captions += [marked.figures.forest.caption, marked.tables.effects.caption]
    assert len(captions) >= 3
    assert all("At one unsearched learning rate (0.0003)" in caption for caption in captions)
    assert "they do not rank places" in macros_file(marked)
    (sentence,) = advice(unsearched, verdicts)
    assert sentence.startswith("No placement is recommended")
    assert "take " not in sentence
    assert not any("do not rank" in words for words in answer(study, judge(study)))


def test_equal_ranks_at_one_rate_are(tmp_path):
    arms = tuple(replace(arm, rank=16) for arm in ARMS[:3])
    equal = simulated_study(tmp_path, arms=arms, searched=False)
    assert answer(equal, judge(equal))[0].startswith("By validation loss")
    assert "take all-linear" in advice(equal, judge(equal))[0]


def test_without_a_difference_in_cost_there_is_no_limit_to_advise(bare_contents):
    assert len(bare_contents.advice) == 1


def test_methods_are_written_from_the_configuration(study, contents):
    text = " ".join(methods_paragraphs(study, provenance_of(study)))
    config = study.study["config"]
    for part in (
        f"{config['train']['max_steps']} optimizer steps of 8 examples",
        "learning rate of 0.0003 in every arm",
        "alpha / r is 2 in every arm",
        "seeds 0, 1, 2",
        "799 training and 60 scored validation examples",
        "9 arms: all-linear (r 16)",
        "20 greedy answers",
        "comes closest to that of all-linear",
        "Holm",
    ):
        assert part in text, part
    assert len(contents.methods) == 5


def test_methods_say_when_each_arm_has_its_own_learning_rate(study):
    runs = tuple(
        replace(run, learning_rate=1e-3) if run.arm == "attention" else run for run in study.runs
    )
    text = " ".join(methods_paragraphs(replace(study, runs=runs), provenance_of(study)))
    assert "its own per arm, 0.0003 (all-linear), 0.001 (attention)" in text


def test_limits_follow_from_the_size_of_the_study(study, contents):
    text = " ".join(contents.limits)
    assert "One base model of 135 million parameters" in text
    assert "799 training examples" in text
    assert "3 seeds: the spread between seeds" in text
    assert "BLEU rests on 20 short answers" in text
    assert f"{largest_smallest_effect(contents.verdicts):.4f} nats per token" in text
    large = replace(study.inventory, total_params=7_000_000_000)
    other = limits(replace(study, inventory=large), contents.provenance, smallest_effect_nats=None)
    assert not any("million parameters" in sentence for sentence in other)
    assert not any("often go unseen" in sentence for sentence in other)


def test_one_rate_for_all_arms_is_a_limit(unsearched, study, contents):
    found = limits(unsearched, contents.provenance, smallest_effect_nats=None)
    assert any("One learning rate for all arms" in sentence for sentence in found)
    assert not any("One learning rate for all arms" in sentence for sentence in contents.limits)


def test_without_answers_nothing_is_said_of_bleu(bare_contents):
    assert any("No answers were generated" in sentence for sentence in bare_contents.limits)


def test_provenance_has_n_device_date_and_commit(contents):
    assert contents.provenance.line == (
        f"3 seeds, 60 validation examples, {contents.provenance.num_targets:,} target tokens, "
        "simulated CPU, 2026-11-23, commit 0000000"
    )


@pytest.mark.parametrize("outcome", ["contradicted", "not distinguishable", "reproduced"])
def test_a_published_ordering_is_never_explained_with_certainty(outcome, study, contents):
    found = [replace(published_orderings(study, contents.verdicts)[0], outcome=outcome)]
    sentence = why_it_may_differ(found, study, contents.provenance)
    assert "135 million parameters" in sentence
    assert "3 seeds" in sentence


def test_what_was_not_tested_is_not_explained(bare_study, bare_contents):
    orderings = published_orderings(bare_study, bare_contents.verdicts)
    assert {found.outcome for found in orderings} == {"not tested"}
    assert (
        bare_contents.orderings_note == "No ordering could be tested with the arms of this study."
    )


def test_records_left_out_are_a_limit_of_the_study(study, contents):
    line = "8 of 24 records are left out: no output (rows 1, 2, 3, 4, 5, ...)"
    runs = [replace(run, result=replace(run.result, data_warnings=(line,))) for run in study.runs]
    found = limits(replace(study, runs=runs), contents.provenance, smallest_effect_nats=None)
    assert [line in sentence for sentence in found].count(True) == 1
    assert not any("left out" in sentence for sentence in contents.limits)
