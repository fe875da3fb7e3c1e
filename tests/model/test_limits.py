"""Tokens and positions that a model does not have are found before training."""

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM

from geometries import TINY, UNUSUAL
from loracle.errors import ModelError
from loracle.model.base import FrozenBase
from loracle.model.guard import require_long_rows
from loracle.model.limits import reach_of, require_embedded, require_reach
from tiny import tiny_tokenizer
from tiny_engine import base_of, tiny_base

ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LONGROPE = ROPE | {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 48,
}


def base_with(**architecture) -> FrozenBase:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**({"initializer_range": 0.2} | architecture))
        return base_of(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("architecture", "tokens"),
    [
        (TINY["llama"], None),
        (TINY["gpt2"], 64),
        (UNUSUAL["opt"], 64),
        (TINY["llama"] | {"rope_parameters": ROPE | {"rope_type": "linear"}}, None),
        (
            TINY["llama"]
            | {"max_position_embeddings": 40, "rope_parameters": ROPE | {"rope_type": "dynamic"}},
            40,
        ),
        (TINY["llama"] | {"rope_parameters": LONGROPE}, 48),
    ],
)
def test_how_far_positions_reach_is_found_by_what_a_pass_does(architecture, tokens):
    base = base_with(**architecture)
    reach = reach_of(base)
    assert (reach and reach.tokens) == tokens
    if tokens is not None:
        require_reach(base, tokens=tokens, what="prompts", remedy="cut at {}")
        with pytest.raises(ModelError, match=rf"prompts need {tokens + 1} .*cut at {tokens}$"):
            require_reach(base, tokens=tokens + 1, what="prompts", remedy="cut at {}")


def test_a_word_without_an_embedding_is_refused_and_a_special_token_is_not():
    base = base_with(**TINY["llama"] | {"vocab_size": len(tiny_tokenizer())})
    require_embedded(base, name="m")
    tokenizer = type(base.tokenizer)(tokenizer_object=base.tokenizer.backend_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    base.tokenizer = tokenizer
    require_embedded(base, name="m")
    tokenizer.add_tokens([AddedToken("colour", special=False)])
    with pytest.raises(ModelError, match=r'^m: .* 1 tokens beyond .* first "colour" \(id 385\)'):
        require_embedded(base, name="m")


def test_a_window_that_only_the_mask_knows_is_found_by_rows_that_reach_it():
    moe = TINY["llama"] | {"model_type": "phimoe", "num_local_experts": 2, "sliding_window": 30}
    base = base_with(**moe)
    require_long_rows(base, tokens=30)
    with pytest.raises(ModelError, match=r"packed rows change its loss"):
        require_long_rows(base, tokens=60)


def test_rows_are_not_tried_where_no_length_is_named(monkeypatch):
    base = tiny_base()
    monkeypatch.setattr(base.model, "forward", None)
    require_long_rows(base, tokens=400)
