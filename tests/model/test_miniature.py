"""A tiny model of a configuration decides, before a download, whether a row's sequences mix."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from geometries import DEEP, LATENT, LLAMA_2_7B, TINY, UNUSUAL
from loracle.errors import LeakError
from loracle.model import guard
from loracle.model.guard import require_sealed_architecture, require_sealed_rows
from loracle.model.load import load_base
from loracle.model.miniature import miniatures
from tiny_engine import CPU, save_family

LEAKING = ("falcon_h1", "rwkv", "recurrent_gemma")
SOUND = TINY | {k: v for k, v in UNUSUAL.items() if k not in LEAKING} | {"latent": LATENT}


@pytest.fixture(autouse=True)
def nothing_decided(monkeypatch, tmp_path):
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(guard, "_decided", {})


def configuration(architecture: dict, **changes: object) -> PreTrainedConfig:
    return AutoConfig.for_model(**(architecture | changes))


@pytest.mark.parametrize("family", SOUND)
def test_an_architecture_that_keeps_sequences_apart_passes(family):
    config = configuration(SOUND[family])
    assert next(miniatures(config, tokens=None))
    require_sealed_rows(config)


@pytest.mark.parametrize("architecture", [UNUSUAL[name] for name in LEAKING], ids=LEAKING)
def test_one_that_mixes_them_is_refused_in_one_line(architecture):
    with pytest.raises(LeakError, match=r"^\w+ForCausalLM: sequences that share a row change each"):
        require_sealed_architecture(architecture)


@pytest.mark.parametrize(
    ("family", "num_kinds", "num_layers"),
    [("llama-2-7b", 1, 2), ("sliding", 2, 6), ("dense-first", 2, 4), ("hybrid", 2, 4)],
)
def test_every_kind_of_layer_is_in_it_and_few_of_each(family, num_kinds, num_layers):
    base = next(miniatures(configuration(DEEP[family]), tokens=None))
    kinds = {tuple(sorted({type(m).__name__ for m in block.modules()})) for block in base.blocks}
    windows = {getattr(block.self_attn, "sliding_window", 0) for block in base.blocks
               if hasattr(block, "self_attn")}  # fmt: skip
    assert len(base.blocks) == num_layers
    assert max(len(kinds), len(windows)) == num_kinds
    assert sum(p.numel() for p in base.model.parameters()) < 20e6


def test_lengths_that_are_to_be_kept_are_and_the_others_shrink():
    given = LLAMA_2_7B | {"model_type": "phi3", "sliding_window": 2047, "pad_token_id": 31999}
    base = next(miniatures(configuration(given), tokens=None, keeps_lengths=True))
    config = base.model.config
    assert (config.sliding_window, config.max_position_embeddings) == (2047, 4096)
    assert (config.num_hidden_layers, config.hidden_size) == (2, 256)
    assert config.pad_token_id < config.vocab_size
    shorter = next(miniatures(configuration(given), tokens=None)).model.config
    assert (shorter.sliding_window, shorter.max_position_embeddings) == (32, 40)


def test_a_window_that_only_the_mask_knows_matters_to_sequences_beyond_it():
    moe = TINY["llama"] | {"model_type": "phimoe", "num_local_experts": 2, "sliding_window": 1000}
    require_sealed_rows(configuration(moe), tokens=1000)
    with pytest.raises(LeakError, match="packed rows change its loss"):
        require_sealed_rows(configuration(moe), tokens=1001)


def test_a_window_that_attention_knows_is_left_to_the_data():
    require_sealed_rows(configuration(TINY["mistral"], sliding_window=1000), tokens=1001)


@pytest.mark.parametrize("name", ["falcon_h1", "rwkv"])
def test_in_16_bits_the_tiny_model_decides_before_the_base_itself(name, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configuration(UNUSUAL[name])).to(torch.bfloat16)
    folder = save_family(tmp_path / name, model)
    with pytest.raises(LeakError, match="change each other's loss"):
        load_base(folder, device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "of remote code", "auto_map": {"AutoConfig": "x.y"}},
        TINY["llama"] | {"hidden_size": "wide"},
        TINY["llama"] | {"num_attention_heads": 0},
        TINY["llama"] | {"hidden_act": "a new one"},
        TINY["llama"] | {"model_type": "clip"},
        UNUSUAL["mixtral"] | {"num_experts_per_tok": 9},
        {"model_type": "musicgen"},
        {"model_type": "blt"},
    ],
)
def test_where_no_tiny_model_can_be_built_or_run_nothing_is_decided(architecture):
    require_sealed_architecture(architecture)


def test_what_is_decided_is_kept_for_the_configuration(monkeypatch):
    built = []
    monkeypatch.setattr(
        guard, "miniatures", lambda config, **given: built.append(0) or miniatures(config, **given)
    )

    def decide(**changes: object) -> int:
        monkeypatch.setattr(guard, "_decided", {})
        with pytest.raises(LeakError):
            require_sealed_rows(configuration(UNUSUAL["rwkv"], **changes))
        return len(built)

    assert [decide(), decide(), decide(dtype="bfloat16")] == [1, 1, 1]
    assert decide(layer_norm_epsilon=1e-3) == 2
    for entry in (guard.cache_folder() / "sealed").iterdir():
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"leak": None}))
    assert decide() == 3


def test_building_one_draws_from_no_stream_of_a_run():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    require_sealed_architecture(TINY["llama"])
    assert torch.equal(torch.random.get_rng_state(), before)
