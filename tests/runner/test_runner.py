"""Many runs on one base end as each would alone, whatever they train with, fails or is killed."""

import json
import random
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from loracle.config.files import load_config
from loracle.errors import Interrupted, ModelError, NonFiniteError, UnexpectedError, UsageError
from loracle.records.result import read_result
from loracle.records.run_folder import RunFolder
from loracle.runner import active_run, bundle, bundle_size, probe, shared_base, untuned
from loracle.runner import run_many as runner
from loracle.runner import trunk as runner_trunk
from loracle.runner.bundle_size import StepMemory
from loracle.runner.run_many import require_agreement, run_many
from loracle.runner.run_spec import RunSpec
from runs_fixture import contents, facts, load, rows, set_aside

SHORT = [
    "train.max_steps=6",
    "eval.every_steps=3",
    "eval.generate_examples=2",
    "eval.max_new_tokens=4",
    "checkpoint.every_steps=2",
    "measure.skip_steps=1",
    "measure.probe_steps=2",
    "measure.latency_trials=0",
    "audit.reload_examples=2",
]
# Modules, layers, ranks, rates, seeds, batches and lengths all differ.
ARMS = {
    "everything": [],
    "attention": ["lora.placement=attention", "lora.rank=4", "lora.dropout=0.3"],
    "top": ["lora.placement={modules: [q_proj, down_proj], layers: [2]}", "seed=1"],
    "faster": ["train.learning_rate=0.01", "train.batch_size=3", "seed=2"],
    "head": ["lora.placement={modules: [lm_head, v_proj]}", "lora.alpha=4", "seed=3"],
    "shorter": ["train.max_steps=4", "train.max_grad_norm=null", "train.schedule=linear"],
}
POISON = ["train.learning_rate=1e30", "seed=4"]


@pytest.fixture
def here(place):
    set_aside()
    with place.entered():
        yield place


def specs_of(place, root, arms=ARMS, *, common=()):
    return [
        RunSpec(load_config(place.config, overrides=[*SHORT, *common, *overrides]), root / name)
        for name, overrides in arms.items()
    ]


