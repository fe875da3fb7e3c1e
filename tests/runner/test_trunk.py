"""States below the lowest adapter are those of the whole pass, kept or fresh, to the last bit."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from loracle.config.run import PlacementConfig
from loracle.data import Example
from loracle.data.packing import pack
from loracle.engine.train import train_bundle
from loracle.engine.train_state import TrainState
from loracle.model.base import FrozenBase
from loracle.model.blocks import Trunk
from loracle.model.layers.lora import Route
from loracle.model.trunk import TrunkStore, lowest_layer
from loracle.placement import ModulePlan
from tiny_engine import FAMILIES, attach, examples_of, tiny_base, tiny_plan, tiny_run

DTYPES = [torch.float32, torch.bfloat16]
EXAMPLES = examples_of(9)
PLENTY = 10**9


def store_of(
    base: FrozenBase,
    *,
    folder: Path | None = None,
    memory_bytes: int = PLENTY,
    key: str = "one",
) -> TrunkStore:
    return TrunkStore(
        base, folder=folder, key=lambda layer: f"{key}-{layer}", memory_bytes=memory_bytes
    )


def top_plan(family: str = "llama") -> ModulePlan:
    """Every linear layer of the last of three blocks."""
    plan = tiny_plan(family=family)
    return replace(plan, modules=tuple(module for module in plan.modules if module.layer == 2))


def plan_of(modules: list[str], *, layers: list[int] | None = None) -> ModulePlan:
    return tiny_plan(PlacementConfig(modules=modules, layers=layers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_that_begins_at_a_layer_is_the_whole_pass_to_the_last_bit(family, dtype):
    base = tiny_base(family, dtype=dtype)
    assert base.has_trunk
    attach(base, top_plan(family))
    store = store_of(base)
    for example, layer in itertools.product(EXAMPLES[:3], (1, 2)):
        row, routes = pack([example]), (Route("default"),)
        whole = base.token_nll(row, routes=routes)
        began_above = base.token_nll(row, routes=routes, trunk=store.states([example], layer=layer))
        assert torch.equal(began_above, whole)
    assert not torch.equal(base.token_nll(row, routes=()), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pass_may_begin_above_all_layers(dtype):
    base = tiny_base(dtype=dtype)
    attach(base, tiny_plan("lm-head"))
    for example in EXAMPLES[:3]:
        row, routes = pack([example]), (Route("default"),)
        above = store_of(base).states([example], layer=3)
        assert torch.equal(
            base.token_nll(row, routes=routes, trunk=above), base.token_nll(row, routes=routes)
        )


def test_the_gradient_of_a_pass_that_begins_at_a_layer_is_that_of_the_whole_pass():
    base = tiny_base()
    adapter = attach(base, top_plan())
    grads = []
    for trunk in (None, store_of(base).states(EXAMPLES[:1], layer=2)):
        nll = base.token_nll(pack(EXAMPLES[:1]), routes=(Route("default"),), trunk=trunk)
        grads.append(torch.autograd.grad(nll.sum(), list(adapter.parameters.values())))
    assert all(itertools.starmap(torch.equal, zip(*grads, strict=True)))
    assert all(grad.any() for grad in grads[0])


def test_nothing_below_the_entry_is_computed_or_kept_for_the_backward_pass():
    base = tiny_base()
    attach(base, top_plan())
    called, saved = [], []
    for layer, block in enumerate(base.blocks):
        block.mlp.register_forward_hook(lambda *_, layer=layer: called.append(layer))
    states = store_of(base).states(EXAMPLES[:2], layer=2)
    assert called == [0, 1, 0, 1]
    called.clear()

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    row = pack(EXAMPLES[:2])
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        base.token_nll(row, routes=(Route("default"),), trunk=states).sum().backward()
    assert called == [2]
    below = {weight.data_ptr() for block in base.blocks[:2] for weight in block.parameters()}
    above = {weight.data_ptr() for weight in base.blocks[2].parameters()}
    assert set(saved) & above
    assert not set(saved) & below


def test_the_model_is_itself_again_after_a_pass_that_fails():
    base = tiny_base()
    row = pack(EXAMPLES[:1])
    before = base.token_nll(row, routes=())
    wrong = Trunk(2, torch.zeros(row.num_tokens, 7))
    with pytest.raises(RuntimeError):
        base.token_nll(row, routes=(), trunk=wrong)
    assert torch.equal(base.token_nll(row, routes=()), before)


class _Leaves(LlamaDecoderLayer):
    """A block that leaves something for a higher one beside its hidden states."""

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        self.config.left["states"] = hidden_states
        return super().forward(hidden_states, **kwargs)


class _Takes(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        return super().forward(hidden_states + self.config.left.pop("states"), **kwargs)


class _TakesIfThere(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        left = self.config.left.get("states", 0)
        return super().forward(hidden_states + left, **kwargs)


class _ReturnsMore(LlamaDecoderLayer):
    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        return super().forward(*args, **kwargs), None


class _TakesFirst(LlamaDecoderLayer):
    def forward(self, hidden_states: tuple[Tensor, None], **kwargs: object) -> Tensor:
        return super().forward(hidden_states[0], **kwargs)


@pytest.mark.parametrize(
    "classes", [(_Leaves, _Takes), (_Leaves, _TakesIfThere), (_ReturnsMore, _TakesFirst)]
)
def test_a_model_whose_blocks_hand_on_more_than_hidden_states_has_no_trunk(classes):
    base = tiny_base()
    left: dict[str, Tensor] = {}
    for block, kind in zip(base.blocks[::2], classes, strict=True):
        block.__class__ = kind
        block.config = type("Config", (), {"left": left})
    if classes[0] is _ReturnsMore:
        base.blocks[1].__class__ = _TakesFirst
        base.blocks[2].__class__ = LlamaDecoderLayer
    assert base.token_nll(pack(EXAMPLES), routes=()).isfinite().all()
    assert not base.has_trunk


def test_such_a_model_trains_from_its_tokens():
    base = tiny_base()
    base.blocks[1].__class__, base.blocks[2].__class__ = _ReturnsMore, _TakesFirst
    store = store_of(base)
    run = run_on(base)
    assert len(losses_of(base, run, store, steps=2)) == 2
    assert (store.hits, store.computed) == (0, 0)


@pytest.mark.parametrize(
    ("modules", "layers", "lowest"),
    [
        (["v_proj", "down_proj"], None, 0),
        (["v_proj", "down_proj"], [2], 2),
        (["v_proj"], [1, 2], 1),
        (["lm_head"], None, 3),
        (["lm_head", "v_proj"], None, 0),
    ],
)
def test_the_lowest_layer_of_a_plan(modules, layers, lowest):
    plan = plan_of(modules, layers=layers)
    base = tiny_base()
    assert lowest_layer(plan, base=base) == lowest
    attach(base, plan)
    assert lowest_layer(plan, base=base) == lowest


def test_the_base_alone_has_no_lowest_layer_among_its_own():
    assert lowest_layer(None, base=tiny_base("gpt2")) == 3


def test_a_module_between_embedding_and_layers_leaves_no_trunk():
    base = tiny_base()
    base.model.model.project_in = nn.Linear(32, 32)
    plan = top_plan()
    outside = replace(plan.modules[0], name="model.project_in", layer=None)
    mixed = replace(plan, modules=(*plan.modules, outside))
    assert lowest_layer(plan, base=base) == 2
    assert lowest_layer(mixed, base=base) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_do_not_depend_on_what_shares_the_row_nor_on_adapters(family, dtype):
    base = tiny_base(family, dtype=dtype)
    together = store_of(base).states(EXAMPLES, layer=2)
    alone = [store_of(base).states([example], layer=2).states for example in EXAMPLES]
    assert torch.equal(together.states, torch.cat(alone))
    attach(base, tiny_plan(family=family))
    assert torch.equal(store_of(base).states(EXAMPLES, layer=2).states, together.states)


def run_on(base: FrozenBase, *, plan: ModulePlan | None = None, **changes: object) -> TrainState:
    adapter = attach(base, plan or top_plan(), spread_b=None)
    return tiny_run(base, adapter, EXAMPLES, dropout=0.1, **changes)


def losses_of(
    base: FrozenBase, run: TrainState, store: TrunkStore | None, *, steps: int | None = None
) -> list[float]:
    bundle = train_bundle(base, [run], micro_batch_tokens=40, trunk=store)
    return [record.loss_nats_per_token for (record,) in itertools.islice(bundle, steps)]


def trained(dtype: torch.dtype, *, memory_bytes: int | None, folder: Path | None = None):
    """Losses, adapter and store of a run of 20 steps over 9 examples."""
    base = tiny_base(dtype=dtype)
    run = run_on(base, max_steps=20)
    store = None
    if memory_bytes is not None:
        store = store_of(base, memory_bytes=memory_bytes, folder=folder)
    losses = losses_of(base, run, store)
    return losses, {n: p.detach() for n, p in run.adapter.parameters.items()}, store


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_on_kept_states_is_a_run_on_fresh_ones_to_the_last_bit(dtype, tmp_path):
    fresh, fresh_adapter, fresh_store = trained(dtype, memory_bytes=0)
    # One row holds the same example twice, from the end of an epoch and the start of the next.
    assert (fresh_store.hits, fresh_store.computed) == (1, 79)
    for memory_bytes, folder in ((PLENTY, None), (3000, tmp_path / "a"), (0, tmp_path / "b")):
        kept, kept_adapter, store = trained(dtype, memory_bytes=memory_bytes, folder=folder)
        assert (store.hits, store.computed) == (71, 9)
        assert kept == fresh
        assert all(torch.equal(kept_adapter[name], fresh_adapter[name]) for name in fresh_adapter)
    assert fresh[-1] < fresh[0]


def test_a_run_on_a_trunk_is_the_run_without_up_to_rounding():
    with_trunk, adapter, _ = trained(torch.float32, memory_bytes=PLENTY)
    without, other, _ = trained(torch.float32, memory_bytes=None)
    assert with_trunk == pytest.approx(without, rel=1e-5)
    for name, wanted in other.items():
        assert (adapter[name] - wanted).norm() <= 1e-4 * wanted.norm()


def test_a_bundle_begins_at_the_lowest_layer_of_the_runs_that_are_left():
    base = tiny_base()
    low = attach(base, plan_of(["v_proj"], layers=[1]), name="low")
    high = attach(base, top_plan(), name="high")
    runs = [
        tiny_run(base, low, EXAMPLES, max_steps=2),
        tiny_run(base, high, EXAMPLES, max_steps=4),
    ]
    entered = []

    class Watched(TrunkStore):
        def states(self, examples, *, layer):
            entered.append(layer)
            return super().states(examples, layer=layer)

    store = Watched(base, memory_bytes=PLENTY)
    assert len(list(train_bundle(base, runs, micro_batch_tokens=10_000, trunk=store))) == 4
    assert entered == [1, 1, 2, 2]


def test_a_run_with_an_adapter_in_the_first_layer_asks_for_no_states():
    base = tiny_base()
    store = store_of(base)
    losses_of(base, run_on(base, plan=tiny_plan()), store, steps=2)
    assert (store.hits, store.computed) == (0, 0)


def test_memory_holds_the_states_that_came_first_and_no_more():
    base = tiny_base()
    first, second = EXAMPLES[:2]
    store = store_of(base, memory_bytes=first.num_tokens * 32 * 4)
    for _ in range(3):
        store.states([first, second, first], layer=1)
    assert (store.hits, store.computed) == (1 + 2 + 2, 2 + 1 + 1)
    store.states([first], layer=2)
    assert store.computed == 5


def test_states_taken_in_inference_mode_serve_training():
    base = tiny_base()
    store = store_of(base)
    with torch.inference_mode():
        store.states(EXAMPLES, layer=2)
    assert losses_of(base, run_on(base), store, steps=1)
    assert store.computed == len(EXAMPLES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_store_reads_the_same_bits_from_the_folder(dtype, tmp_path):
    base = tiny_base(dtype=dtype)
    written = store_of(base, folder=tmp_path, memory_bytes=0).states(EXAMPLES, layer=2)
    for memory_bytes in (0, PLENTY):
        again = store_of(base, folder=tmp_path, memory_bytes=memory_bytes)
        for _ in range(2):
            read = again.states(EXAMPLES, layer=2)
            assert read.states.dtype == dtype
            assert torch.equal(read.states, written.states)
        assert (again.hits, again.computed) == (2 * len(EXAMPLES), 0)


def test_a_store_finds_what_another_writes_after_it_was_opened(tmp_path):
    base = tiny_base()
    one, other = store_of(base, folder=tmp_path), store_of(base, folder=tmp_path)
    one.states(EXAMPLES[:2], layer=1)
    other.states(EXAMPLES[2:4], layer=1)
    one.states(EXAMPLES[:5], layer=1)
    assert (one.hits, one.computed) == (4, 3)


def test_many_states_are_two_files_of_each_writer(tmp_path):
    base = tiny_base()
    for _ in range(2):
        store = store_of(base, folder=tmp_path, memory_bytes=0)
        for example in examples_of(40, seed=7):
            store.states([example], layer=1)
        assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
    fresh = store_of(base, folder=tmp_path)
    fresh.states(EXAMPLES, layer=1)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4


def other_tokens(example: Example) -> Example:
    changed = (example.input_ids[0] ^ 1, *example.input_ids[1:])
    return Example(example.record, changed, example.num_prompt, example.truncated)


def test_other_tokens_another_layer_or_another_key_find_nothing(tmp_path):
    """What makes another key is in test_kept_keys."""
    base = tiny_base()
    store_of(base, folder=tmp_path).states(EXAMPLES, layer=1)

    def found(examples=EXAMPLES, *, layer: int = 1, **changes: str) -> int:
        store = store_of(base, folder=tmp_path, **changes)
        store.states(examples, layer=layer)
        return store.hits

    assert found([other_tokens(example) for example in EXAMPLES]) == 0
    assert found(layer=2) == 0
    assert found(key="another") == 0
    assert found() == len(EXAMPLES)


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.rglob(pattern)
    return path


def truncate_contents(folder: Path) -> None:
    path = only(folder, "*.contents")
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    path = only(folder, "*.contents")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate_index(folder: Path) -> None:
    path = only(folder, "*.index")
    path.write_bytes(path.read_bytes()[:-1])


def garble_an_entry(folder: Path) -> None:
    path = only(folder, "*.index")
    entries = bytearray(path.read_bytes())
    entries[-20] ^= 255
    path.write_bytes(entries)


def delete_contents(folder: Path) -> None:
    only(folder, "*.contents").unlink()


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (truncate_contents, 1),
        (flip_a_bit, 1),
        (truncate_index, 1),
        (garble_an_entry, 1),
        (delete_contents, len(EXAMPLES)),
    ],
)
def test_what_is_damaged_is_computed_again_and_written_again(damage, lost, tmp_path):
    base = tiny_base()
    whole = store_of(base, folder=tmp_path).states(EXAMPLES, layer=2)
    damage(tmp_path)
    store = store_of(base, folder=tmp_path, memory_bytes=0)
    for _ in range(2):
        assert torch.equal(store.states(EXAMPLES, layer=2).states, whole.states)
    assert store.computed == lost
    assert store.hits == 2 * len(EXAMPLES) - lost


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(tmp_path):
    base = tiny_base()
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    store = store_of(base, folder=in_the_way, memory_bytes=0)
    for _ in range(2):
        store.states(EXAMPLES, layer=1)
    assert (store.hits, store.computed) == (0, 2 * len(EXAMPLES))


def test_an_index_that_vanishes_is_as_if_it_had_never_been(tmp_path):
    base = tiny_base()
    store_of(base, folder=tmp_path).states(EXAMPLES, layer=1)
    index = only(tmp_path, "*.index")
    index.unlink()
    index.mkdir()
    store = store_of(base, folder=tmp_path)
    store.states(EXAMPLES, layer=1)
    assert store.computed == len(EXAMPLES)
