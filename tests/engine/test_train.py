"""The loop does what a plain PEFT loop does, for one run or several, whole or continued."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import get_scheduler

from loracle.config.run import PlacementConfig
from loracle.data import Example, Record
from loracle.engine.train import StepRecord, train_bundle
from loracle.engine.train_state import TrainState, capture_state, restore_state
from loracle.errors import NonFiniteError
from loracle.model.adapters import Adapter
from loracle.model.base import FrozenBase
from loracle.placement import ModulePlan
from tiny_engine import (
    attach,
    base_of,
    examples_of,
    peft_tensors,
    stock_model,
    stock_peft,
    tiny_base,
    tiny_plan,
    tiny_run,
)

EXAMPLES = examples_of(11)
GOLDEN = [4.361229, 4.449289, 4.602958, 3.994482, 4.5811]
"""Losses of the first five steps of ``start()``; a change of numerics must be meant and said."""


def start(
    base: FrozenBase | None = None,
    *,
    plan: ModulePlan | None = None,
    name: str = "default",
    seed: int = 0,
    dropout: float = 0.1,
    examples: Sequence[Example] = EXAMPLES,
    **changes: object,
) -> tuple[FrozenBase, TrainState]:
    """A run at step 0 whose B starts at zero, as in earnest."""
    base = base or tiny_base()
    adapter = attach(base, plan or tiny_plan(), name=name, seed=seed, spread_b=None)
    return base, tiny_run(base, adapter, examples, dropout=dropout, seed=seed, **changes)


def take(
    base: FrozenBase, run: TrainState, *, micro_batch_tokens: int = 64, steps: int | None = None
) -> list[StepRecord]:
    """The records of the run's next steps, alone."""
    records = []
    for (record,) in train_bundle(base, [run], micro_batch_tokens=micro_batch_tokens):
        records.append(record)
        if len(records) == steps:
            break
    return records


def losses(records: Sequence[StepRecord]) -> list[float]:
    return [record.loss_nats_per_token for record in records]


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in adapter.parameters.items()}


def snapshot(run: TrainState) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The run's state, its tensors copied."""
    saved, state = capture_state(run)
    return {name: value.clone() for name, value in saved.items()}, state


def assert_same(candidate: dict[str, Tensor], reference: dict[str, Tensor], *, to: float) -> None:
    """Each tensor within a relative distance of the other."""
    assert candidate.keys() == reference.keys()
    for name, target in reference.items():
        assert (candidate[name] - target).norm() <= to * target.norm(), name


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 33])
def test_a_step_does_not_depend_on_how_it_is_cut(micro_batch_tokens):
    result = []
    for tokens in (10_000, micro_batch_tokens):
        base, run = start(max_grad_norm=None, batch_size=7, dropout=0.2, warmup_frac=0.0)
        for name, parameter in run.adapter.parameters.items():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(
                    parameter, std=0.1, generator=torch.Generator().manual_seed(1)
                )
        grads = {}
        run.optimizer.register_step_pre_hook(
            lambda *_, run=run, grads=grads: grads.update(
                {name: p.grad.clone() for name, p in run.adapter.parameters.items()}
            )
        )
        (record,) = take(base, run, micro_batch_tokens=tokens, steps=1)
        result.append((record, grads))
    (whole, whole_grads), (cut, cut_grads) = result
    assert cut.loss_nats_per_token == pytest.approx(whole.loss_nats_per_token, rel=1e-6)
    assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-6)
    assert len(whole_grads) == 42
    # Up to 1.1e-6 with another CPU's kernels; a wrong cut changes whole percents.
    assert_same(cut_grads, whole_grads, to=1e-5)


def test_what_a_step_records():
    base, run = start(max_steps=5, batch_size=4, learning_rate=0.01, warmup_frac=0.4)
    records = take(base, run)
    assert [record.step for record in records] == [1, 2, 3, 4, 5]
    assert [record.epoch for record in records] == pytest.approx([4 * k / 11 for k in range(1, 6)])
    rates = [record.learning_rate for record in records]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.0075, 0.0025])
    for index, record in enumerate(records):
        batch = run.order.batch(index)
        assert record.num_tokens == sum(example.num_tokens for example in batch)
        assert record.num_targets == sum(example.num_targets for example in batch)
        assert record.step_time_s > 0
    assert run.is_done
    assert take(base, run) == []


def test_the_gradient_is_clipped_to_the_bound_and_recorded_before():
    base, run = start(max_grad_norm=0.01)
    clipped = []
    run.optimizer.register_step_pre_hook(
        lambda *_: clipped.append(
            math.sqrt(sum(p.grad.square().sum().item() for p in run.adapter.parameters.values()))
        )
    )
    records = take(base, run, steps=2)
    assert all(record.grad_norm > 0.05 for record in records)
    assert clipped == pytest.approx([0.01, 0.01], rel=1e-4)