def tensors(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses(run):
    return [row["loss_nats_per_token"] for row in rows(run / "steps.jsonl")]


def assert_alike(run, other, *, relative=1e-5):
    """Every figure of the two runs agrees but for rounding."""
    assert losses(run) == pytest.approx(losses(other), rel=relative)
    pairs = zip(rows(run / "evals.jsonl"), rows(other / "evals.jsonl"), strict=True)
    for mine, theirs in pairs:
        assert (mine["step"], mine["model"]) == (theirs["step"], theirs["model"])
        assert mine["nll_sum_nats"] == pytest.approx(theirs["nll_sum_nats"], rel=relative)
    one, two = tensors(run), tensors(other)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def studies(place, tmp_path_factory):
    """The six arms in turn and in full bundles of 3, two in a bundle for 6; nobody writes here."""
    root = tmp_path_factory.mktemp("studies")
    with place.entered():
        for size, arms in ((1, ARMS), (3, ARMS), (6, {name: ARMS[name] for name in ROOMY})):
            outcomes = run_many(specs_of(place, root / str(size), arms), bundle_size=size)
            assert [outcome.error for outcome in outcomes] == [None] * len(arms)
    return root


ROOMY = ("everything", "shorter")


@pytest.mark.parametrize(
    ("arm", "size"), [*((arm, 3) for arm in ARMS), *((arm, 6) for arm in ROOMY)]
)
def test_a_run_of_a_bundle_is_the_run_alone(studies, arm, size):
    alone, bundled = studies / "1" / arm, studies / str(size) / arm
    assert_alike(bundled, alone)
    names = {str(path.relative_to(alone)) for path in alone.rglob("*")}
    assert {str(path.relative_to(bundled)) for path in bundled.rglob("*")} == names
    for name in ("data.json", "modules.json", "config.yaml", "adapter/adapter_config.json"):
        assert (bundled / name).read_bytes() == (alone / name).read_bytes()


def test_a_study_in_turn_is_the_runs_by_themselves(studies, place, tmp_path):
    from loracle.runner.run_many import run_baseline

    with place.entered():
        (spec,) = specs_of(place, tmp_path, {"attention": ARMS["attention"]})
        run_baseline(spec.config, out=spec.out)
    assert facts(spec.out) == facts(studies / "1" / "attention")


def test_what_an_arm_costs_is_measured_alone_and_says_how(studies):
    for arm in ARMS:
        alone = load(studies / "1" / arm / "result.json")["efficiency"]
        bundled = load(studies / "3" / arm / "result.json")["efficiency"]
        assert alone["measured"] == "whole run, alone"
        assert bundled["measured"] == "probe of 2 steps, alone"
        assert bundled["step_time_s"]["num_steps"] == 2
        assert bundled["peak_memory_gib"]["train"] > 0
        assert bundled["trainable_params"] == alone["trainable_params"]
        shared = rows(studies / "3" / arm / "steps.jsonl")
        assert not any(row["clocked"] for row in shared)


def test_the_choice_and_its_reason_are_in_the_environment(studies):
    found = load(studies / "3" / "top" / "environment.json")["engine"]["bundle"]
    assert (found["size"], found["reason"]) == (3, "as asked")
    found = load(studies / "1" / "top" / "environment.json")["engine"]["bundle"]
    assert found["size"] == 1


def test_the_untuned_model_is_scored_and_answers_once_for_all(here, tmp_path, monkeypatch):
    here.forget()
    counts = {"score_examples": 0, "answer_prompts": 0}
    for name in counts:
        whole = getattr(untuned, name)

        def counting(*args, _whole=whole, _name=name, **kwargs):
            counts[_name] += 1
            return _whole(*args, **kwargs)

        monkeypatch.setattr(untuned, name, counting)
    two = {name: ARMS[name] for name in ("everything", "top")}
    run_many(specs_of(here, tmp_path / "first", two))
    assert counts == {"score_examples": 1, "answer_prompts": 1}
    run_many(specs_of(here, tmp_path / "second", two, common=["seed=9"]))
    assert counts == {"score_examples": 1, "answer_prompts": 1}
    for study, how in (("first", "computed"), ("second", "known")):
        engine = load(tmp_path / study / "top" / "environment.json")["engine"]
        assert (engine["untuned_scores"], engine["untuned_answers"]) == (how, how)
    one, two = (rows(tmp_path / study / "top" / "evals.jsonl")[0] for study in ("first", "second"))
    assert one == two


def test_the_second_call_skips_what_is_done_and_computes_nothing(
    studies, here, tmp_path, monkeypatch
):
    root = shutil.copytree(studies / "3", tmp_path / "study")
    untouched = contents(root)
    monkeypatch.setattr(runner, "open_shared_base", lambda *_, **__: pytest.fail("loaded a base"))
    outcomes = run_many(specs_of(here, root), bundle_size=3)
    assert [outcome.out.name for outcome in outcomes] == list(ARMS)
    assert outcomes[2].result == read_result(root / "top")
    assert contents(root) == untouched


def test_only_what_is_missing_is_done(studies, here, tmp_path):
    root = shutil.copytree(studies / "3", tmp_path / "study")
    shutil.rmtree(root / "top")
    untouched = contents(root)
    outcomes = run_many(specs_of(here, root), bundle_size=3)
    assert_alike(root / "top", studies / "1" / "top")
    after = contents(root)
    assert {key: after[key] for key in untouched if key != "."} == untouched
    # Its bundle is gone, but had it been there it would have shared the steps.
    assert outcomes[2].result.efficiency.measured.startswith("probe")


@pytest.mark.parametrize("size", [1, 4])
def test_a_run_that_is_poisoned_or_cannot_take_its_adapter_fails_alone(
    studies, here, tmp_path, monkeypatch, size
):
    attach = shared_base.attach_adapter

    def refuse(base, *, seed, **kwargs):
        if seed == 5:
            raise ModelError("PEFT put no adapter on it")
        return attach(base, seed=seed, **kwargs)

    monkeypatch.setattr(shared_base, "attach_adapter", refuse)
    arms = {"everything": [], "poisoned": POISON, "refused": ["seed=5"], "top": ARMS["top"]}
    outcomes = run_many(specs_of(here, tmp_path, arms), bundle_size=size)
    assert [type(outcome.error) for outcome in outcomes] == [
        type(None), NonFiniteError, ModelError, type(None)
    ]  # fmt: skip
    for name, outcome in zip(("poisoned", "refused"), outcomes[1:3], strict=True):
        status = load(tmp_path / name / "status.json")
        assert (status["status"], status["error"]) == ("failed", str(outcome.error))
        assert not (tmp_path / name / "result.json").exists()
    assert "lower train.learning_rate (now 1e+30)" in str(outcomes[1].error)
    assert str(outcomes[2].error) == "PEFT put no adapter on it"
    for name in ("everything", "top"):
        assert load(tmp_path / name / "status.json")["status"] == "completed"
        assert_alike(tmp_path / name, studies / "1" / name, relative=1e-6)
    untouched = contents(tmp_path / "top")
    again = run_many(specs_of(here, tmp_path, arms), bundle_size=size)
    assert [type(outcome.error) for outcome in again] == [
        type(outcome.error) for outcome in outcomes
    ]
    assert contents(tmp_path / "top") == untouched


def test_a_run_that_breaks_in_its_last_step_fails_in_validation_and_alone(studies, here, tmp_path):
    """The first step has rate 0 and the second is the last: only the validation sees the damage."""
    arms = {"poisoned": [*POISON, "train.max_steps=2", "lora.dropout=0"], "top": ARMS["top"]}
    outcomes = run_many(
        specs_of(here, tmp_path, arms, common=["eval.every_steps=2"]), bundle_size=2
    )
    assert isinstance(outcomes[0].error, NonFiniteError)
    assert str(outcomes[0].error).startswith("validation: the loss of adapter")
    assert load(tmp_path / "poisoned" / "status.json")["status"] == "failed"
    assert outcomes[1].error is None
    assert losses(tmp_path / "top") == pytest.approx(losses(studies / "1" / "top"), rel=1e-6)


def test_a_run_whose_folder_fails_it_fails_alone(here, tmp_path, monkeypatch):
    save = bundle.save_checkpoint

    def full(folder, snapshot, *, keep):
        if folder.parent.name == "top":
            raise UsageError(f"{folder.parent}: the disk is full")
        return save(folder, snapshot, keep=keep)

    monkeypatch.setattr(bundle, "save_checkpoint", full)
    arms = {name: ARMS[name] for name in ("everything", "top")}
    outcomes = run_many(specs_of(here, tmp_path, arms), bundle_size=2)
    assert outcomes[0].error is None
    assert str(outcomes[1].error).endswith("the disk is full")
    status = load(tmp_path / "top" / "status.json")
    assert (status["status"], status["error"]) == ("failed", "top: the disk is full")
    assert len(rows(tmp_path / "top" / "steps.jsonl")) == 2


@pytest.mark.parametrize("where", ["fill_trunk", "_next_step"])
def test_what_a_library_raises_fails_its_bundle_and_no_other(here, tmp_path, monkeypatch, where):
    """Before anything is open, and in a step that all of a bundle share."""
    right, calls = getattr(bundle, where), []

    def broken(*given, **settings):
        calls.append(given)
        if len(calls) == 1:
            raise KeyError("no such layer")
        return right(*given, **settings)

    monkeypatch.setattr(bundle, where, broken)
    arms = {name: ARMS[name] for name in ("everything", "attention")}
    failed, done = run_many(specs_of(here, tmp_path, arms), bundle_size=1)
    assert failed.error.exit_code == 1
    assert load(failed.out / "status.json")["error"] == (
        "KeyError: 'no such layer' (traceback in everything/traceback.txt)"
    )
    assert "no such layer" in (failed.out / "traceback.txt").read_text(encoding="utf-8")
    assert done.result.status == "completed"
    if where == "_next_step":
        (again, _) = run_many(specs_of(here, tmp_path, arms), bundle_size=1)
        assert again.result.status == "completed"
        assert not (again.out / "traceback.txt").exists()


def test_what_a_library_raises_before_any_run_is_in_each_folder(here, tmp_path, monkeypatch):
    def broken(*_given, **_settings):
        raise RuntimeError("tokenizer is a pumpkin")

    monkeypatch.setattr(shared_base, "prepare_data", broken)
    arms = {name: ARMS[name] for name in ("everything", "attention")}
    with pytest.raises(UnexpectedError, match="RuntimeError: tokenizer is a pumpkin"):
        run_many(specs_of(here, tmp_path, arms))
    for name in arms:
        assert load(tmp_path / name / "status.json")["status"] == "failed"
        assert (tmp_path / name / "traceback.txt").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("dtype=bfloat16", "dtype: 'float32' in one, 'bfloat16' in two"),
        ("data.max_tokens=200", "data.max_tokens: 256 in one, 200 in two"),
        ("eval.batch_tokens=77", "eval.batch_tokens: 4096 in one, 77 in two"),
        ("measure.skip_steps=0", "measure.skip_steps: 1 in one, 0 in two"),
        ("model=smollm2-135m", "in one, 'smollm2-135m' in two"),
    ],
)
def test_runs_that_cannot_share_a_base_are_refused_and_leave_nothing(here, tmp_path, change, said):
    specs = specs_of(here, tmp_path / "runs", {"one": [], "two": [change]})
    with pytest.raises(UsageError) as refused:
        run_many(specs)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_runs_one_folder_twice_and_bundles_of_none_are_refused(here, tmp_path):
    (spec,) = specs_of(here, tmp_path, {"one": []})
    with pytest.raises(UsageError, match="no runs"):
        require_agreement([])
    with pytest.raises(UsageError, match="one: two runs cannot share a folder"):
        require_agreement([spec, spec])
    with pytest.raises(UsageError, match="bundle_size: must be at least 1, got 0"):
        require_agreement([spec], bundle_size=0)


