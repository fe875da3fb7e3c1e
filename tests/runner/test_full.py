"""Full fine-tuning, the reference: the same loop, data and loss, every weight of the model."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loracle.config.files import load_config
from loracle.data import prepare_data
from loracle.engine.schedule import DataOrder, learning_rate
from loracle.engine.train import train_bundle
from loracle.engine.train_state import new_run
from loracle.errors import PlacementError
from loracle.model.layers.head import target_nll, trained_target_nll
from loracle.model.load import load_base
from loracle.model.whole import moved_weights, stored_weights, whole_model
from loracle.placement import ModulePlan, resolve_placement, select_modules
from loracle.records.study_folder import read_study
from loracle.runner.run_many import run_many
from loracle.runner.run_spec import RunSpec
from runs_fixture import contents, facts, load, rows, settings

SHORT = settings(train__max_steps=4, eval__every_steps=2, measure__latency_trials=0)


@pytest.fixture(scope="module")
def tuned(place):
    """The folder of a finished full fine-tuning; nobody writes in it."""
    folder = place.work / "full" / "first"
    outcome = place.baseline("--out", folder, *SHORT, lora__placement="full")
    assert outcome.code == 0, outcome.err
    return folder


def test_full_is_a_placement_without_modules():
    from geometries import SMOLLM2_135M
    from loracle.model.inventory import inventory_from_architecture

    inventory = inventory_from_architecture(SMOLLM2_135M)
    plan = resolve_placement("full", inventory=inventory, rank=16, alpha=32)
    assert plan.is_full
    assert plan.trainable_params == plan.total_params == 134_515_008
    assert ModulePlan.from_json(plan.to_json()) == plan
    with pytest.raises(PlacementError, match="trains every weight"):
        select_modules("full", inventory=inventory)
    with pytest.raises(PlacementError, match="did you mean 'full'"):
        resolve_placement("ful", inventory=inventory, rank=1, alpha=1)


def test_a_head_that_trains_has_the_loss_of_one_that_does_not_and_autograds_gradient():
    torch.manual_seed(0)
    hidden = torch.randn(700, 16, requires_grad=True)
    weight = torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(40, (700,))
    ours = trained_target_nll(hidden, weight=weight, bias=None, targets=targets)
    frozen = target_nll(hidden.detach(), weight=weight.detach(), bias=None, targets=targets)
    torch.testing.assert_close(ours, frozen)
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    for mine, theirs in zip(
        torch.autograd.grad(ours.sum(), [hidden, weight]),
        torch.autograd.grad(plain.sum(), [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    assert trained_target_nll(hidden[:0], weight=weight, bias=None, targets=targets[:0]).shape == (
        0,
    )


def test_it_is_a_plain_loop_over_all_weights(place):
    """Twenty steps of Transformers, AdamW and autograd, one sequence at a time, in fp32."""
    with place.entered():
        config = load_config(place.config, overrides=["train.max_steps=20"])
        base = load_base(place.model, device=torch.device("cpu"), dtype=torch.float32, trains=True)
        from loracle.sources import resolve_data

        data = prepare_data(
            resolve_data(config.data.source), config=config.data, tokenizer=base.tokenizer
        )
    plan = ModulePlan("full", (), sum(p.numel() for p in base.model.parameters()))
    trained = whole_model(base, name="default", plan=plan)
    run = new_run(
        base, adapter=trained, examples=data.train, train=config.train, dropout=0.1, seed=0
    )
    ours = [
        record.loss_nats_per_token
        for (record,) in train_bundle(base, [run], micro_batch_tokens=300)
    ]

    model = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    train = config.train
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1.0,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        weight_decay=train.weight_decay,
    )
    order, theirs = DataOrder(data.train, batch_size=train.batch_size, seed=0), []
    for step in range(20):
        batch = order.batch(step)
        targets = sum(example.num_targets for example in batch)
        total = 0.0
        for example in batch:
            ids = torch.tensor([example.input_ids])
            logits = model(input_ids=ids).logits[0, example.num_prompt - 1 : -1]
            nll = torch.nn.functional.cross_entropy(
                logits, ids[0, example.num_prompt :], reduction="sum"
            )
            (nll / targets).backward()
            total += nll.item()
        theirs.append(total / targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, train=train)
        optimizer.step()
        optimizer.zero_grad()
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]


def test_a_run_leaves_a_model_that_stock_transformers_loads(tuned, place):
    result = load(tuned / "result.json")
    efficiency = result["efficiency"]
    assert result["placement"] == "full"
    assert efficiency["trainable_params"] == efficiency["total_params"]
    assert efficiency["trainable_frac"] == 1.0
    assert efficiency["measured"] == "whole run, alone"
    assert result["quality"]["tuned"]["perplexity"] < result["quality"]["base"]["perplexity"]
    audit = result["audit"]
    assert audit["faults"] == []
    assert audit["frozen_weights_unchanged"] is None
    assert audit["updated_modules"] == audit["planned_modules"] > 0
    assert audit["saved_tensors_exact"]
    model = AutoModelForCausalLM.from_pretrained(tuned / "model", dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == efficiency["trainable_params"]
    assert not (tuned / "adapter").exists()
    assert load(tuned / "modules.json")["modules"] == []


def test_its_untuned_figures_are_those_of_the_frozen_base(tuned, finished):
    theirs = rows(finished / "evals.jsonl")[0]
    ours = rows(tuned / "evals.jsonl")[0]
    assert (ours["model"], ours["nll_sum_nats"]) == ("base", theirs["nll_sum_nats"])


def test_stopped_and_gone_on_with_it_ends_with_the_same_bits(tuned, place, nursery, tmp_path):
    folder = tmp_path / "cut"
    words = ["baseline", place.config, "--out", folder, *SHORT]
    words += ["--set", "lora.placement=full", "--set", "checkpoint.every_steps=1"]
    assert nursery.live(words, folder=folder, step=3, delay_s=0.01).code == -9
    outcome = nursery.live([*words, "--resume"], folder=folder)
    assert outcome.code == 0, outcome.err
    for key in ("steps", "evals", "examples", "quality"):
        assert whole_facts(folder)[key] == whole_facts(tuned)[key], key
    one, two = (load_file(each / "model" / "model.safetensors") for each in (folder, tuned))
    assert all(torch.equal(one[key], two[key]) for key in two)


def whole_facts(run):
    (run / "adapter").mkdir(exist_ok=True)
    stand_in = run / "adapter" / "adapter_model.safetensors"
    stand_in.write_bytes((run / "model" / "model.safetensors").read_bytes())
    try:
        return facts(run)
    finally:
        stand_in.unlink()
        stand_in.parent.rmdir()


def test_it_comes_after_the_adapters_and_alone(place, tmp_path):
    with place.entered():
        specs = [
            RunSpec(
                load_config(place.config, overrides=[*SHORT[1::2], f"lora.placement={name}"]),
                tmp_path / name,
            )
            for name in ("full", "attention", "feed-forward")
        ]
        outcomes = run_many(specs, bundle_size=2)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert [outcome.out.name for outcome in outcomes] == ["full", "attention", "feed-forward"]
    engine = load(tmp_path / "full" / "environment.json")["engine"]
    assert engine["bundle"]["size"] == 1
    assert load(tmp_path / "full" / "result.json")["efficiency"]["measured"] == "whole run, alone"
    base = [load(tmp_path / n / "result.json")["quality"]["base"] for n in ("full", "attention")]
    assert base[0] == base[1]


def test_in_bfloat16_weights_stay_in_fp32_and_the_loss_falls(place, tmp_path):
    outcome = place.baseline(
        "--out", tmp_path / "bf16", *SHORT, lora__placement="full", dtype="bfloat16"
    )
    assert outcome.code == 0, outcome.err
    stored = stored_weights(tmp_path / "bf16" / "model")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    quality = load(tmp_path / "bf16" / "result.json")["quality"]
    assert quality["tuned"]["loss_nats_per_token"] < quality["base"]["loss_nats_per_token"]


def test_moved_weights_counts_what_changed_and_is_finite(place):
    base = load_base(place.model, device=torch.device("cpu"), dtype=torch.float32, trains=True)
    plan = ModulePlan("full", (), 1)
    trained = whole_model(base, name="default", plan=plan)
    assert moved_weights(trained, model_folder=place.model) == 0
    first, second, *_ = trained.parameters.values()
    with torch.no_grad():
        first.add_(1.0)
        second.fill_(math.nan)
    assert moved_weights(trained, model_folder=place.model) == 1


def test_sample_answers_with_the_tuned_model(tuned, place):
    before = contents(tuned)
    outcome = place.loracle("sample", tuned, "Name a color.")
    assert outcome.code == 0, outcome.err
    assert contents(tuned) == before


STUDY = """\
question: What does training everything give?
base: {base}
config:
  train: {{max_steps: 3}}
  eval: {{every_steps: 0, generate_examples: 2, max_new_tokens: 4}}
  measure: {{skip_steps: 1, latency_trials: 0}}
  audit: {{reload_examples: 2}}
reference: all-linear
budget: equal-parameters
seeds: [0, 1]
full: {{learning_rate: 1.0e-4}}
arms:
  full:
  all-linear:
"""


def test_in_a_study_it_is_judged_and_reported_beside_the_arms(place, tmp_path, unmeasured):
    file = tmp_path / "reference.yaml"
    file.write_text(STUDY.format(base=place.config), encoding="utf-8")
    folder = tmp_path / "study"
    outcome = place.loracle("study", file, "--out", folder)
    assert outcome.code == 0, outcome.err
    assert "full" in outcome.out
    study = read_study(folder)
    assert study.unfinished == ()
    results = [run.result for run in study.runs if run.arm == "full"]
    assert [result.placement for result in results] == ["full", "full"]
    base = {run.result.quality.base.loss_nats_per_token for run in study.runs}
    assert len(base) == 1
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "full" in page
    judged = load(folder / "report" / "verdicts.json")
    assert "full" in json.dumps(judged)
