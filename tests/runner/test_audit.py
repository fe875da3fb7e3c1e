"""The audit passes an honest run and catches each kind of dishonest one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracle.data import Example
from loracle.data.packing import pack
from loracle.engine.evaluate import score_examples
from loracle.errors import AuditError
from loracle.model.adapters import Adapter, save_adapter
from loracle.model.base import FrozenBase
from loracle.model.load import load_base
from loracle.records.files import to_json
from loracle.records.result import Audit
from loracle.runner import audit
from loracle.runner.audit import (
    audit_run,
    count_trainable,
    require_sound,
    stock_nll_sums,
    tolerated,
    tolerated_spread,
)
from tiny_engine import (
    CPU,
    attach,
    examples_of,
    packed_nll,
    save_family,
    stock_model,
    stock_nll,
    stock_peft,
    tiny_plan,
)

EXAMPLES = examples_of(5)
DOWN = "model.layers.1.mlp.down_proj"


class FinishedRun:
    """A run of which everything is honest until a test changes it."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        examples: Sequence[Example] = EXAMPLES,
        spread_b: float = 0.1,
    ) -> None:
        self.examples = examples
        self.model_folder = save_family(folder / "model", stock_model(dtype=dtype))
        self.base: FrozenBase = load_base(self.model_folder, device=CPU, dtype=dtype)
        self.digest = self.base.weights_digest()
        self.adapter: Adapter = attach(self.base, tiny_plan(), spread_b=spread_b)
        self.saved = save_adapter(self.base, name="default", folder=folder / "adapter")
        self.score()

    def score(self) -> None:
        self.scores = score_examples(self.base, self.examples, adapter="default", batch_tokens=1000)

    def audit(self) -> Audit:
        return audit_run(
            self.base,
            trained=self.adapter,
            saved=self.saved,
            model_folder=self.model_folder,
            digest_before=self.digest,
            digest_after=self.base.weights_digest(),
            examples=self.examples,
            scores=self.scores,
        )


@pytest.fixture
def run(tmp_path) -> FinishedRun:
    return FinishedRun(tmp_path)


def test_an_honest_run_passes(run):
    audit = run.audit()
    assert audit.faults == []
    assert audit.updated_modules == audit.planned_modules == 21
    assert audit.trainable_params == audit.planned_params == run.adapter.plan.trainable_params
    assert audit.reload_difference < 1e-6
    assert audit.reloaded_examples == 5
    require_sound(audit)


def test_the_reloaded_loss_is_that_of_the_tuned_model_and_not_the_base(run):
    with torch.no_grad():
        base_loss = packed_nll(run.base, pack(EXAMPLES)).mean().item()
    audit = run.audit()
    assert abs(audit.reloaded_loss_nats_per_token - base_loss) > 100 * audit.relative_tolerance


def sound(**changes: float) -> Audit:
    """An audit without a fault, with changes."""
    found = Audit(
        updated_modules=1,
        planned_modules=1,
        frozen_weights_unchanged=True,
        trainable_params=1,
        planned_params=1,
        saved_tensors_exact=True,
        reloaded_loss_nats_per_token=2.0,
        recorded_loss_nats_per_token=2.0,
        reloaded_examples=32,
        relative_tolerance=1e-3,
        example_spread_nats=0.1,
        tolerated_spread_nats=0.2,
    )
    return replace(found, **changes)


def test_each_limit_is_the_last_value_without_a_fault():
    assert sound(example_spread_nats=0.2).faults == []
    assert sound(reloaded_loss_nats_per_token=2.0019).faults == []
    (total,) = sound(reloaded_loss_nats_per_token=2.0021).faults
    (spread,) = sound(example_spread_nats=0.201).faults
    assert total.startswith("the saved adapter gives 2.002100 nats per token")
    assert "0.201 nats per root token off what was recorded" in spread
    assert sound(example_spread_nats=float("nan")).faults