def test_one_arm_that_is_not_of_this_model_stops_the_study_before_it_begins(here, tmp_path):
    arms = {"everything": [], "misspelt": ["lora.placement={modules: [q_poj]}"]}
    with pytest.raises(UsageError, match="q_poj"):
        run_many(specs_of(here, tmp_path / "runs", arms))
    assert list(tmp_path.iterdir()) == []


def test_an_arm_is_probed_once_for_all_its_seeds_and_the_base_left_as_it_was_loaded(
    here, tmp_path, monkeypatch
):
    measured, whole = [], probe.measure_alone
    bases, names = [], []

    def watch(*args, **kwargs):
        bases.append(shared_base.open_shared_base(*args, **kwargs))
        names.append([name for name, _ in bases[0].base.model.named_modules()])
        return bases[0]

    monkeypatch.setattr(runner, "open_shared_base", watch)

    def counting(shared, **kwargs):
        measured.append(kwargs["plan"].placement)
        return whole(shared, **kwargs)

    monkeypatch.setattr(probe, "measure_alone", counting)
    arms = {
        f"{name}-{seed}": [*ARMS[name], f"seed={seed}"]
        for seed in (0, 1)
        for name in ("everything", "attention")
    }
    specs = specs_of(here, tmp_path, arms, common=["measure.latency_trials=1"])
    outcomes = run_many(specs, bundle_size=2)
    assert sorted(measured) == ["all-linear", "attention"]
    one, other = (outcomes[index].result.efficiency for index in (0, 2))
    assert one.latency_ms_per_token.merged > 0
    assert one.step_time_s == other.step_time_s
    assert one.latency_ms_per_token == other.latency_ms_per_token
    base = bases[0].base
    assert base.peft is None
    assert [name for name, _ in base.model.named_modules()] == names[0]
    assert base.weights_digest() == bases[0].identity.weights_sha256
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


