"""Our decoding says what Transformers' generate says, for each prompt and adapter by itself."""

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import loracle.engine.decode
from geometries import LATENT, UNUSUAL
from loracle.config.run import PlacementConfig
from loracle.engine.answers import Answer, answer_prompts, answer_with_adapters
from loracle.engine.decode import (
    decode_greedily,
    decodes_exactly,
    generate_greedily,
    greedy,
    prompt_batches,
)
from loracle.model.base import FrozenBase
from loracle.model.inventory import inventory_of
from loracle.placement import resolve_placement
from tiny import tiny_tokenizer
from tiny_engine import (
    FAMILIES,
    attach,
    base_of,
    examples_of,
    stock_model,
    stock_peft,
    tiny_base,
    tiny_plan,
)

EOS = tiny_tokenizer().eos_token_id
NEW = 12
NEVER_SAID = 63
PROMPTS = [example.input_ids[: example.num_prompt] for example in examples_of(9, longest=25)]
ADAPTERS = (None, "everything", "attention", "head")


def inclined_to_stop(model: torch.nn.Module, *, by: float = 2.5) -> torch.nn.Module:
    """The model with a larger logit of EOS, so that answers differ in length."""
    model.lm_head.weight.data[EOS] *= by
    return model


def stock_tokens(
    model: torch.nn.Module, prompt: tuple[int, ...], *, ends: Sequence[int] = (EOS,)
) -> list[int]:
    """What generate adds to one prompt by itself, the end token included."""
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=[*ends], pad_token_id=EOS
    )
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("decode", [decode_greedily, generate_greedily])
def test_an_answer_ends_with_whichever_end_token_comes_first(decode):
    model = inclined_to_stop(stock_model())
    base = base_of(model)
    whole = [stock_tokens(model, prompt) for prompt in PROMPTS]
    said = Counter(token for tokens in whole for token in tokens[2:-1] if token != EOS)
    ends = (EOS, said.most_common(1)[0][0])
    base = replace(base, end_ids=ends)
    (answers,) = decode(base, PROMPTS, adapters=[None], max_new_tokens=NEW)
    assert answers == [stock_tokens(model, prompt, ends=ends) for prompt in PROMPTS]
    assert {tokens[-1] for tokens in answers} >= {*ends}
    given = answer_prompts(base, PROMPTS, adapter=None, max_new_tokens=NEW)
    cut = [tokens[-1] not in ends for tokens in answers]
    assert [answer.hit_limit for answer in given] == cut
    assert len({*cut}) == 2


def decoded(base: FrozenBase, *adapters: str | None) -> list[list[list[int]]]:
    return decode_greedily(base, PROMPTS, adapters=adapters, max_new_tokens=NEW)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_says_what_generate_says_of_each_prompt_alone(family):
    model, plan = inclined_to_stop(stock_model(family)), tiny_plan(family=family)
    base = base_of(model)
    like = attach(base, plan, spread_b=0.3)
    tuned = stock_peft(model, plan, like=like)
    untuned_tokens, tuned_tokens = decoded(base, None, "default")
    assert untuned_tokens == [stock_tokens(model, prompt) for prompt in PROMPTS]
    assert tuned_tokens == [stock_tokens(tuned, prompt) for prompt in PROMPTS]
    assert untuned_tokens != tuned_tokens


def test_adapters_reach_every_row_of_a_latent_cache():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**LATENT)
        model = inclined_to_stop(AutoModelForCausalLM.from_config(config))
    base = base_of(model)
    inventory = inventory_of(base.model)
    plan = resolve_placement("attention", inventory=inventory, rank=4, alpha=8.0)
    for seed, name in enumerate(("one", "two")):
        attach(base, plan, name=name, seed=seed, spread_b=0.4)
    names = (None, "one", "two")
    assert decodes_exactly(base, adapters=names)
    expected = generate_greedily(base, PROMPTS, adapters=names, max_new_tokens=NEW)
    assert decoded(base, *names) == expected
    assert expected[0] != expected[1] != expected[2]


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    """A Llama with three adapters of different shape that end their answers at different times."""
    base = base_of(inclined_to_stop(stock_model(), by=3))
    placements = {
        "everything": "all-linear",
        "attention": "attention",
        "head": PlacementConfig(modules=["q_proj", "lm_head"]),
    }
    for seed, (name, placement) in enumerate(placements.items()):
        attach(base, tiny_plan(placement), name=name, seed=seed, spread_b=0.4)
    return base