def test_an_audit_older_than_the_spread_has_no_fault_of_it():
    assert sound(example_spread_nats=None, tolerated_spread_nats=None).faults == []


def test_totals_of_more_tokens_and_spreads_of_more_examples_are_known_better():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        total = tolerated(dtype, loss=2.0, num_tokens=100)
        assert tolerated(dtype, loss=2.0, num_tokens=400) == pytest.approx(total / 2)
        assert tolerated(dtype, loss=4.0, num_tokens=100) == pytest.approx(total / 2)
        # One example is its own total.
        one = tolerated_spread(dtype, num_examples=1)
        assert total * 2.0 * 100 == pytest.approx(one * 10)
        few, many = (tolerated_spread(dtype, num_examples=count) for count in (8, 32))
        assert one > few > many > one / 5


def test_differences_that_cancel_in_the_total_show_in_the_spread(tmp_path):
    run = FinishedRun(tmp_path, examples=examples_of(32))
    for index, score in enumerate(run.scores):
        shift = (-1) ** index * 1e-2
        run.scores[index] = replace(score, nll_sum_nats=score.nll_sum_nats + shift)
    audit = run.audit()
    assert audit.reload_difference < audit.relative_tolerance
    (fault,) = audit.faults
    assert fault.startswith("single examples by stock PEFT are ")


def test_the_stock_scores_are_those_of_a_model_of_nothing_but_stock(run):
    peft = stock_peft(stock_model(), run.adapter.plan, like=run.adapter)
    done = []
    ours = stock_nll_sums(
        run.saved,
        model_folder=run.model_folder,
        examples=EXAMPLES,
        like=run.base,
        progress=done.append,
    )
    with torch.no_grad():
        theirs = [stock_nll(peft, example).double().sum().item() for example in EXAMPLES]
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert done == [1] * 5


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_module_that_did_not_move_is_caught(run, value):
    run.adapter.parameters[f"{DOWN}.lora_B"].data.fill_(value)
    assert "lora_B moved in 20 of 21 modules" in run.audit().faults


@pytest.mark.parametrize("name", [f"{DOWN}.base_layer", "model.norm", "model.embed_tokens"])
def test_a_frozen_weight_that_changed_by_one_bit_is_caught(run, name):
    run.base.model.get_submodule(name).weight.data.view(torch.int32).flatten()[7] ^= 1
    assert run.audit().faults == ["frozen weights changed"]


def test_a_parameter_that_trains_unplanned_is_caught(run):
    run.base.model.model.norm.weight.requires_grad_(True)
    planned = run.adapter.plan.trainable_params
    assert run.audit().faults == [f"{planned + 32} trainable, {planned} planned"]


def test_a_parameter_that_does_not_train_as_planned_is_caught(run):
    run.adapter.parameters[f"{DOWN}.lora_A"].requires_grad_(False)
    planned = run.adapter.plan.trainable_params
    assert run.audit().faults == [f"{planned - 4 * 48} trainable, {planned} planned"]


def test_a_saved_adapter_that_is_another_is_caught(run):
    path = run.saved / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.{DOWN}.lora_B.weight"
    tensors[key] = tensors[key] * 1.5
    save_file(tensors, path)
    exact, fault = run.audit().faults
    assert exact == "the saved tensors are not the adapter's"
    assert fault.startswith("the saved adapter gives ")
    assert "through stock PEFT, the run recorded " in fault


def test_a_saved_tensor_too_small_a_change_for_the_loss_is_caught(run):
    path = run.saved / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.{DOWN}.lora_B.weight"
    tensors[key] = tensors[key] * (1 + 1e-6)
    save_file(tensors, path)
    assert run.audit().faults == ["the saved tensors are not the adapter's"]


def lose(tensors: dict[str, torch.Tensor], *layers: str) -> None:
    for key in tensors:
        if key.endswith("lora_B.weight") and any(f".{layer}." in key for layer in layers):
            tensors[key].zero_()