# Three epochs, in few steps.
EPOCHS = ["train.max_steps=12", "train.batch_size=12", "eval.every_steps=6"]


@pytest.fixture(scope="module")
def trunk_studies(place, tmp_path_factory):
    """Two seeds of an arm at the top, for three epochs: with and without kept states."""
    root = tmp_path_factory.mktemp("trunk")
    top = ["lora.placement={modules: [q_proj, down_proj], layers: [2]}", *EPOCHS]
    with place.entered():
        for trunk, size in (("auto", 1), ("off", 1), ("auto", 2)):
            arms = {f"seed{seed}": [*top, f"seed={seed}"] for seed in (0, 1)}
            specs = specs_of(place, root / f"{trunk}{size}", arms, common=[f"train.trunk={trunk}"])
            run_many(specs, bundle_size=size)
    return root


@pytest.mark.parametrize("study", ["auto1", "auto2"])
@pytest.mark.parametrize("run", ["seed0", "seed1"])
def test_kept_states_change_no_figure_and_are_stated(trunk_studies, study, run):
    assert_alike(trunk_studies / study / run, trunk_studies / "off1" / run)
    trunk = load(trunk_studies / study / run / "result.json")["efficiency"]["trunk"]
    data = load(trunk_studies / study / run / "data.json")
    assert trunk["layer"] == 2
    assert trunk["fill_time_s"] > 0
    tokens = data["train"]["num_tokens"] + data["validation"]["num_tokens"]
    assert 0.8 * tokens <= trunk["kept_gib"] * 2**30 / (32 * 4) <= tokens
    assert load(trunk_studies / "off1" / run / "result.json")["efficiency"]["trunk"] is None


