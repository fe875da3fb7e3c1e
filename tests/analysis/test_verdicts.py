"""What a study establishes: simulated studies of known effects, judged."""

import math
from dataclasses import replace

import pytest
from sacrebleu.metrics import BLEU

from analysis.stats.simulated import ARMS, Noise, simulated_study, write_study
from analysis.stats.texts import paired_bleu
from loracle.analysis.verdicts import judge
from loracle.errors import RunFolderError
from loracle.records.study_folder import read_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return simulated_study(tmp_path_factory.mktemp("study"), num_examples=150)


@pytest.fixture(scope="module")
def verdicts(study):
    return judge(study)


def test_every_arm_but_the_reference_is_compared_on_every_metric(study, verdicts):
    arms = [arm.name for arm in study.arms]
    told = [(c.arm, c.reference, c.metric) for c in verdicts.comparisons]
    metrics = ("loss_nats_per_token", "bleu")
    assert told == [(arm, "all-linear", metric) for metric in metrics for arm in arms[1:]]
    assert (verdicts.num_examples, verdicts.num_answers, verdicts.seeds) == (150, 20, (0, 1, 2))


def test_known_effects_are_found_with_their_sign(verdicts):
    found = {c.arm: c.verdict for c in verdicts.comparisons if c.metric == "loss_nats_per_token"}
    assert found["attention-qv"] == found["last-third"] == found["attention"] == "worse"
    assert found["feed-forward"] == "not distinguishable"


def test_the_truth_is_in_the_intervals(verdicts):
    truth = {arm.name: arm.effect_nats for arm in ARMS}
    inside = [
        c.interval[0] <= truth[c.arm] <= c.interval[1]
        for c in verdicts.comparisons
        if c.metric == "loss_nats_per_token"
    ]
    assert sum(inside) >= 7


def test_a_difference_is_that_of_the_results_losses(study, verdicts):
    losses = {
        arm: [run.result.quality.tuned.loss_nats_per_token for run in study.runs_of(arm).values()]
        for arm in ("all-linear", "attention")
    }
    gap = sum(losses["attention"]) / 3 - sum(losses["all-linear"]) / 3
    found = verdicts.comparison("attention")
    assert found.difference == pytest.approx(gap)
    assert found.effect_percent == pytest.approx(100 * (math.exp(gap) - 1))
    assert found.effect_percent_interval[0] < found.effect_percent


def test_bleu_is_compared_by_paired_bootstrap_on_the_answers(study, verdicts):
    answers = {
        arm: [
            [row["generated"] for row in run.examples if row["generated"] is not None]
            for run in study.runs_of(arm).values()
        ]
        for arm in ("all-linear", "attention")
    }
    references = [row["reference"] for row in study.runs[0].examples][:20]
    expected = paired_bleu(answers["attention"], answers["all-linear"], references)
    found = verdicts.comparison("attention", metric="bleu")
    assert found.measured == expected
    assert found.effect_percent is found.effect_percent_interval is None
    scores = [verdicts.summary(arm).bleu.mean for arm in ("attention", "all-linear")]
    assert found.difference == pytest.approx(scores[0] - scores[1])


def with_tokenizer(run, name):
    """The run with this tokenizer in its results."""
    quality = run.result.quality
    changed = replace(
        quality,
        base=replace(quality.base, bleu_tokenize=name),
        tuned=replace(quality.tuned, bleu_tokenize=name),
    )
    return replace(run, result=replace(run.result, quality=changed))


def test_bleu_is_compared_with_the_tokenizer_that_was_recorded(tmp_path):
    study = simulated_study(tmp_path, arms=ARMS[:2], seeds=(0, 1), repeats=0, extra_seeds=())
    assert {run.result.quality.tuned.tokenizer for run in study.runs} == {"13a"}
    by_char = replace(study, runs=tuple(with_tokenizer(run, "char") for run in study.runs))
    found = judge(by_char).comparison(ARMS[1].name, metric="bleu")
    scores = []
    for seed in (0, 1):
        for arm in (ARMS[1].name, ARMS[0].name):
            rows = [r for r in study.runs_of(arm)[seed].examples if r["generated"] is not None]
            texts = [[row[key] for row in rows] for key in ("generated", "reference")]
            scores.append(BLEU(tokenize="char").corpus_score(texts[0], [texts[1]]).score)
    mean = (scores[0] - scores[1] + scores[2] - scores[3]) / 2
    assert found.difference == pytest.approx(mean, abs=1e-9)
    assert found.difference != judge(study).comparison(ARMS[1].name, metric="bleu").difference