def swap(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if ".layers.0." in key]:
        other = key.replace(".layers.0.", ".layers.1.")
        tensors[key], tensors[other] = tensors[other].clone(), tensors[key].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_that_is_lost_swapped_or_short_of_a_module_shows_in_the_loss(dtype, tmp_path):
    """With the default number of examples, from the losses alone."""
    run = FinishedRun(tmp_path, dtype=dtype, examples=examples_of(32, longest=40), spread_b=0.5)
    path = run.saved / "adapter_model.safetensors"
    kept = load_file(path)
    for damage in (
        lambda tensors: lose(tensors, "layers"),
        lambda tensors: lose(tensors, DOWN.removeprefix("model.")),
        swap,
        lambda tensors: [tensors[key].mul_(1.25) for key in tensors if "lora_B" in key],
    ):
        tensors = {key: value.clone() for key, value in kept.items()}
        damage(tensors)
        save_file(tensors, path)
        faults = [fault for fault in run.audit().faults if "stock PEFT" in fault]
        assert len(faults) == 1


def test_a_saved_adapter_of_another_scale_is_caught(run):
    config = run.saved / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8.0', '"lora_alpha": 8.1'))
    (fault,) = run.audit().faults
    assert fault.startswith("the saved adapter gives ")


def test_a_saved_adapter_whose_layers_are_swapped_is_caught(run):
    path = run.saved / "adapter_model.safetensors"
    tensors = load_file(path)
    ours, theirs = f"base_model.model.{DOWN}.", f"base_model.model.{DOWN.replace('1', '2')}."
    swapped = {name.replace(ours, "x.").replace(theirs, ours).replace("x.", theirs): value
               for name, value in tensors.items()}  # fmt: skip
    assert swapped.keys() == tensors.keys()
    save_file({name: value.clone() for name, value in swapped.items()}, path)
    exact, fault = run.audit().faults
    assert exact == "the saved tensors are not the adapter's"
    assert fault.startswith("the saved adapter gives ")


def test_the_stock_model_does_not_hold_the_weights_a_second_time(run, monkeypatch):
    seen = []
    real = audit.PeftModel.from_pretrained

    def watched(model, *args):
        seen.extend(parameter.data_ptr() for parameter in model.parameters())
        return real(model, *args)

    monkeypatch.setattr(audit.PeftModel, "from_pretrained", watched)
    assert run.audit().faults == []
    assert set(seen) <= {tensor.data_ptr() for tensor in run.base.held_tensors()}
    assert len(seen) == 30


def test_recorded_scores_that_are_not_the_models_are_caught(run):
    run.scores[0] = replace(run.scores[0], nll_sum_nats=run.scores[0].nll_sum_nats + 0.1)
    (fault,) = run.audit().faults
    assert fault.startswith("the saved adapter gives ")


def test_several_faults_are_all_reported_in_one_line(run):
    run.adapter.parameters[f"{DOWN}.lora_B"].data.zero_()
    run.base.model.model.norm.weight.requires_grad_(True)
    run.base.model.model.norm.weight.data.add_(1)
    audit = run.audit()
    # The stock model reads the base's tensors, so its loss shows the change too.
    assert len(audit.faults) == 5
    with pytest.raises(AuditError, match=r"^audit: lora_B moved in .*; frozen weights .*; \d+ tr"):
        require_sound(audit)
    assert to_json(audit)["faults"] == audit.faults


def test_a_loss_that_is_not_a_number_is_a_fault(run):
    audit = replace(run.audit(), reloaded_loss_nats_per_token=float("nan"))
    assert any("nan nats per token" in fault for fault in audit.faults)


def test_another_runs_adapter_in_the_same_base_does_not_count(run):
    attach(run.base, tiny_plan(rank=2), name="other")
    assert count_trainable(run.base, adapter="default") == run.adapter.plan.trainable_params
    assert run.audit().faults == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_honest_run_in_16_bit_passes(dtype, tmp_path):
    run = FinishedRun(tmp_path, dtype=dtype, examples=examples_of(100))
    assert run.audit().faults == []
