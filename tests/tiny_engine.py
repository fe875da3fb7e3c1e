"""Tiny models of each family, stock and as a frozen base, with examples and adapters for them."""

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from geometries import TINY
from loracle.config.files import load_config
from loracle.config.run import PlacementConfig, TrainConfig
from loracle.data import Example, Record
from loracle.data.packing import PackedRow
from loracle.engine.train_state import TrainState, new_run
from loracle.model.adapters import Adapter, attach_adapter, peft_config_of
from loracle.model.base import FrozenBase
from loracle.model.inventory import inventory_of
from loracle.model.layers.attention import PACKED, register_packed_attention
from loracle.model.layers.lora import Route
from loracle.placement import ModulePlan, resolve_placement
from loracle.screen import quiet_transformers
from tiny import tiny_tokenizer

FAMILIES = tuple(TINY)
CPU = torch.device("cpu")


@cache
def _template(family: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Ten times the usual range: logits that differ, attention that is not uniform.
        config = AutoConfig.for_model(**({"initializer_range": 0.2} | TINY[family]))
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero as they come, so that leaving one out would not show
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def stock_model(family: str = "llama", *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The family's random model as Transformers runs it; the same weights every time."""
    return copy.deepcopy(_template(family)).to(dtype)


def base_of(model: PreTrainedModel) -> FrozenBase:
    """A frozen base with a copy of a stock model's weights."""
    register_packed_attention()
    packed = copy.deepcopy(model).eval().requires_grad_(False)
    packed.set_attn_implementation(PACKED)
    return FrozenBase(model=packed, tokenizer=tiny_tokenizer(), device=CPU, dtype=packed.dtype)


def tiny_base(family: str = "llama", *, dtype: torch.dtype = torch.float32) -> FrozenBase:
    """The family's random model as a frozen base."""
    return base_of(stock_model(family, dtype=dtype))


def tiny_plan(
    placement: str | PlacementConfig = "all-linear",
    *,
    family: str = "llama",
    rank: int = 4,
    alpha: float = 8.0,
) -> ModulePlan:
    """A placement on the family's model."""
    inventory = inventory_of(_template(family))
    return resolve_placement(placement, inventory=inventory, rank=rank, alpha=alpha)


def attach(
    base: FrozenBase,
    plan: ModulePlan,
    *,
    name: str = "default",
    seed: int = 0,
    spread_b: float | None = 0.1,
) -> Adapter:
    """A new adapter whose B is random rather than zero, unless ``spread_b`` is None."""
    adapter = attach_adapter(
        base, name=name, plan=plan, dropout=0.0, seed=seed, model_source="tiny"
    )
    if spread_b is not None:
        draw = torch.Generator().manual_seed(seed)
        for key, parameter in adapter.parameters.items():
            if key.endswith("lora_B"):
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.data.copy_(noise * spread_b)
    return adapter


def stock_peft(model: PreTrainedModel, plan: ModulePlan, *, like: Adapter | None) -> PeftModel:
    """A copy of the model as PEFT adapts it, nothing of ours, with ``like``'s tensors."""
    config = LoraConfig(**peft_config_of(plan, dropout=0.0))
    with quiet_transformers():
        peft = get_peft_model(copy.deepcopy(model), config).eval()
    if like is not None:
        theirs = peft_tensors(peft)
        for key, parameter in like.parameters.items():
            theirs[key].data.copy_(parameter.data)
    return peft


def peft_tensors(peft: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The trainable tensors of a stock PEFT model under our names."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }


def examples_of(
    count: int = 6, *, seed: int = 0, longest: int = 17, vocab: int = 64
) -> list[Example]:
    """Random examples of different lengths; ids from 3 up, so that none is special."""
    draw = torch.Generator().manual_seed(seed)

    def below(high: int, low: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    found = []
    for row in range(1, count + 1):
        length = below(longest + 1, 4)
        ids = torch.randint(3, vocab, (length,), generator=draw).tolist()
        found.append(
            Example(Record(row, "Say.", "", "Said."), tuple(ids), below(length - 1, 1), False)
        )
    return found


def stock_nll(model: torch.nn.Module, example: Example) -> Tensor:
    """-ln p of each target by a stock model that sees one sequence, in nats."""
    ids = torch.tensor([example.input_ids])
    logits = model(input_ids=ids).logits[0, example.num_prompt - 1 : -1]
    targets = ids[0, example.num_prompt :]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def packed_nll(base: FrozenBase, row: PackedRow, *, adapter: str | None = None) -> Tensor:
    """-ln p of each target of a row, through one adapter or the base alone."""
    return base.token_nll(row, routes=() if adapter is None else (Route(adapter),))


def train_config(**changes: object) -> TrainConfig:
    """The default ``train`` section for a short run, with changes."""
    short = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup_frac": 0.2}
    return TrainConfig.model_validate(load_config().train.model_dump() | short | changes)


def tiny_run(
    base: FrozenBase,
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    dropout: float = 0.0,
    seed: int = 0,
    **changes: object,
) -> TrainState:
    """A run at step 0 with a short schedule."""
    return new_run(
        base,
        adapter=adapter,
        examples=examples,
        train=train_config(**changes),
        dropout=dropout,
        seed=seed,
    )


def save_family(folder: Path, model: PreTrainedModel) -> Path:
    """Writes a model and the tiny tokenizer to ``folder``."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
