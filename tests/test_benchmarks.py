import importlib.util
import json
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ablation
import floor
import geometry
import gpu
import gpu_plan
import gpu_study
import pieces
import plan_accuracy
import plan_published
import rounding_fit
import scaling
import standings
import study
import summation
import workload
from blocks import run_once
from bundles import Point, measure_point, point_figures
from contenders import CONTENDERS, TUNED, Contender, run_contender
from figures import bootstrap, quartiles, read_lines, table
from loracle.analysis.verdicts import judge
from loracle.engine.evaluate import score_examples
from loracle.records.study_folder import read_study
from tiny import save_tiny_model, write_records
from tiny_engine import attach, examples_of, tiny_base, tiny_plan
from tricks import TRICKS, block_mask

ROOT = Path(__file__).parents[1]
NEEDS_TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is optional")
PEERS = [
    pytest.param(name, marks=NEEDS_TRL if name.startswith("trl") else ())
    for name in CONTENDERS
    if name != "loracle"
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> workload.Source:
    folder = tmp_path_factory.mktemp("bench")
    model = save_tiny_model(folder / "model")
    records = write_records(folder / "records.json", count=150, seed=0)
    settings = {
        "model": f"path:{model}",
        "data.source": f"path:{records}",
        "data.max_tokens": 256,
        "dtype": "float32",
        "lora.dropout": 0.0,
        "train.batch_size": 4,
        "train.learning_rate": 0.01,
    }
    return workload.open_source([f"{key}={value}" for key, value in settings.items()])


@pytest.fixture(scope="module")
def work(source: workload.Source) -> workload.Workload:
    return workload.workload_of(source, workload.random_batches(source, part=0, num_steps=3))


@pytest.fixture(scope="module")
def our_rows(work: workload.Workload) -> list[dict]:
    return run_contender(CONTENDERS["loracle"], work)


def losses(rows: list[dict]) -> list[float]:
    return [row["loss_nats_per_token"] for row in rows]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.filterwarnings("ignore")
def test_without_dropout_every_contender_has_our_losses(
    name: str, work: workload.Workload, our_rows: list[dict]
):
    theirs = run_contender(CONTENDERS[name], work)
    assert losses(theirs) == pytest.approx(losses(our_rows), rel=1e-4)
    assert losses(theirs)[-1] != pytest.approx(losses(our_rows)[0], rel=1e-2), "nothing was learned"


@NEEDS_TRL
@pytest.mark.filterwarnings("ignore")
def test_padding_free_trl_computes_the_same(work: workload.Workload, our_rows: list[dict]):
    theirs = run_contender(TUNED["padding-free-half"], work)
    assert losses(theirs) == pytest.approx(losses(our_rows), rel=1e-4)


def test_rows_count_the_real_tokens_targets_and_padding(
    work: workload.Workload, our_rows: list[dict]
):
    for row, batch in zip(our_rows, work.batches, strict=True):
        assert row["num_tokens"] == sum(len(example.input_ids) for example in batch)
        assert row["num_targets"] == sum(
            len(example.input_ids) - example.num_prompt for example in batch
        )
        rows = [workload.labelled(example) for example in batch]
        labels = workload.padded(rows, pad=0)["labels"]
        assert row["num_targets"] == int((labels != -100).sum())
        assert row["num_padded"] == labels.numel()
    assert [row["warm_up"] for row in our_rows] == [True, False, False, False]


def test_labels_of_a_row_are_the_targets_alone(source: workload.Source):
    example = source.data.train[0]
    row = workload.labelled(example)
    kept = [label for label in row["labels"] if label != -100]
    assert kept == list(example.input_ids[example.num_prompt :])
    assert row["input_ids"] == list(example.input_ids)


def test_parts_of_the_random_order_do_not_overlap(source: workload.Source):
    parts = [workload.random_batches(source, part=part, num_steps=2) for part in (0, 1)]
    order = source.order()
    assert [batch for part in parts for batch in part] == [order.batch(step) for step in range(6)]


def test_grouped_batches_pad_less_and_cover_short_and_long(source: workload.Source):
    parts = [
        workload.grouped_batches(source, part=part, num_parts=3, num_steps=3)[1:]
        for part in range(3)
    ]
    counts = [[workload.counts_of(batch) for batch in part] for part in parts]
    padding = [c["num_padded"] / c["num_tokens"] for part in counts for c in part]
    plain = workload.random_batches(source, part=0, num_steps=8)
    plain_padding = [
        c["num_padded"] / c["num_tokens"] for c in (workload.counts_of(batch) for batch in plain)
    ]
    assert sum(padding) / 9 < sum(plain_padding) / 9
    for part in counts:
        assert part[0]["num_tokens"] > 1.1 * part[-1]["num_tokens"]
    seen = [example.record.row for part in parts for batch in part for example in batch]
    assert len(seen) == len(set(seen))


def test_the_floor_counts_two_products_per_weight_and_six_per_adapter(work: workload.Workload):
    base = workload.load_frozen(work)
    plan = workload.plan_of(base.model, work.config)
    products = floor.base_products(plan, tokens=10)
    weights = sum(module.in_features * module.out_features for module in plan.modules)
    assert floor.flops_of(products) == 2 * 2 * 10 * weights
    lora = floor.lora_products(plan, tokens=10)
    assert floor.flops_of(lora) == 3 * 2 * 10 * plan.trainable_params
    head = floor.head_products(384, 32, targets=600)
    assert floor.flops_of(head) == 2 * 2 * 600 * 384 * 32
    assert {rows for rows, *_ in head} == {256, 88}


def test_the_floor_of_a_batch_is_measured_at_its_own_shapes(work: workload.Workload):
    short = replace(work, batches=work.batches[:1])
    (row,) = floor.floor_rows(short)
    assert row["base_s"] > 0
    assert row["lora_s"] > 0
    assert row["num_tokens"] == workload.counts_of(work.batches[0])["num_tokens"]


def test_a_product_is_what_torch_multiplies():
    seconds = floor.product_s((8, 16, 4), device=torch.device("cpu"), dtype=torch.float32)
    assert 0 < seconds < 1


def test_a_resampled_interval_holds_the_median_and_narrows_with_agreement():
    wide = bootstrap([1.0, 2.0, 3.0, 4.0, 5.0], lambda items: sum(items) / len(items))
    same = bootstrap([2.0] * 5, lambda items: sum(items) / len(items))
    assert wide[0] < 3.0 < wide[1]
    assert same == [2.0, 2.0]


def test_quartiles_of_one_value_are_that_value():
    assert quartiles([3.0]) == {"median": 3.0, "p25": 3.0, "p75": 3.0}
    assert quartiles([1.0, 2.0, 3.0])["median"] == 2.0


def test_an_unfinished_line_is_not_read(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"a": 1}\n{"a": ')
    assert read_lines(log) == [{"a": 1}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_tables_are_markdown():
    assert table(("a", "b"), [("x", "1")]) == "| a | b |\n|---|---:|\n| x | 1 |"


def block(contender: str, *, round_: int, times: list[float]) -> dict:
    rows = [
        {
            "step": step,
            "warm_up": step == 0,
            "loss_nats_per_token": 2.0 - step / 10,
            "step_time_s": time,
            "num_tokens": 100 * (step + 1),
            "num_targets": 50,
            "num_padded": 300,
            "base_s": time,
            "lora_s": time / 2,
            "base_gflop": 1.0,
        }
        for step, time in enumerate(times)
    ]
    settings = {
        "model": "tiny",
        "lora": {"placement": "all-linear", "rank": 16, "dropout": 0.1},
        "train": {"batch_size": 8},
    }
    versions = {"torch": "1", "transformers": "2", "peft": "3", "trl": None}
    environment = {
        "device": {"name": "CPU"},
        "torch_settings": {"num_threads": 2},
        "versions": versions,
    }
    return {
        "spec": {"contender": contender, "round": round_},
        "ended_at": f"2026-01-0{round_ + 1}T00:00:00+00:00",
        "error": None,
        "rows": rows,
        "peak_gib": 1.0 + round_,
        "import_and_data_s": 5.0,
        "load_and_build_s": 2.0,
        "settings": settings,
        "environment": environment,
    }


@pytest.fixture
def report() -> dict:
    blocks = [
        block(name, round_=round_, times=[9.0, *(factor * time for time in (1.0, 2.0))])
        for round_ in (0, 1)
        for name, factor in {
            "loracle": 1.0,
            "trainer": 4.0,
            "trl-tuned": 2.0,
            "tune:grouped": 2.0,
            "floor": 0.5,
        }.items()
    ]
    return standings.summarise(blocks, tuned="grouped")


def test_ratios_are_to_our_own_steps_and_leave_the_warm_up_out(report: dict):
    trainer = report["contenders"]["trainer"]
    assert trainer["times_ours"] == 4.0
    assert trainer["step_time_s"]["median"] == 6.0
    assert trainer["num_steps"] == 4
    assert trainer["peak_gib"] == 2.0
    assert report["contenders"]["trl-tuned"]["times_ours"] == 2.0
    assert report["contenders"]["trl-tuned"]["compared_by"] == "seconds per real token"
    assert report["tuning"]["tried"]["grouped"]["ms_per_token"] == pytest.approx(12.0)
    assert report["tuning"]["tried"]["grouped-half"]["error"] == "not run"


def test_the_floors_share_is_of_our_step_on_the_same_batch(report: dict):
    assert report["floor"]["share_of_our_step"]["median"] == 0.5
    assert report["floor"]["share_with_lora"]["median"] == 0.75


def test_the_table_names_every_contender_and_what_it_is_compared_by(report: dict):
    text = standings.markdown(report)
    assert "| LoRAcle | 1.50 | 1 | 2.00 |" in text
    assert "| Trainer + PEFT, bf16 | 6.00 | 4.0 [" in text
    assert "base in fp32 under autocast † |" in text
    assert "0.50 of our step" in text


def test_losses_stand_beside_each_other(report: dict):
    lines = report["loss_table"].splitlines()
    assert lines[0].split() == ["round", "step", "loracle", "trainer", "trl-tuned"]
    assert lines[1].split() == ["1", "1", "1.9000", "1.9000", "1.9000"]
    assert len(lines) == 5


@pytest.mark.parametrize(("name", "bench"), [("peers", standings), ("study", study)])
def test_the_readmes_tables_are_those_of_the_committed_results(name: str, bench):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pattern = rf"<!-- benchmarks/{name}\.py: (\S+/{name}-\S+) -->\n(.*?)\n<!-- end -->"
    found = re.search(pattern, text, re.DOTALL)
    assert found is not None
    report = json.loads((ROOT / found[1]).read_text(encoding="utf-8"))
    assert found[2] == bench.markdown(report)


def settings_of(source: workload.Source) -> list[str]:
    return [
        f"model=path:{source.folder}",
        f"data.source={source.config.data.source}",
        "data.max_tokens=256",
        "dtype=float32",
        "lora.dropout=0.0",
        "train.batch_size=4",
    ]


def test_without_dropout_no_trick_changes_the_loss_or_the_gradient(source: workload.Source):
    spec = {"allocator": False, "tricks": [], "steps": 1, "overrides": settings_of(source)}
    block_ = ablation.measure(spec)
    for step in (0, 1):
        rows = [row for row in block_["rows"] if row["step"] == step]
        assert [row["variant"] for row in rows] == ["whole engine", *TRICKS]
        for row in rows[1:]:
            for key in ("loss_nats_per_token", "grad_norm"):
                assert row[key] == pytest.approx(rows[0][key], rel=1e-5), row["variant"]


def test_an_ablation_compares_each_variant_with_the_whole_on_the_same_batch():
    variants = {"whole engine": 2.0, "head in chunks": 3.0}
    rows = [
        {
            "variant": name,
            "step": step,
            "warm_up": step == 0,
            "step_time_s": time * (step + 1),
            "loss_nats_per_token": 1.0,
        }
        for step in range(3)
        for name, time in variants.items()
    ]
    block_ = {"rows": rows, "environment": {}, "spec": {}}
    told = [
        {"rows": rows[::2], "spec": {"allocator": allocator, "round": 0}}
        for allocator in (True, False)
    ]
    report = ablation.report_of([block_], told)
    assert report["figures"]["head in chunks"]["times_whole"] == 1.5
    assert report["figures"]["large blocks kept by malloc"]["times_whole"] == 1.0
    text = ablation.markdown(report)
    assert "| head in chunks → all logits at once | 7.50 | 1.50 [1.50 to 1.50] |" in text


def test_a_masked_row_sees_its_own_sequence_and_what_came_before():
    mask = block_mask((2, 1), device=torch.device("cpu"))
    assert mask.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_lengths_are_spread_like_alpacas():
    lengths = geometry.alpaca_like_lengths(4000, seed=1)
    assert sum(lengths) / len(lengths) == pytest.approx(207, rel=0.05)
    assert sorted(lengths)[2000] == pytest.approx(166, rel=0.05)


@pytest.mark.parametrize("name", geometry.GEOMETRIES)
def test_a_geometry_has_the_published_parameter_count(name: str):
    published = {"smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120,
                 "llama-2-7b": 6_738_415_616}  # fmt: skip
    model = geometry.random_model(name, device=torch.device("meta"), dtype=torch.float32)
    assert model.num_parameters() == published.get(name, model.num_parameters())


def test_random_work_is_done_by_ours_and_by_a_peft_loop_alike():
    work = workload.random_work(
        "tiny", num_steps=2, batch_size=2, device="cpu", dtype="float32", length=24
    )
    no_dropout = work.config.lora.model_copy(update={"dropout": 0.0})
    work = replace(work, config=work.config.model_copy(update={"lora": no_dropout}))
    ours, theirs = (
        losses(run_contender(CONTENDERS[name], work)) for name in ("loracle", "peft-loop")
    )
    assert theirs == pytest.approx(ours, rel=1e-4)


def test_a_point_counts_the_tokens_of_all_its_runs():
    one, two = (
        measure_point(Point("tiny", runs=runs, batch=2, device="cpu", dtype="float32"))
        for runs in (1, 2)
    )
    tokens = [[row["num_tokens"] for row in each["rows"]] for each in (one, two)]
    assert tokens[1] == [2 * count for count in tokens[0]]
    assert two["rows"][0]["gflop"] == pytest.approx(2 * one["rows"][0]["gflop"], rel=0.01)
    assert [len(row["loss_nats_per_token"]) for row in two["rows"]] == [2, 2, 2]
    assert point_figures(two)["tokens_per_s"] > 0


def test_the_second_epoch_of_a_trunk_computes_nothing_again():
    point = Point(
        "tiny", batch=2, epochs=2, placement="last-third", trunk=True, device="cpu", dtype="float32"
    )
    block_ = measure_point(point)
    assert block_["trunk"] == {"hits": 4, "computed": 4}
    assert [row["warm_up"] for row in block_["rows"]] == [True, True, False, False]


def point_block(spec: dict, *, seconds: float, tokens: int) -> dict:
    rows = [
        {"step": s, "warm_up": s == 0, "step_time_s": seconds, "num_tokens": tokens, "gflop": 100.0}
        for s in range(3)
    ]
    return {"spec": spec, "error": None, "rows": rows, "peak_gib": 1.0, "environment": {}}


def test_each_series_of_scaling_changes_one_thing():
    for name, points in scaling.series_of("smollm2-135m", steps=2).items():
        assert len(points) == len(set(points)) >= 2, name
    blocks = {
        "runs in a bundle": [
            point_block(
                {"point": asdict(Point("smollm2-135m", runs=runs))}, seconds=1.0 * runs, tokens=100
            )
            for runs in (1, 2)
        ]
    }
    text = scaling.markdown(scaling.report_of(blocks))
    assert "| defaults | 1.00 | 100 | 1.00 |" in text
    assert "| runs 2 | 2.00 | 50 | 1.00 |" in text


def test_a_gpu_report_compares_a_bundle_with_its_runs_in_turn():
    specs = gpu.specs_of(small="tiny", large="half-smollm2", steps=2)
    assert {"tiny, bundle of 16", "half-smollm2, batch 8", "tiny, batch 8, peft-loop"} <= set(specs)
    named = {name: {"name": name, **spec} for name, spec in specs.items()}
    rate = {"spec": named["matrix rate"], "error": None, "rows": [], "peak_gib": None,
            "gflop_per_s": 400.0, "environment": {}}  # fmt: skip
    one = point_block(named["tiny, bundle of 1"], seconds=1.0, tokens=100)
    eight = point_block(named["tiny, bundle of 8"], seconds=2.0, tokens=800)
    broken = {"spec": named["tiny, bundle of 16"], "error": "exit status 1", "rows": []}
    report = gpu.report_of([rate, one, eight, broken])
    assert report["figures"]["tiny, bundle of 8"]["times_the_same_runs_in_turn"] == 4.0
    assert report["figures"]["tiny, bundle of 1"]["share_of_matrix_rate"] == 0.25
    assert report["failed"] == {"tiny, bundle of 16": "exit status 1"}
    assert "| tiny, bundle of 8 | 2.000 | 400 | 0.12 | 4.0 | 1.00 |" in gpu.markdown(report)


def test_an_archive_that_travelled_in_parts_is_put_together(tmp_path):
    (tmp_path / "model.whl.part0").write_bytes(b"one ")
    (tmp_path / "model.whl.part1").write_bytes(b"two")
    (tmp_path / "data.tar.gz").write_bytes(b"whole")
    assert gpu_study.join_parts(tmp_path) == [tmp_path / "model.whl"]
    assert (tmp_path / "model.whl").read_bytes() == b"one two"


def test_a_study_on_a_machine_apart_leaves_records_that_can_be_judged(place, tmp_path):
    file = tmp_path / "apart.yaml"
    file.write_text(
        f"question: Does it run?\nbase: {place.config}\nreference: attention\n"
        "config: {train: {max_steps: 2}, eval: {generate_examples: 0}}\n"
        "budget: equal-rank\nseeds: [0, 1]\narms: {attention: , feed-forward: }\n"
    )
    with place.entered():
        code = gpu_study.run(
            str(file), overrides=["train.batch_size=2"], runs=tmp_path / "runs", out=tmp_path
        )
    assert code == 0
    kept, ran = read_study(tmp_path / "apart"), read_study(tmp_path / "runs" / "apart")
    here, there = judge(kept), judge(ran)
    assert (here.comparisons, here.pairs) == (there.comparisons, there.pairs)
    assert not list((tmp_path / "apart").rglob("*.safetensors"))
    assert "batch_size: 2" in (tmp_path / "apart" / "study.yaml").read_text()


def test_a_gpu_benchmarks_own_blocks_run_on_a_cpu_too():
    peer = {"kind": "peer", "contender": "peft-loop", "geometry": "tiny", "batch": 2, "steps": 1}
    assert len(gpu.measure(peer)["rows"]) == 2
    assert len(gpu.measure(peer | {"packing": "nf4"})["rows"]) == 2
    assert gpu.measure({"kind": "rate"})["gflop_per_s"] > 0


def test_a_cpu_agrees_with_itself_to_the_bit():
    found = gpu.measure({"kind": "correct", "geometry": "tiny"})
    assert found["error"] is None
    assert found["checks"]["mask_elements_that_differ"] == 0
    assert found["checks"]["loss_relative"] == found["checks"]["gradient_relative"] == 0.0


def test_nothing_is_timed_on_a_device_that_computes_something_else(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_LOG", tmp_path / "log.jsonl")
    monkeypatch.setattr("blocks.run_once", lambda spec, **_: asked.append(spec["name"]))
    monkeypatch.setattr("blocks.logged", lambda *_: [{"error": "masks differ"}])
    asked: list[str] = []
    specs = gpu.specs_of(small="tiny", large="half-smollm2", steps=2)
    with pytest.raises(SystemExit, match="masks differ; nothing was timed"):
        gpu.run(specs, out=tmp_path)
    assert asked == [gpu.CORRECT]


def test_a_block_is_run_once_and_its_failure_is_a_result(tmp_path: Path):
    script, log = tmp_path / "worker.py", tmp_path / "log.jsonl"
    script.write_text(
        "import json, sys\n"
        "spec = json.loads(sys.argv[2])\n"
        "print('noise')\n"
        "__import__('time').sleep(spec.get('sleeps', 0))\n"
        "sys.exit(3) if spec['fails'] else print(json.dumps({'error': None, 'rows': [1]}))\n"
    )
    for fails in (False, True, False):
        run_once({"fails": fails}, script=str(script), log=log)
    run_once({"fails": False, "sleeps": 9}, script=str(script), log=log, limit_s=0.2)
    rows = read_lines(log)
    assert [(row["error"], row["rows"]) for row in rows] == [
        (None, [1]), ("exit status 3", []), ("not done in 0 s", []),
    ]  # fmt: skip


def test_sources_that_change_between_blocks_stop_the_benchmark(tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text('print(\'{"sources": "new", "rows": []}\')\n')
    with pytest.raises(SystemExit, match="sources changed"):
        run_once({"sources": "old"}, script=str(script), log=tmp_path / "log.jsonl")


QUICK = [
    "train.max_steps=2",
    "eval.every_steps=1",
    "eval.max_examples=8",
    "eval.generate_examples=2",
    "eval.max_new_tokens=3",
    "audit.reload_examples=1",
]


@pytest.mark.filterwarnings("ignore")
def test_our_study_is_run_for_real_and_every_part_of_it_is_counted(
    source: workload.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "ARMS", ("all-linear", "last-third"))
    monkeypatch.setattr(study, "_SEEDS", (0,))
    earlier = tmp_path / "runs/bench/study/abc/clock/1.txt"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("1000.0\n")
    block_ = study.run_ours({"sources": "abc", "overrides": settings_of(source) + QUICK})
    assert block_["error"] is None
    assert set(block_["results"]) == {"all-linear-0", "last-third-0"}
    assert all(result["status"] == "completed" for result in block_["results"].values())
    assert block_["seconds"] > 1000.0


@NEEDS_TRL
@pytest.mark.filterwarnings("ignore")
def test_an_arm_of_trl_is_sampled_and_its_whole_counted(source: workload.Source):
    spec = {"arm": "attention", "contender": "trl-bf16", "overrides": settings_of(source) + QUICK}
    block_ = study.sample_trl(spec)
    assert len(block_["rows"]) == 3
    order = workload.open_source(spec["overrides"]).order()
    assert block_["train_positions"] == sum(
        workload.counts_of(order.batch(step))["num_padded"] for step in range(2)
    )
    assert block_["evaluation"]["positions"] <= block_["evaluation"]["all_positions"]
    assert (block_["answers"]["count"], block_["answers"]["all"]) == (2, 2)
    assert study.extrapolated(block_)["run_s"] > 0


def trl_block(arm: str) -> dict:
    return {
        "spec": {"arm": arm, "contender": "trl-bf16"},
        "error": None,
        "rows": [
            {"warm_up": True, "step_time_s": 99.0, "num_padded": 1},
            {"warm_up": False, "step_time_s": 2.0, "num_padded": 100},
        ],
        "start_s": 10.0,
        "train_positions": 500,
        "evaluation": {"seconds": 1.0, "positions": 50, "all_positions": 200},
        "answers": {"seconds": 3.0, "count": 4, "all": 8},
    }


def test_a_trl_run_is_its_measured_parts_scaled_by_counts():
    one = study.extrapolated(trl_block("all-linear"))
    assert one == {
        "start_s": 10.0, "steps_s": 10.0, "one_validation_s": 4.0, "answers_s": 6.0, "run_s": 34.0
    }  # fmt: skip
    ours = {"seconds": 41.8, "error": None, "environment": {}}
    report = study.report_of(ours, [trl_block(arm) for arm in study.ARMS])
    assert report["trl"]["seconds"] == 2 * 6 * 34.0 + 10.0
    assert report["times_ours"] == pytest.approx(10.0)
    assert "extrapolated" in study.markdown(report)
    broken = study.report_of(ours, [trl_block(arm) for arm in study.ARMS[:5]])
    assert broken["times_ours"] is None


def test_a_contender_is_a_label_and_a_loop():
    named = CONTENDERS | TUNED
    assert all(isinstance(each, Contender) and each.label for each in named.values())


def test_every_piece_is_timed_beside_what_it_replaces():
    report = pieces.measure("tiny", tokens=90, repeats=2)
    assert sum(report["lengths"]) == 90
    found = report["pieces"]
    assert {"attention", "RMSNorm", "head and its loss"} <= found.keys()
    for name, each in found.items():
        assert each["ms"]["median"] > 0, name
        assert each["ms_per_pass"] == pytest.approx(each["calls_per_pass"] * each["ms"]["median"])
        assert (each["times"] is None) == (each["instead_ms"] is None), name
    # Three layers: two norms each and the last one.
    assert found["RMSNorm"]["calls_per_pass"] == 7
    assert pieces.markdown(report).count("\n") == len(found) + 1


@pytest.mark.parametrize("tokens", [8, 90, 1280])
def test_lengths_add_up_and_none_is_empty(tokens: int):
    lengths = pieces.lengths_of(tokens)
    assert sum(lengths) == tokens
    assert min(lengths) >= 1


def test_predictions_are_measured_against_on_a_cpu_too(monkeypatch):
    from loracle.forecast import calibration

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    monkeypatch.setitem(calibration._SIZES, "cpu", size)
    monkeypatch.setattr(calibration, "_ADDED", 1 << 16)
    monkeypatch.setattr(gpu_plan, "BATCHES", {"2 x 12 tokens": [(5, 7)] * 2})
    ways = ["16 bits", "nf4, checkpointing", "16 bits, 4 runs"]
    found = gpu_plan.measure("tiny", steps=4, ways=ways, placements=["last-third"])
    assert len(found["rows"]) == 3
    for row in found["rows"]:
        assert row["predicted_gib"] > 0
        assert row["predicted_step_s"] > 0
        assert row["measured_step_s"] > 0
        assert row["latency_ms_per_token"] > 0
        assert row["measured_gib"] is None
    assert "step_s: median error" in gpu_plan.summary(found)


def test_counted_bytes_of_real_steps_are_those_predicted(monkeypatch):
    """As ``plan_accuracy.py --counted``, at two layers of the small model and a small head."""
    monkeypatch.setattr(plan_accuracy, "PLACEMENTS", ("all-linear", "last-1"))
    monkeypatch.setattr(plan_accuracy, "SHAPES", {"2 x 40 tokens": [(10, 30)] * 2})
    small = plan_accuracy.catalog().models["smollm2-135m"]
    cut = {"num_hidden_layers": 2, "vocab_size": 512}
    shallow = SimpleNamespace(architecture=small.architecture | cut)
    monkeypatch.setattr(
        plan_accuracy, "catalog", lambda: SimpleNamespace(models={"smollm2-135m": shallow})
    )
    rows = list(plan_accuracy.counted("smollm2-135m"))
    assert len(rows) == 4
    assert all(abs(row["error_frac"]) < 0.02 for row in rows)


def test_published_shapes_are_ones_that_can_be_planned():
    from loracle.sources import catalog

    assert {row.model for row in plan_published.ROWS} <= set(catalog().models)
    (row,) = [row for row in plan_published.ROWS if row.published_gb == 13.68]
    assert 4 < plan_published.ours_gb(row) < row.published_gb


@pytest.mark.parametrize("name", [name for name, order in summation.ORDERS.items() if order])
def test_another_order_gives_the_same_product_up_to_rounding(name):
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 5, 48, generator=draw), torch.randn(7, 48, generator=draw)
    exact = torch.nn.functional.linear(x.double(), weight.double())
    with summation.summing(summation.ORDERS[name]):
        found = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16())
        fine = torch.nn.functional.linear(x, weight)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 0.2
    assert (fine - exact).abs().max() < (0.2 if "narrow" in name else 1e-5)


@pytest.mark.parametrize("fault", ["lost", "scale-1.5", "module-3", "layer-1", "swap-0"])
def test_a_fault_moves_the_losses_and_leaves_the_adapter_as_it_was(fault):
    base, examples = tiny_base(), examples_of(4)
    attach(base, tiny_plan())
    scores = partial(score_examples, base, examples, adapter="default", batch_tokens=1000)
    before = scores()
    with summation.faulty(base, fault):
        assert scores() != before
    assert scores() == before


def test_the_fit_finds_the_spread_it_was_given_and_the_faults_that_pass_it(monkeypatch):
    monkeypatch.setattr(rounding_fit, "RUNS", 2000)
    draw, tokens = np.random.default_rng(0), np.array([100] * 32)

    def row(dtype, order, fault, sums):
        spec = {"model": "m", "length": None, "dtype": dtype, "order": order, "fault": fault}
        return {"spec": spec, "nll_sum_nats": list(sums), "tokens": list(tokens)}

    rows = [
        row(dtype, order, "none", 200 + 10 * draw.normal(0, 0.01, 32))
        for dtype in ("float32", "bfloat16")
        for order in ("machine", "whole", "stock")
    ]
    sound = np.array(rows[0]["nll_sum_nats"])
    rows += [row("float32", "machine", f"by-{shift}", sound + shift) for shift in (0.01, 50.0)]
    found = rounding_fit.fitted(rows)
    spread = found["spreads"]["m bfloat16"]["std_nats_per_root_token"]
    assert spread == pytest.approx(0.01 * 2**0.5, rel=0.3)
    alarms = {row["dtype"]: row["alarms"] for row in found["false_alarms"]}
    assert alarms["bfloat16"] == 0
    assert alarms["float32"] > 1000  # fp32 does not explain what bf16 does
    small, large = (row["bfloat16"] for row in found["faults"])
    assert small["seen_with_32"] == 0
    assert (large["seen_with_32"], large["examples_for_99_percent"]) == (1, 1)
    assert rounding_fit.lines_of(found)
