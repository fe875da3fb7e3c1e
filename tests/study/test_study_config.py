"""A study's file: what it may hold, and every way in which it is refused in one line."""

import pytest

from loracle.config.files import load_config, read_yaml, shipped_configs
from loracle.config.run import PlacementConfig
from loracle.errors import ConfigError, ConfoundError
from loracle.study.config import ArmConfig, RandomConfig, StrategicConfig
from loracle.study.file import load_study, parse_study
from loracle.text import slug_of

STUDIES = [name for name, path in shipped_configs().items() if "arms" in read_yaml(path)]

SOUND = """\
question: Does it matter?
base: demo
config:
  train: {max_steps: 7}
reference: all-linear
budget: equal-parameters
seeds: [0, 1]
arms:
  all-linear:
  q,v: attention-qv
  by hand: {placement: {modules: [q_proj], layers: [0]}}
  best: {placement: {strategic: gradient-energy, keep_frac: 0.25}}
  luck: {placement: {random: 3, keep_frac: 0.25}}
"""


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "my_study.yaml"
        path.write_text(text)
        return path

    return written


def refusal(path, *overrides, error=ConfigError):
    with pytest.raises(error) as caught:
        load_study(path, overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", STUDIES)
def test_every_shipped_study_loads_and_has_a_question(name):
    study, base = load_study(name)
    assert study.question.endswith("?")
    assert study.reference in study.arms
    assert base.train.max_steps > 0


def test_there_is_a_shipped_study():
    assert "placement_study" in STUDIES


def test_a_study_is_read_as_it_is_written(write):
    study, base = load_study(write(SOUND))
    assert [study.arms[name].placement for name in ("all-linear", "q,v")] == [
        "all-linear",
        "attention-qv",
    ]
    assert study.arms["by hand"].placement == PlacementConfig(modules=["q_proj"], layers=[0])
    assert study.arms["best"].placement == StrategicConfig(
        strategic="gradient-energy", keep_frac=0.25
    )
    assert study.arms["luck"].placement == RandomConfig(random=3, keep_frac=0.25)
    assert base == load_config("demo", overrides=["train.max_steps=7"])


def test_set_reaches_the_study_and_its_base(write):
    study, base = load_study(
        write(SOUND), overrides=["seeds=[4, 5, 6]", "train.max_steps=9", "noise.repeats=1"]
    )
    assert (study.seeds, study.noise.repeats, base.train.max_steps) == ([4, 5, 6], 1, 9)


def test_a_base_beside_the_study_is_found(write, tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {batch_size: 2}\n")
    _, base = load_study(write(SOUND.replace("base: demo", "base: mine.yaml")))
    assert base.train.batch_size == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.learning_rate", 0.01), ("lora.dropout", 0.0), ("data.max_tokens", 64)],
)
def test_an_arm_that_changes_more_than_its_placement_is_a_confound(write, key, value):
    text = SOUND + f"  other: {{placement: attention, {key}: {value}}}\n"
    message = refusal(write(text), error=ConfoundError)
    assert "arm 'other'" in message
    assert key in message


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("learning_rate: 0.01", "train.learning_rate"),
        ("train: {learning_rate: 0.01}", "train.learning_rate"),
        ("dropout: 0.0", "lora.dropout"),
        ("seed: 3", "seed"),
        ("dtype: float32", "dtype"),
    ],
)
def test_a_confound_is_named_however_it_is_written(write, given, key):
    text = SOUND + f"  other: {{placement: attention, {given}}}\n"
    assert f"({key}: " in refusal(write(text), error=ConfoundError)


def test_a_fault_in_a_choice_of_modules_is_told_once(write):
    text = SOUND + "  chosen: {placement: {strategic: magic, keep_frac: 0.3}}\n"
    message = refusal(write(text))
    assert "arms.chosen.placement.strategic: input should be 'gradient-energy'" in message
    assert "missing" not in message
    text = SOUND + "  chosen: {placement: {strategic: gradient-energy, keep: 0.3}}\n"
    message = refusal(write(text))
    assert "arms.chosen.placement.keep: unknown key" in message


def test_a_key_that_changes_nothing_is_no_confound(write):
    study, base = load_study(write(SOUND + "  other: {placement: attention, lora.dropout: 0.1}\n"))
    assert base.lora.dropout == 0.1
    assert "other" in study.arms