def test_many_adapters_in_one_batch_say_what_each_says_alone(base):
    together = decoded(base, *ADAPTERS)
    alone = [decoded(base, adapter)[0] for adapter in ADAPTERS]
    assert together == alone
    assert len({str(tokens) for tokens in together}) == len(ADAPTERS)
    lengths = {len(tokens) for answers in together for tokens in answers}
    assert len(lengths) > 3
    assert max(lengths) == NEW


def test_the_order_of_adapters_does_not_matter(base):
    assert decoded(base, *ADAPTERS[::-1]) == decoded(base, *ADAPTERS)[::-1]


@pytest.mark.parametrize("family", ["opt", "qwen2_moe", "phi3"])
def test_adapters_share_a_batch_where_layers_flatten_it(family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"initializer_range": 0.2, "num_experts_per_tok": 1} | UNUSUAL[family]
        config = AutoConfig.for_model(**sizes)
        model = inclined_to_stop(AutoModelForCausalLM.from_config(config).eval())
    base = base_of(model)
    plan = resolve_placement("all-linear", inventory=inventory_of(model), rank=4, alpha=8.0)
    for seed, name in enumerate(("one", "two")):
        attach(base, plan, name=name, seed=seed, spread_b=0.3)
    assert decodes_exactly(base)
    assert decoded(base, "one", None, "two") == [decoded(base, a)[0] for a in ("one", None, "two")]
    assert decoded(base, None)[0] == [stock_tokens(model, prompt) for prompt in PROMPTS]


def test_no_token_is_decoded_for_an_answer_that_has_ended(base):
    rows = []

    def note(_module, _args, kwargs) -> None:
        rows.append(len(kwargs["input_ids"]))

    with base.model.model.register_forward_pre_hook(note, with_kwargs=True):
        said = decoded(base, *ADAPTERS)
    assert rows[0] == len(PROMPTS) * len(ADAPTERS)
    assert sum(rows) == sum(len(tokens) for answers in said for tokens in answers)


def test_those_who_leave_do_not_change_what_the_others_say(base):
    whole = decoded(replace(base, end_ids=(NEVER_SAID,)), *ADAPTERS)
    assert {len(tokens) for answers in whole for tokens in answers} == {NEW}
    cut = [[[*t[: t.index(EOS)], EOS] if EOS in t else t for t in tokens] for tokens in whole]
    assert decoded(base, *ADAPTERS) == cut
    assert sum(EOS in tokens for answers in whole for tokens in answers) > 5


def test_asking_seldom_who_has_ended_changes_no_token(base, monkeypatch):
    often = decoded(base, *ADAPTERS)
    monkeypatch.setattr(loracle.engine.decode, "_steps_per_check", lambda _: 5)
    assert decoded(base, *ADAPTERS) == often


def test_an_answer_may_end_at_once():
    base = tiny_base("phi")
    base.model.lm_head.bias.data[EOS] = 1e3
    assert decoded(base, None) == [[[EOS]] * len(PROMPTS)]
    assert answer_prompts(base, PROMPTS, adapter=None, max_new_tokens=1) == [
        Answer("", hit_limit=False)
    ] * len(PROMPTS)


def test_an_answer_that_never_ends_is_cut_at_the_limit():
    base = tiny_base("phi")
    base.model.lm_head.bias.data[EOS] = -1e3
    assert {len(tokens) for tokens in decoded(base, None)[0]} == {NEW}
    answers = answer_prompts(base, PROMPTS, adapter=None, max_new_tokens=3)
    assert all(answer.hit_limit for answer in answers)