def test_bleu_of_two_tokenizers_is_not_compared(tmp_path):
    study = simulated_study(tmp_path, arms=ARMS[:2], seeds=(0,), repeats=0, extra_seeds=())
    first, second = study.runs
    mixed = replace(study, runs=(first, with_tokenizer(second, "zh")))
    with pytest.raises(RunFolderError, match=r"BLEU with the tokenizer zh, .* with 13a"):
        judge(mixed)


def test_holm_corrects_over_the_arms_of_each_metric(verdicts):
    for metric in ("loss_nats_per_token", "bleu"):
        family = [c for c in verdicts.comparisons if c.metric == metric]
        assert {c.num_comparisons for c in family} == {8}
        smallest = min(family, key=lambda c: c.p)
        assert smallest.p_holm == pytest.approx(min(1, 8 * smallest.p))
        assert all(c.p_holm >= c.p for c in family)


def test_every_arm_is_compared_with_no_training(study, verdicts):
    arms = [arm.name for arm in study.arms]
    losses = [c for c in verdicts.versus_untuned if c.metric == "loss_nats_per_token"]
    assert [(c.arm, c.reference) for c in losses] == [(arm, "untuned") for arm in arms]
    assert {c.verdict for c in losses} == {"better"}
    assert verdicts.against_untuned("random").difference == pytest.approx(-0.188, abs=0.03)
    assert verdicts.untuned.loss_nats_per_token.n == 1
    assert verdicts.untuned.loss_nats_per_token.sd is None


def test_every_pair_is_compared_once_and_read_from_both_sides(verdicts):
    assert len(verdicts.pairs) == 36
    one = verdicts.pair("attention", "strategic")
    other = verdicts.pair("strategic", "attention")
    assert (one.verdict, other.verdict) == ("worse", "better")
    assert other.difference == -one.difference
    assert other.interval == (-one.interval[1], -one.interval[0])
    assert other.reversed() == one
    assert verdicts.pair("attention", "attention") is None
    assert "strategic" in one.reason
    assert "attention" in other.reason


def test_summaries_are_means_over_seeds_with_their_spread(study, verdicts):
    runs = study.runs_of("attention").values()
    qualities = [run.result.quality.tuned for run in runs]
    found = verdicts.summary("attention")
    losses = [quality.loss_nats_per_token for quality in qualities]
    mean = sum(losses) / 3
    assert found.loss_nats_per_token.mean == pytest.approx(mean)
    sd = (sum((loss - mean) ** 2 for loss in losses) / 2) ** 0.5
    assert found.loss_nats_per_token.sd == pytest.approx(sd)
    assert found.perplexity.mean == pytest.approx(math.exp(mean))
    assert found.perplexity.sd == pytest.approx(sd * math.exp(mean), rel=0.05)
    assert found.bleu.mean == pytest.approx(sum(quality.bleu for quality in qualities) / 3)
    assert found.bleu.n == 3


def test_costs_are_described_beside_the_reference_and_not_tested(verdicts):
    found = {(cost.arm, cost.axis): cost for cost in verdicts.costs}
    time = found["last-third", "step_time_s"]
    assert time.ratio == pytest.approx(2.1 / 3.7, rel=0.05)
    assert time.value / time.reference_value == time.ratio
    assert found["attention", "trainable_params"].ratio == pytest.approx(1, abs=0.05)
    assert found["attention", "peak_memory_gib"].ratio < 1
    assert {cost.axis for cost in verdicts.costs} == {
        "trainable_params", "peak_memory_gib", "step_time_s", "latency_ms_per_token", "adapter_mib",
    }  # fmt: skip