@pytest.mark.parametrize("key", ["lora.rank", "lora.alpha"])
def test_an_arm_says_its_rank_by_name_and_its_alpha_not_at_all(write, key):
    text = SOUND + f"  other: {{placement: attention, {key}: 8}}\n"
    assert "alpha follows from the rank" in refusal(write(text), error=ConfoundError)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("reference: all-linear", "reference: all-liner", "did you mean 'all-linear'?"),
        ("budget: equal-parameters", "budget: equal-params", "did you mean 'equal-parameters'?"),
        ("seeds: [0, 1]", "seeds: [1, 1]", "seeds: a seed is given twice"),
        ("seeds: [0, 1]", "seeds: [1]", "an interval over seeds needs at least 2"),
        ("seeds: [0, 1]", "seeds: []", "seeds"),
        ("seeds: [0, 1]", "seeds: [0, 1]\ninterval: null", "null is for a single seed"),
        ("seeds: [0, 1]", "seeds: [0, 1]\ninterval: 95", "interval: input should be less than 1"),
        ("seeds: [0, 1]", "seeds: [0, 1]\ninterval: .nan", "interval: input should be a finite"),
        ("question: Does it matter?\n", "", "question: missing"),
        ("question: Does", "qeustion: Does", "did you mean 'question'?"),
        ("keep_frac: 0.25}}\n  luck", "keep_frac: 2}}\n  luck", "keep_frac"),
        ("  q,v: attention-qv", "  q;v: attention-qv", "an arm's name has"),
        ("  q,v: attention-qv", "  all linear: attention-qv", "differs from it in punctuation"),
        ("  q,v: attention-qv", "  q,v: {placment: attention-qv}", "did you mean 'placement'?"),
        ("  q,v: attention-qv", "  q,v: 3", "q,v"),
        ("seeds: [0, 1]", "seeds: [0, 1]\nnoise: {extra_seeds: [1]}", "one of seeds already"),
        (
            "seeds: [0, 1]",
            "seeds: [0, 1]\nsearch: {learning_rates: [0.1, 0.2], seed: 1}",
            "search.seed: the comparison uses it",
        ),
        ("base: demo", "base: dmeo", "did you mean 'demo'?"),
        ("max_steps: 7", "max_stpes: 7", "did you mean 'max_steps'?"),
        ("max_steps: 7", "epochs: 7", "did you mean 'train.max_steps' (optimizer steps)?"),
        ("base: demo", "learning_rate: 1e-4", "did you mean 'config.train.learning_rate'?"),
        ("  q,v: attention-qv", "  q,v: {r: 4}", "did you mean 'arms.q,v.rank'?"),
        ("seeds: [0, 1]", "seeds: [0, 1e0]", "seeds.1: input should be a valid integer, got 1.0"),
    ],
)
def test_a_bad_study_is_refused_in_one_line(write, old, new, words):
    assert old in SOUND
    assert words in refusal(write(SOUND.replace(old, new)))


def test_one_seed_is_a_study_without_intervals(write):
    text = SOUND.replace("seeds: [0, 1]", "seeds: [1]\ninterval: null")
    study, _ = load_study(write(text))
    assert study.interval is None


def test_numbers_and_names_are_read_as_they_are_written(write):
    text = SOUND.replace("seeds: [0, 1]", "seeds: [01, 010]").replace("  q,v:", "  no:")
    study, base = load_study(write(text), overrides=["lora.rank=016", "noise.extra_seeds=[08]"])
    assert (study.seeds, study.noise.extra_seeds, base.lora.rank) == ([1, 10], [8], 16)
    assert "no" in study.arms


def test_a_run_is_not_a_study_and_a_study_is_not_a_run(write):
    assert "not a study" in refusal("demo")
    with pytest.raises(ConfigError, match="a study, not a run"):
        load_config("placement_study")


def test_all_faults_are_reported_at_once(write):
    message = refusal(
        write(SOUND.replace("seeds: [0, 1]", "seeds: [0, -1]").replace("equal-", "eqal-"))
    )
    assert "seeds" in message
    assert "budget" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "full: missing; full fine-tuning needs a learning rate of its own"),
        ({"full": {"learning_rate": 1e-5}, "reference": "full"}, "has no adapters to match"),
        ({"full": {"learning_rate": 0}}, "full.learning_rate"),
    ],
)
def test_full_fine_tuning_is_an_arm_with_a_rate_and_never_the_reference(given, message):
    tree = {
        "question": "?",
        "reference": "attention",
        "budget": "equal-parameters",
        "seeds": [0, 1],
        "arms": {"attention": None, "full": None},
    }
    with pytest.raises(ConfigError, match=message):
        parse_study(tree | given, origin="test")


def test_an_arm_without_a_placement_is_its_own_preset():
    study = parse_study(
        {
            "question": "?",
            "reference": "attention",
            "budget": "equal-rank",
            "seeds": [0, 1],
            "arms": {"attention": None, "feed-forward": {"rank": 3}},
        },
        origin="test",
    )
    assert study.arms["attention"] == ArmConfig(placement="attention")
    assert study.arms["feed-forward"] == ArmConfig(placement="feed-forward", rank=3)


@pytest.mark.parametrize(
    ("name", "slug"), [("q,v", "q-v"), ("All linear", "all-linear"), ("o+down", "o-down")]
)
def test_an_arms_folder_is_its_name_in_safe_letters(name, slug):
    assert slug_of(name) == slug