def test_states_that_fit_into_memory_are_kept_there_else_on_disk_else_not(
    here, tmp_path, monkeypatch
):
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "cache"))
    top = {"top": [*ARMS["top"], *EPOCHS]}

    def no_memory():
        return SimpleNamespace(available=0, total=2**33)

    monkeypatch.setattr(runner_trunk.psutil, "virtual_memory", no_memory)
    run_many(specs_of(here, tmp_path / "disk", top))
    kept = sum(path.stat().st_size for path in (tmp_path / "cache" / "trunk").rglob("*.contents"))
    stated = load(tmp_path / "disk" / "top" / "result.json")["efficiency"]["trunk"]
    assert stated["kept_gib"] * 2**30 == kept > 0
    run_many(specs_of(here, tmp_path / "again", top))
    assert load(tmp_path / "again" / "top" / "result.json")["efficiency"]["trunk"] == {
        **stated,
        "fill_time_s": None,
    }
    assert facts(tmp_path / "again" / "top") == facts(tmp_path / "disk" / "top")
    monkeypatch.setattr(runner_trunk.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    run_many(specs_of(here, tmp_path / "nowhere", top))
    found = load(tmp_path / "nowhere" / "top" / "result.json")["efficiency"]["trunk"]
    assert found is None


def test_where_more_tokens_are_faster_the_probe_of_the_first_arm_decides(
    here, tmp_path, monkeypatch
):
    def on_a_gpu(*, rates, memory, device_type, **given):
        assert device_type == "cpu"
        assert all(rate > 0 for _, rate in rates())
        found = memory()
        assert found.base_gib > 0
        assert found.step_gib > 0
        assert found.free_gib > 0
        seen.append(given["tokens_per_step"])
        return bundle_size.choose_bundle_size(
            rates=lambda: [(256, 1.0), (1024, 2.0)],
            memory=lambda: StepMemory(base_gib=1.0, step_gib=2.0, free_gib=2.6),
            device_type="cuda",
            **given,
        )

    seen = []
    monkeypatch.setattr(probe, "choose_bundle_size", on_a_gpu)
    arms = {name: ARMS[name] for name in ("everything", "attention", "faster")}
    run_many(specs_of(here, tmp_path, arms))
    engine = load(tmp_path / "everything" / "environment.json")["engine"]
    assert engine["bundle"]["size"] == 2
    assert engine["bundle"]["reason"].endswith("limited by memory")
    tokens = load(tmp_path / "everything" / "data.json")["train"]
    assert seen == [pytest.approx(4 * tokens["num_tokens"] / tokens["num_examples"])]


def test_memory_of_the_device_is_what_is_free_and_what_its_allocator_only_holds(monkeypatch):
    gib = 2**30
    fake = SimpleNamespace(
        mem_get_info=lambda _: (10 * gib, 80 * gib),
        memory_allocated=lambda _: 3 * gib,
        memory_reserved=lambda _: 5 * gib,
    )
    monkeypatch.setattr(probe.torch, "cuda", fake)
    assert probe.device_memory_gib(torch.device("cuda")) == (3.0, 12.0)


def test_a_checkpoint_of_another_configuration_fails_its_run_and_no_other(
    here, tmp_path, monkeypatch
):
    arms = {name: ARMS[name] for name in ("everything", "top")}
    append = RunFolder.append_eval

    def interrupted(folder, row):
        append(folder, row)
        if row["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_eval", interrupted)
        with pytest.raises(Interrupted):
            run_many(specs_of(here, tmp_path, arms), bundle_size=2)
    digest = active_run.config_digest
    monkeypatch.setattr(
        active_run, "config_digest", lambda config: "0" * 12 if config.seed == 1 else digest(config)
    )
    outcomes = run_many(specs_of(here, tmp_path, arms), bundle_size=2)
    assert outcomes[0].error is None
    assert "top: its checkpoint belongs to another configuration" in str(outcomes[1].error)
    assert load(tmp_path / "top" / "status.json")["status"] == "failed"


def study_words(place, root, arms, *, size, common=()):
    given = {
        "config": str(place.config),
        "runs": {
            str(root / name): [*SHORT, *common, *overrides] for name, overrides in arms.items()
        },
        "bundle_size": size,
    }
    return ["many", json.dumps(given)]


LONG = ["train.max_steps=12", "checkpoint.every_steps=2"]
THREE = {
    "everything": [],
    "attention": ARMS["attention"],
    "shorter": [*ARMS["top"], "train.max_steps=7"],
}


@pytest.fixture(scope="module")
def unkilled(place, nursery, tmp_path_factory):
    """What three runs in one bundle come to, and how often they touch their folders."""
    root = tmp_path_factory.mktemp("unkilled") / "study"
    words = study_words(place, root, {n: [*LONG, *o] for n, o in THREE.items()}, size=3)
    assert nursery.live(words, folder=root).code == 0
    return {name: facts(root / name) for name in THREE}, int(
        root.with_name("study.events").read_text()
    )


def test_a_bundle_killed_again_and_again_ends_with_the_same_bits(
    place, nursery, unkilled, tmp_path
):
    expected, events = unkilled
    draw, kills, root = random.Random(1), 0, tmp_path / "study"
    words = study_words(place, root, {n: [*LONG, *o] for n, o in THREE.items()}, size=3)
    while True:
        if kills % 3 == 2:
            end = {"step": draw.randint(1, 9), "delay_s": draw.uniform(0, 0.02)}
        else:
            end = {"events": draw.randint(60, events // 2)}
        outcome = nursery.live(words, folder=root, **end)
        if outcome.code != -9:
            break
        kills += 1
    assert outcome.code == 0, outcome.err
    assert kills >= 3
    assert {name: facts(root / name) for name in THREE} == expected


def test_a_bundle_cut_between_two_members_checkpoints_goes_back_to_the_common_step(
    place, nursery, unkilled, tmp_path
):
    """The 21st file is the second member's: of its second checkpoint, half is written."""
    root = tmp_path / "study"
    words = study_words(place, root, {n: [*LONG, *o] for n, o in THREE.items()}, size=3)
    assert nursery.live(words, folder=root, half=21).code == -9
    newest = {
        name: sorted((root / name / "checkpoints").glob("step-????????"))[-1].name for name in THREE
    }
    assert newest == {
        "everything": "step-00000004",
        "attention": "step-00000002",
        "shorter": "step-00000002",
    }
    outcome = nursery.live(words, folder=root)
    assert outcome.code == 0
    assert outcome.err.count("resuming after step 2 of") == 3
    assert {name: facts(root / name) for name in THREE} == unkilled[0]


def test_without_a_common_checkpoint_each_goes_on_from_its_own(place, nursery, tmp_path, studies):
    root = tmp_path / "study"
    arms = {name: ARMS[name] for name in ("everything", "top")}
    words = study_words(place, root, arms, size=2, common=["checkpoint.keep=1"])
    assert nursery.live(words, folder=root, half=17).code == -9
    outcome = nursery.live(words, folder=root)
    assert outcome.code == 0
    assert "resuming after step 4 of 6" in outcome.err
    assert "resuming after step 2 of 6" in outcome.err
    for name in arms:
        assert_alike(root / name, studies / "1" / name)


def test_a_signal_leaves_a_checkpoint_of_every_run_of_the_bundle(
    here, tmp_path, monkeypatch, unkilled
):
    arms = {**{n: [*LONG, *o] for n, o in THREE.items()}, "waiting": [*LONG, *ARMS["top"]]}
    specs = specs_of(here, tmp_path, arms)
    append, taken = RunFolder.append_step, []

    def appending(folder, row):
        append(folder, row)
        taken.append(row)
        if len(taken) == 7:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "append_step", appending)
    with pytest.raises(Interrupted):
        run_many(specs, bundle_size=3)
    monkeypatch.setattr(RunFolder, "append_step", append)
    for name in arms:
        status = load(tmp_path / name / "status.json")
        assert (status["status"], status["error"]) == ("interrupted", "interrupted by SIGINT")
    for name in THREE:
        assert sorted((tmp_path / name / "checkpoints").iterdir())[-1].name == "step-00000003"
    assert not (tmp_path / "waiting" / "checkpoints").exists()
    outcomes = run_many(specs, bundle_size=3)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    assert {name: facts(tmp_path / name) for name in THREE} == unkilled[0]