def padded_step(peft: torch.nn.Module, batch: Sequence[Example]) -> Tensor:
    """Token-weighted loss of a padded batch, as a plain loop computes it."""
    width = max(example.num_tokens for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        tokens = torch.tensor(example.input_ids)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, example.num_prompt : len(tokens)] = tokens[example.num_prompt :]
    logits = peft(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100
    )


def plain_loop(peft: torch.nn.Module, run: TrainState) -> list[float]:
    """Trains stock PEFT by hand: torch's AdamW, Transformers' schedule, torch's clipping."""
    train, parameters = run.train, list(peft_tensors(peft).values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        weight_decay=train.weight_decay,
    )
    warmup = math.ceil(train.warmup_frac * train.max_steps)
    scheduler = get_scheduler(train.schedule, optimizer, warmup, train.max_steps)
    result = []
    for step in range(train.max_steps):
        loss = padded_step(peft, run.order.batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        result.append(loss.item())
    return result


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fifty_steps_equal_a_plain_peft_loop(family):
    stock, plan = stock_model(family), tiny_plan(family=family)
    base, run = start(
        base_of(stock),
        plan=plan,
        dropout=0.0,
        max_steps=50,
        learning_rate=3e-3,
        weight_decay=0.01,
        max_grad_norm=2.5,
    )
    peft = stock_peft(stock, plan, like=run.adapter)
    reference = plain_loop(peft, run)
    records = take(base, run)
    candidate = losses(records)
    assert min(r.grad_norm for r in records) < 2.5 < max(r.grad_norm for r in records)
    assert candidate[-1] < 0.8 * candidate[0]
    assert candidate == pytest.approx(reference, rel=1e-5)
    assert_same(
        tensors(run.adapter), {n: p.detach() for n, p in peft_tensors(peft).items()}, to=1e-4
    )


def test_in_bf16_the_two_loops_differ_by_less_than_seeds_do():
    """Four seeds of 50 steps: no drift to either side, and no run far from its twin."""
    gaps, ends = [], []
    for seed in range(4):
        stock = stock_model(dtype=torch.bfloat16)
        base, run = start(base_of(stock), seed=seed, dropout=0.0, max_steps=50, learning_rate=3e-3)
        peft = stock_peft(stock, tiny_plan(), like=run.adapter)
        reference, candidate = plain_loop(peft, run), losses(take(base, run))
        assert candidate[-1] < 0.8 * candidate[0]
        ends.append(statistics.fmean(reference[-10:]))
        gaps.append(statistics.fmean(candidate[-10:]) - ends[-1])
    spread = statistics.stdev(ends)
    assert abs(statistics.fmean(gaps)) < 0.25 * spread
    assert max(map(abs, gaps)) < 0.5 * spread


def test_golden_losses():
    base, run = start(dropout=0.1, max_steps=5, learning_rate=0.01, warmup_frac=0.2)
    assert losses(take(base, run)) == pytest.approx(GOLDEN, rel=1e-5)


def test_base_weights_do_not_move():
    base, run = start()
    before = base.weights_digest()
    take(base, run)
    assert base.weights_digest() == before
    assert all(parameter.any() for parameter in run.adapter.parameters.values())


@dataclass
class Member:
    """A run of a bundle, to be built on any base."""

    name: str
    plan: ModulePlan
    dropout: float
    changes: dict[str, object]

    def on(self, base: FrozenBase) -> TrainState:
        seed = ord(self.name)
        _, run = start(
            base,
            plan=self.plan,
            name=self.name,
            seed=seed,
            dropout=self.dropout,
            examples=EXAMPLES[seed % 4 :],
            **self.changes,
        )
        return run


def members(family: str, *, down: str, attention: str) -> list[Member]:
    """Runs that differ in everything in which runs of a bundle may differ."""
    head = PlacementConfig(modules=[down, "lm_head"])
    one_layer = PlacementConfig(modules=[attention], layers=[2])
    return [
        Member("a", tiny_plan(family=family, rank=3), 0.1, {"max_steps": 8}),
        Member(
            "b",
            tiny_plan(head, family=family, rank=5, alpha=1),
            0.3,
            {"max_steps": 5, "learning_rate": 2e-3, "schedule": "linear", "max_grad_norm": None},
        ),
        Member(
            "c",
            tiny_plan(one_layer, family=family, rank=1),
            0.0,
            {"max_steps": 10, "batch_size": 2, "weight_decay": 0.1, "schedule": "constant"},
        ),
        Member("d", tiny_plan("last-third", family=family), 0.5, {"max_steps": 3, "batch_size": 9}),
    ]


def bundle_and_alone(bundle, *, base_of_run, micro_batch_tokens):
    """Each member's records and adapter in the bundle, and by itself."""
    shared = base_of_run()
    runs = [member.on(shared) for member in bundle]
    together = list(train_bundle(shared, runs, micro_batch_tokens=micro_batch_tokens))
    for run, member, records in zip(runs, bundle, zip(*together, strict=True), strict=True):
        base = base_of_run()
        alone = member.on(base)
        mine = [record for record in records if record is not None]
        yield mine, tensors(run.adapter), take(base, alone), tensors(alone.adapter)


def test_each_run_of_a_bundle_gets_what_it_gets_alone_to_the_last_digits():
    """In fp64, on a model that computes in it throughout (Llama's norms are fp32)."""
    bundle = members("gpt2", down="c_proj", attention="c_attn")
    for mine, adapter, alone, alone_adapter in bundle_and_alone(
        bundle, base_of_run=lambda: tiny_base("gpt2", dtype=torch.float64), micro_batch_tokens=40
    ):
        assert losses(mine) == pytest.approx(losses(alone), rel=1e-11)
        assert_same(adapter, alone_adapter, to=1e-9)


def six() -> list[Member]:
    """Six runs that share nothing but the base and the step."""
    return [
        *members("llama", down="down_proj", attention="v_proj"),
        Member("e", tiny_plan("attention", rank=8), 0.05, {"max_steps": 12, "batch_size": 1}),
        Member(
            "f",
            tiny_plan(PlacementConfig(modules=["up_proj", "q_proj"], layers=[1]), rank=2, alpha=3),
            0.2,
            {"max_steps": 7, "learning_rate": 3e-2, "schedule": "linear", "max_grad_norm": 0.5},
        ),
    ]


@pytest.mark.parametrize("micro_batch_tokens", [100_000, 60])
def test_each_of_six_different_runs_gets_what_it_gets_alone(micro_batch_tokens):
    result = list(
        bundle_and_alone(six(), base_of_run=tiny_base, micro_batch_tokens=micro_batch_tokens)
    )
    assert [len(mine) for mine, *_ in result] == [8, 5, 10, 3, 12, 7]
    for mine, adapter, alone, alone_adapter in result:
        assert [r.learning_rate for r in mine] == [r.learning_rate for r in alone]
        counts = [(r.num_tokens, r.num_targets) for r in alone]
        assert [(r.num_tokens, r.num_targets) for r in mine] == counts
        assert losses(mine) == pytest.approx(losses(alone), rel=1e-5)
        norms = [record.grad_norm for record in alone]
        assert [record.grad_norm for record in mine] == pytest.approx(norms, rel=1e-5)
        # Adam divides by the root of squares near zero, which lifts the rounding of fp32.
        assert_same(adapter, alone_adapter, to=1e-4)


def test_the_same_run_twice_is_the_same_bits():
    results = []
    for _ in range(2):
        base, run = start()
        results.append((losses(take(base, run)), tensors(run.adapter)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_another_seed_is_another_run():
    first, second = (take(*start(seed=seed)) for seed in (0, 1))
    assert not set(losses(first)) & set(losses(second))


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_continued_run_is_bit_for_bit_the_whole_one(stop_after):
    base, whole = start(max_steps=7)
    expected = losses(take(base, whole))

    base, run = start(max_steps=7)
    before = losses(take(base, run, steps=stop_after))
    saved, state = snapshot(run)

    base, run = start(max_steps=7)
    restore_state(run, tensors=saved, state=state)
    assert run.step == stop_after
    after = losses(take(base, run))
    assert before + after == expected
    reference = tensors(whole.adapter)
    assert all(torch.equal(value, reference[name]) for name, value in tensors(run.adapter).items())


def test_a_state_can_be_restored_at_step_0():
    base, run = start(max_steps=3)
    saved, state = snapshot(run)
    expected = losses(take(base, run))
    restore_state(run, tensors=saved, state=state)
    assert losses(take(base, run)) == expected


def test_restoring_does_not_share_memory_with_the_snapshot():
    base, run = start(max_steps=4)
    take(base, run, steps=2)
    saved, state = snapshot(run)
    kept = {name: value.clone() for name, value in saved.items()}
    restore_state(run, tensors=saved, state=state)
    take(base, run)
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


def test_not_a_number_in_an_adapter_is_found_with_step_adapter_and_record():
    base, run = start(name="seed-0", max_steps=4)
    take(base, run, steps=2)
    first = run.order.batch(2)[0].record.row
    run.adapter.parameters["model.layers.1.mlp.up_proj.lora_B"].data[0, 0] = math.nan
    with pytest.raises(NonFiniteError) as caught:
        take(base, run)
    assert str(caught.value) == (
        f"step 3: the loss of adapter 'seed-0' is nan on record {first}; "
        "lower train.learning_rate (now 0.01) or use dtype float32"
    )


def test_a_record_that_breaks_the_loss_is_the_one_named():
    # Token 2 occurs in no other example.
    bad = Example(Record(77, "Say.", "", "Said."), (3, 2, 4, 5), 1, False)
    base, run = start(dropout=0.0, batch_size=12, examples=[*EXAMPLES, bad])
    base.model.model.embed_tokens.weight.data[2] = math.nan
    with pytest.raises(NonFiniteError, match=r"^step 1: .* on record 77;"):
        take(base, run, micro_batch_tokens=1000)


def test_an_absurd_learning_rate_is_found():
    base, run = start(learning_rate=1e30, warmup_frac=0.0, schedule="constant")
    with pytest.raises(NonFiniteError, match=r"^step 2: .*'default'.*learning_rate \(now 1e\+30\)"):
        take(base, run)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (math.inf, r"is inf \(1 tensors, first model\.layers\.2\.mlp\.down_proj\.lora_B\)"),
        (math.nan, r"is nan \(1 tensors, first model\.layers\.2\.mlp\.down_proj\.lora_B\)"),
        (3e38, r"is inf \(their sum of squares\)"),
    ],
)
def test_a_gradient_that_breaks_is_found_in_its_tensor(value, where):
    base, run = start()
    parameter = run.adapter.parameters["model.layers.2.mlp.down_proj.lora_B"]
    parameter.register_hook(lambda grad: torch.full_like(grad, value))
    with pytest.raises(NonFiniteError, match=rf"^step 1: the gradient norm of .*{where}; lower"):
        take(base, run)
    assert run.step == 0


def broken_at(step: int, run: TrainState) -> None:
    """Lets the run's first gradient tensor become NaN in that step."""
    parameter = next(iter(run.adapter.parameters.values()))

    def spoil(grad: Tensor) -> Tensor:
        return torch.full_like(grad, math.nan) if run.step == step - 1 else grad

    parameter.register_hook(spoil)


def pair(*, with_third: bool) -> tuple[FrozenBase, list[TrainState]]:
    """Two runs, and between them a third that breaks in its third step if it is there."""
    base = tiny_base()
    runs = [start(base, name=name, seed=ord(name), max_steps=6)[1] for name in "ab"]
    if with_third:
        _, third = start(base, name="broken", seed=9, max_steps=6)
        broken_at(3, third)
        runs.insert(1, third)
    return base, runs


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 30])
def test_a_run_that_breaks_is_left_out_and_the_others_go_on_as_if_without_it(micro_batch_tokens):
    base, (first, broken, second) = pair(with_third=True)
    before_break = {}
    result = []
    for records in train_bundle(
        base, [first, broken, second], micro_batch_tokens=micro_batch_tokens
    ):
        result.append(records)
        if len(result) == 2:
            before_break = tensors(broken.adapter)
    assert [records[1] is None for records in result] == [False, False, True, True, True, True]
    assert broken.failure.startswith("step 3: the gradient norm of adapter 'broken' is nan (1 ")
    assert (broken.step, broken.is_done, broken.is_active) == (2, False, False)
    after = tensors(broken.adapter)
    assert all(torch.equal(after[name], before_break[name]) for name in after)
    assert all(p.grad is None for p in broken.adapter.parameters.values())

    base, (one, two) = pair(with_third=False)
    expected = list(train_bundle(base, [one, two], micro_batch_tokens=micro_batch_tokens))
    for index, run, alone in ((0, first, one), (2, second, two)):
        mine = [records[index] for records in result]
        reference = [records[index // 2] for records in expected]
        assert losses(mine) == pytest.approx(losses(reference), rel=1e-6)
        assert [r.grad_norm for r in mine] == pytest.approx(
            [r.grad_norm for r in reference], rel=1e-5
        )
        assert [r.step for r in mine] == [1, 2, 3, 4, 5, 6]
        assert run.failure is None
        assert_same(tensors(run.adapter), tensors(alone.adapter), to=1e-5)


def test_a_step_in_which_all_runs_break_is_their_last():
    base, (first, broken, second) = pair(with_third=True)
    for run in (first, second):
        broken_at(3, run)
    result = list(train_bundle(base, [first, broken, second], micro_batch_tokens=64))
    assert len(result) == 3
    assert result[-1] == [None, None, None]
    assert all(run.failure.startswith("step 3: ") for run in (first, broken, second))
    assert list(train_bundle(base, [first, broken, second], micro_batch_tokens=64)) == []


def test_a_run_whose_loss_breaks_in_a_bundle_is_named_with_its_record():
    base, runs = pair(with_third=False)
    runs[1].adapter.parameters["model.layers.1.mlp.up_proj.lora_B"].data[0, 0] = math.nan
    (records, *_) = train_bundle(base, runs, micro_batch_tokens=64)
    record = runs[1].order.batch(0)[0].record.row
    assert records[1] is None
    assert runs[1].failure.startswith(f"step 1: the loss of adapter 'b' is nan on record {record};")


def test_a_run_that_broke_can_be_put_back_to_a_sound_step():
    base, run = start(max_steps=4)
    saved, state = snapshot(run)
    expected = losses(take(base, run))

    base, run = start(max_steps=4)
    run.adapter.parameters["model.layers.1.mlp.up_proj.lora_B"].data[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        take(base, run)
    assert run.failure is not None
    restore_state(run, tensors=saved, state=state)
    assert losses(take(base, run)) == expected


def test_in_fp16_a_run_breaks_without_disturbing_the_scale_of_another():
    """The other's first step overflows and is taken twice, but halves its scale once."""
    base, run = half_run(2.0**24)
    _, broken = start(base, name="broken", seed=9)
    broken.adapter.parameters["model.layers.1.mlp.up_proj.lora_B"].data[0, 0] = math.nan
    (records, *_) = itertools.islice(
        train_bundle(base, [run, broken], micro_batch_tokens=10_000), 1
    )
    assert broken.failure is not None
    assert records[0].grad_norm is None
    assert run.scaler.get_scale() == 2.0**23


def test_a_step_waits_for_the_device_once(monkeypatch):
    """Whatever the number of runs and of rows; one more wait ends the step's clock."""
    base, runs = pair(with_third=False)
    bundle = train_bundle(base, runs, micro_batch_tokens=20)
    next(bundle)
    waits = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        real = getattr(Tensor, name)

        def counted(tensor, *args, real=real, name=name, **kwargs):
            waits.append(name)
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    next(bundle)
    assert waits.count("tolist") == 1
    assert set(waits) == {"tolist"}


def half_run(scale: float) -> tuple[FrozenBase, TrainState]:
    base, run = start(tiny_base(dtype=torch.float16), max_steps=30, warmup_frac=0.0)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return base, run


def test_in_fp16_an_overflow_skips_the_update_and_training_goes_on():
    base, run = half_run(2.0**24)
    before = tensors(run.adapter)
    (first,) = take(base, run, steps=1)
    assert first.grad_norm is None
    assert first.step == 1
    assert math.isfinite(first.loss_nats_per_token)
    assert all(torch.equal(value, before[name]) for name, value in tensors(run.adapter).items())
    assert run.scaler.get_scale() == 2.0**23
    rest = take(base, run)
    assert rest[-1].grad_norm > 0
    assert rest[-1].loss_nats_per_token < first.loss_nats_per_token
    assert run.step == 30


def test_in_fp16_the_norm_is_that_of_the_unscaled_gradient():
    base, run = half_run(2.0**10)
    (candidate,) = take(base, run, steps=1)
    (exact,) = take(*start(max_steps=30, warmup_frac=0.0), steps=1)
    assert candidate.grad_norm == pytest.approx(exact.grad_norm, rel=0.02)
    assert candidate.loss_nats_per_token == pytest.approx(exact.loss_nats_per_token, rel=2e-3)


def test_in_fp16_an_overflow_without_any_scale_left_is_an_error():
    base, run = half_run(1.0)
    parameter = run.adapter.parameters["model.layers.2.mlp.down_proj.lora_B"]
    parameter.register_hook(lambda grad: torch.full_like(grad, math.inf))
    with pytest.raises(NonFiniteError, match="down_proj"):
        take(base, run)


def test_in_fp16_a_continued_run_keeps_its_scale():
    base, run = half_run(2.0**24)
    expected = losses(take(base, run))
    base, run = half_run(2.0**24)
    before = losses(take(base, run, steps=3))
    saved, state = snapshot(run)
    base, run = half_run(2.0**24)
    restore_state(run, tensors=saved, state=state)
    assert before + losses(take(base, run)) == expected


def test_only_fp16_scales_its_loss():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, run = start(tiny_base(dtype=dtype))
        assert run.scaler.is_enabled() == (dtype == torch.float16)