def test_the_noise_floor_is_what_a_repeat_differs_by_and_zero_is_a_finding(tmp_path, verdicts):
    assert verdicts.noise["loss_nats_per_token"].floor == 0.0
    noisy = simulated_study(tmp_path, arms=ARMS[:2], repeats=2, noise=Noise(repeat=0.01))
    noise = judge(noisy).noise["loss_nats_per_token"]
    first = noisy.runs_of("all-linear")[0].result.quality.tuned.loss_nats_per_token
    again = [run.result.quality.tuned.loss_nats_per_token for run in noisy.repeats_of("all-linear")]
    assert noise.repeats == pytest.approx(tuple(abs(loss - first) for loss in again))
    assert noise.floor == max(noise.repeats) > 0
    assert judge(noisy).comparison("attention").noise_floor == noise.floor


def test_extra_seeds_give_the_spread_over_all_seeds(study, verdicts):
    noise = verdicts.noise["loss_nats_per_token"]
    runs = [run for run in study.runs if run.arm == "all-linear" and run.role != "repeat"]
    losses = [run.result.quality.tuned.loss_nats_per_token for run in runs]
    mean = sum(losses) / 5
    assert (noise.seeds_arm, noise.num_seeds) == ("all-linear", 5)
    assert noise.seeds_sd == pytest.approx((sum((x - mean) ** 2 for x in losses) / 4) ** 0.5)


def test_what_was_not_measured_is_null(tmp_path):
    plain = simulated_study(
        tmp_path, arms=ARMS[:3], repeats=0, extra_seeds=(), num_answers=0, scores=False
    )
    found = judge(plain)
    noise = found.noise["loss_nats_per_token"]
    assert (noise.repeats, noise.floor, noise.seeds_sd, noise.seeds_arm) == (None,) * 4
    assert {c.metric for c in found.comparisons} == {"loss_nats_per_token"}
    assert found.comparison("attention", metric="bleu") is None
    assert found.summary("attention").bleu is None
    assert found.num_answers == 0


def test_an_arm_is_compared_over_the_seeds_that_both_completed(tmp_path):
    missing = [("attention", 1), ("attention-qv", 0), ("attention-qv", 1), ("attention-qv", 2)]
    partial = simulated_study(tmp_path, arms=ARMS[:4], unfinished=missing)
    found = judge(partial)
    assert found.comparison("attention").num_seeds == 2
    assert found.comparison("feed-forward").num_seeds == 3
    assert found.comparison("attention-qv") is None
    assert found.summary("attention-qv") is None
    assert len(found.pairs) == 3
    assert found.comparison("attention").num_comparisons == 2


def test_without_the_reference_nothing_is_compared_with_it(tmp_path):
    missing = [("all-linear", seed) for seed in (0, 1, 2)]
    orphans = simulated_study(tmp_path, arms=ARMS[:3], unfinished=missing)
    found = judge(orphans).comparison("attention")
    assert found.difference is found.interval is found.p_holm is found.smallest_effect is None
    assert found.verdict == "not distinguishable"
    assert found.reason == "Not measured on a seed that completed in both."
    assert found.num_seeds == 0
    assert found.reversed().measured is None


def test_one_seed_gives_no_interval_and_no_verdict(tmp_path):
    single = simulated_study(tmp_path, seeds=(0,), arms=ARMS[:3])
    found = judge(single).comparison("attention-qv")
    assert found.difference > 0.03
    assert found.interval is found.p_holm is found.effect_percent_interval is None
    assert found.verdict == "not distinguishable"
    assert found.reason.endswith("on one seed: no interval, so no verdict.")


def test_runs_on_other_examples_are_not_compared(tmp_path):
    folder = write_study(tmp_path / "study", arms=ARMS[:2])
    file = folder / "runs" / "attention-seed-2" / "examples.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(rows[1:]))
    with pytest.raises(RunFolderError, match="scored other examples than all-linear-seed-0"):
        judge(read_study(folder))