def test_nothing_asked_is_nothing_answered(base):
    assert answer_with_adapters(base, [], adapters=[None, "head"], max_new_tokens=3) == [[], []]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_decodes_exactly(family, dtype):
    assert decodes_exactly(tiny_base(family, dtype=dtype))


def test_a_head_of_more_than_one_product_is_used_whole():
    base = base_of(inclined_to_stop(stock_model()))
    base.model.lm_head.register_forward_hook(lambda _module, _args, logits: 5 * logits.tanh())
    plain = decoded(base, None)
    base.plain_head = False
    assert decoded(base, None) == plain


def forget_positions(base: FrozenBase) -> None:
    """The model counts padding as tokens, whatever it is told."""
    decoder = base.model.get_decoder()
    forward = decoder.forward

    def forgetful(*args, **kwargs):
        return forward(*args, **{**kwargs, "position_ids": None})

    decoder.forward = forgetful


def refuse_partial_logits(base: FrozenBase) -> None:
    """The model makes the logits of every position, by more than one product."""
    base.plain_head = False
    forward = base.model.forward

    def whole(
        input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **_
    ):
        return forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )

    def strict(*args, **kwargs):
        if "logits_to_keep" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'logits_to_keep'")
        return whole(*args, **kwargs)

    strict.__signature__ = inspect.signature(whole)
    base.model.forward = strict


@pytest.mark.parametrize("break_it", [forget_positions, refuse_partial_logits])
def test_a_model_that_cannot_be_decoded_so_is_told_by_its_numbers(break_it):
    base = tiny_base("gpt2")
    assert decodes_exactly(base)
    break_it(base)
    assert not decodes_exactly(base)


def test_such_a_model_answers_through_generate(monkeypatch):
    base = base_of(inclined_to_stop(stock_model("gpt2")))
    attach(base, tiny_plan(family="gpt2"), spread_b=0.3)
    expected = answer_with_adapters(base, PROMPTS, adapters=[None, "default"], max_new_tokens=NEW)
    monkeypatch.setattr("loracle.engine.answers.decode_greedily", None)
    refuse_partial_logits(base)
    result = answer_with_adapters(base, PROMPTS, adapters=[None, "default"], max_new_tokens=NEW)
    assert result == expected
    assert result[0] != result[1]


def test_generate_takes_our_config_and_says_the_same(base):
    candidate = decoded(base, None, "head")
    reference = generate_greedily(base, PROMPTS, adapters=[None, "head"], max_new_tokens=NEW)
    assert reference == candidate
    assert greedy(base, max_new_tokens=3).max_new_tokens == 3


LENGTHS = [7, 3, 9, 3, 20, 5, 8]


def batches(**changes: int | None) -> list[list[int]]:
    requested = {"copies": 1, "max_new_tokens": 2, "cache_tokens": 33, "most": None} | changes
    return prompt_batches(LENGTHS, **requested)


def test_batches_are_of_like_length_and_fit_the_cache():
    # Widths with 2 new tokens: 5, 5, 7, 9 | 10, 11 | 22.
    assert batches(cache_tokens=36) == [[1, 3, 5, 0], [6, 2], [4]]
    for batch in batches(cache_tokens=36):
        assert len(batch) * (max(LENGTHS[i] for i in batch) + 2) <= 36


def test_adapters_share_the_cache_and_a_limit_on_prompts_holds():
    assert batches(copies=2) == [[1, 3], [5], [0], [6], [2], [4]]
    assert batches(cache_tokens=10_000, most=3) == [[1, 3, 5], [0, 6, 2], [4]]
    assert batches(cache_tokens=10_000) == [[1, 3, 5, 0, 6, 2, 4]]


def test_a_prompt_beyond_the_budget_has_a_batch_of_its_own():
    assert batches(cache_tokens=1) == [[1], [3], [5], [0], [6], [2], [4]]
    assert prompt_batches([], copies=1, max_new_tokens=1, cache_tokens=1, most=None) == []
