"""Scores are token-weighted and answers greedy, however examples are grouped."""

import math
from collections.abc import Sequence

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from transformers import GenerationConfig

from loracle.config.run import PlacementConfig
from loracle.engine.answers import Answer, answer_prompts, score_answers
from loracle.engine.evaluate import ExampleScore, likelihood, score_adapters, score_examples
from loracle.errors import NonFiniteError
from loracle.model.base import FrozenBase
from loracle.model.layers.lora import RoutedLinear
from loracle.model.load import load_base
from loracle.model.trunk import TrunkStore
from tiny import save_tiny_model, tiny_tokenizer
from tiny_engine import (
    CPU,
    attach,
    base_of,
    examples_of,
    stock_model,
    stock_nll,
    stock_peft,
    tiny_base,
    tiny_plan,
)

EXAMPLES = examples_of(13)
EOS = tiny_tokenizer().eos_token_id


def scores(base: FrozenBase, *, adapter: str | None = None, batch_tokens: int = 50) -> list[float]:
    result = score_examples(base, EXAMPLES, adapter=adapter, batch_tokens=batch_tokens)
    assert [score.num_targets for score in result] == [e.num_targets for e in EXAMPLES]
    return [score.nll_sum_nats for score in result]


@pytest.mark.parametrize("adapter", [None, "default"])
def test_each_score_is_the_sum_that_a_stock_model_gives_in_order(adapter):
    base, plan = tiny_base(), tiny_plan()
    attached = attach(base, plan)
    stock = stock_model() if adapter is None else stock_peft(stock_model(), plan, like=attached)
    with torch.no_grad():
        reference = [stock_nll(stock, example).double().sum().item() for example in EXAMPLES]
    assert scores(base, adapter=adapter) == pytest.approx(reference, rel=1e-6)


def test_scores_do_not_depend_on_the_batch():
    base = tiny_base()
    whole = scores(base, batch_tokens=10_000)
    for batch_tokens in (1, 20, 37):
        assert scores(base, batch_tokens=batch_tokens) == pytest.approx(whole, rel=1e-6)


def test_progress_counts_every_example_once():
    done = []
    score_examples(tiny_base(), EXAMPLES, adapter=None, batch_tokens=40, progress=done.append)
    assert sum(done) == len(EXAMPLES)
    assert len(done) > 2


def test_scoring_leaves_no_gradient_behind():
    base = tiny_base()
    adapter = attach(base, tiny_plan())
    scores(base, adapter="default")
    assert all(parameter.grad is None for parameter in adapter.parameters.values())


@pytest.mark.parametrize(("adapter", "who"), [(None, "the untuned base"), ("default", "'default'")])
def test_not_a_number_names_model_and_record(adapter, who):
    base = tiny_base()
    attach(base, tiny_plan())
    base.model.model.norm.weight.data[0] = math.nan
    with pytest.raises(NonFiniteError, match=rf"^validation: the loss of .*{who} is nan on record"):
        scores(base, adapter=adapter)


def crowd(family: str = "llama") -> FrozenBase:
    """A base with adapters of different modules, one of them high up, one on the head."""
    base = tiny_base(family)
    placements = {
        "default": "all-linear",
        "attention": "attention",
        "head": PlacementConfig(modules=["q_proj", "lm_head"]),
    }
    for seed, (name, placement) in enumerate(placements.items()):
        attach(base, tiny_plan(placement, family=family), name=name, seed=seed)
    return base


CROWD = (None, "default", "head", "attention")


def sums(base: FrozenBase, *adapters: str | None, **changes: object) -> list[list[float]]:
    requested = {"batch_tokens": 150} | changes
    result = score_adapters(base, EXAMPLES, adapters=adapters, **requested)
    return [[score.nll_sum_nats for score in scores] for scores in result]


def test_one_pass_for_many_adapters_scores_each_as_alone():
    base = crowd()
    together = sums(base, *CROWD)
    for adapter, result in zip(CROWD, together, strict=True):
        assert result == pytest.approx(scores(base, adapter=adapter), rel=1e-6)
    assert len({round(sum(result), 3) for result in together}) == len(CROWD)


def test_the_order_of_adapters_and_the_batch_do_not_matter():
    base = crowd()
    whole = sums(base, *CROWD)
    for changed in (sums(base, *CROWD[::-1])[::-1], sums(base, *CROWD, batch_tokens=1)):
        for result, expected in zip(changed, whole, strict=True):
            assert result == pytest.approx(expected, rel=1e-6)


def test_one_adapter_in_a_pass_is_that_adapter_alone_bit_for_bit():
    base = crowd()
    for adapter in CROWD:
        assert sums(base, adapter, batch_tokens=50) == [scores(base, adapter=adapter)]


def test_copies_for_adapters_count_as_tokens_of_the_pass(monkeypatch):
    base, tokens = crowd(), []
    token_nll = FrozenBase.token_nll

    def note(self, row, **kwargs):
        tokens.append(row.num_tokens)
        return token_nll(self, row, **kwargs)

    monkeypatch.setattr(FrozenBase, "token_nll", note)
    done: list[int] = []
    sums(base, *CROWD, progress=done.append)
    assert sum(done) == len(EXAMPLES)
    assert sum(tokens) == len(CROWD) * sum(example.num_tokens for example in EXAMPLES)
    assert max(tokens) <= 150


def test_one_adapter_that_is_not_a_number_is_named():
    base = crowd()
    for module in base.model.modules():
        if isinstance(module, RoutedLinear) and "attention" in module.lora_B:
            module.lora_B["attention"].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="the loss of adapter 'attention' is nan on record"):
        sums(base, *CROWD)
    assert sums(base, "default") == [scores(base, adapter="default", batch_tokens=150)]


def test_nothing_to_score_is_no_score():
    assert score_adapters(tiny_base(), [], adapters=[None, None], batch_tokens=9) == [[], []]


@pytest.mark.parametrize("entry_layer", [0, 2])
def test_kept_states_serve_every_adapter_above_them(entry_layer):
    base = base_of(stock_model())
    upper = PlacementConfig(modules=["q_proj", "down_proj"], layers=[2])
    for seed, name in enumerate(("one", "two")):
        attach(base, tiny_plan(upper), name=name, seed=seed)
    store = TrunkStore(base, memory_bytes=10**6)
    adapters = (None, "one", "two")
    result = sums(base, *adapters, trunk=store, entry_layer=entry_layer)
    assert store.computed == (len(EXAMPLES) if entry_layer else 0)
    for mine, expected in zip(result, sums(base, *adapters), strict=True):
        assert mine == pytest.approx(expected, rel=1e-6)
    assert result[1] != result[2]


def test_likelihood_weighs_tokens_and_not_examples():
    result = likelihood([ExampleScore(1, 5.0), ExampleScore(99, 99.0)])
    assert result.loss_nats_per_token == pytest.approx(104 / 100)
    assert result.perplexity == pytest.approx(math.exp(1.04))
    assert (result.num_targets, result.num_examples) == (100, 2)


@pytest.mark.parametrize(("nats", "perplexity"), [(709.0, math.exp(709)), (800.0, None)])
def test_a_perplexity_beyond_the_largest_number_is_none(nats, perplexity):
    assert likelihood([ExampleScore(10, 10 * nats)]).perplexity == perplexity


def test_likelihood_does_not_depend_on_order():
    parts = [ExampleScore(1, 1e-9), ExampleScore(1, 1e9), ExampleScore(1, 0.1)] * 50
    assert likelihood(parts) == likelihood(parts[::-1])


# Prompts of several lengths, so that most are padded in their batch.
PROMPTS = [example.input_ids[: example.num_prompt] for example in examples_of(9, longest=25)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request) -> FrozenBase:
    """A model that answers some prompts briefly and some at length, with an adapter."""
    base = tiny_base(request.param)
    base.model.lm_head.weight.data[EOS] *= {"llama": 3, "gpt2": 2.5}[request.param]
    attach(base, tiny_plan(family=request.param), spread_b=0.3)
    return base


def stock_answers(base: FrozenBase, *, adapted: bool, max_new_tokens: int) -> list[Answer]:
    """Each prompt by itself through Transformers' generate and PEFT's own forward."""
    base.model.set_attn_implementation("sdpa")
    result = []
    for prompt in PROMPTS:
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=EOS, pad_token_id=0
        )
        ids = torch.tensor([prompt])
        arguments = {"attention_mask": torch.ones_like(ids), "generation_config": config}
        if adapted:
            out = base.peft.generate(input_ids=ids, **arguments)
        else:
            with base.peft.disable_adapter():
                out = base.peft.generate(input_ids=ids, **arguments)
        new = out[0, len(prompt) :].tolist()
        text = base.tokenizer.decode([t for t in new if t != EOS], skip_special_tokens=True)
        result.append(Answer(text, hit_limit=EOS not in new))
    base.model.set_attn_implementation("loracle_packed")
    return result


def answers(base: FrozenBase, *, adapter: str | None, **changes: int) -> list[Answer]:
    requested = {"max_new_tokens": 12, "batch_size": 4} | changes
    return answer_prompts(base, PROMPTS, adapter=adapter, **requested)


@pytest.mark.parametrize("adapter", [None, "default"])
def test_answers_are_those_of_stock_generate_one_prompt_at_a_time(base, adapter):
    reference = stock_answers(base, adapted=adapter is not None, max_new_tokens=12)
    for batch_size in (1, 4, 16):
        assert answers(base, adapter=adapter, batch_size=batch_size) == reference
    assert {answer.hit_limit for answer in reference} == {True, False}
    assert len({answer.text for answer in reference}) > 3


def test_an_answer_that_ends_in_its_last_allowed_token_has_not_hit_the_limit(base):
    whole = answers(base, adapter=None, max_new_tokens=12)
    index = next(i for i, answer in enumerate(whole) if answer.text and not answer.hit_limit)
    cut = [answers(base, adapter=None, max_new_tokens=n)[index].hit_limit for n in range(1, 13)]
    # Cut by every limit below its length, EOS included, and by none from there on.
    assert cut == sorted(cut, reverse=True)
    needed = 1 + sum(cut)
    assert needed > 1
    assert answers(base, adapter=None, max_new_tokens=needed)[index] == whole[index]


def test_the_models_own_generation_config_has_no_say(tmp_path, capsys):
    plain, opinionated = (save_tiny_model(tmp_path / name) for name in ("plain", "opinionated"))
    GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, no_repeat_ngram_size=1
    ).save_pretrained(opinionated)
    result = [
        answers(load_base(folder, device=CPU, dtype=torch.float32), adapter=None)
        for folder in (plain, opinionated)
    ]
    assert result[0] == result[1]
    assert "generation flags" not in capsys.readouterr().err


def test_answering_reports_progress_and_restores_the_packed_attention(base):
    done: list[int] = []
    answer_prompts(
        base, PROMPTS, adapter=None, max_new_tokens=2, batch_size=4, progress=done.append
    )
    assert done == [4, 4, 1]
    assert base.model.config._attn_implementation == "loracle_packed"


def said(*texts: str, cut: Sequence[int] = ()) -> list[Answer]:
    return [Answer(text, hit_limit=index in cut) for index, text in enumerate(texts)]


REFERENCES = ["the cat sat on the mat", "a quick brown fox jumps over it", "yes, it is so indeed"]


def test_text_scores_are_sacrebleus():
    texts = ["the cat sat on a mat", "a quick brown fox jumps over", "no, it is not so"]
    result = score_answers(said(*texts, cut=[1]), references=REFERENCES)
    assert result.bleu == BLEU().corpus_score(texts, [REFERENCES]).score
    assert result.chrf == CHRF().corpus_score(texts, [REFERENCES]).score
    assert 0 < result.bleu < 100
    assert result.hit_limit_frac == pytest.approx(1 / 3)
    assert result.num_answers == 3
    assert result.bleu_signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert result.chrf_signature.startswith(
        "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:"
    )


def test_an_empty_answer_counts_against_the_score():
    with_it = score_answers(said(REFERENCES[0], REFERENCES[1], ""), references=REFERENCES)
    without = score_answers(said(*REFERENCES[:2]), references=REFERENCES[:2])
    assert with_it.bleu < without.bleu
    assert with_it.chrf < without.chrf
    assert with_it.num_answers == 3


def test_nothing_but_empty_answers_scores_zero():
    result = score_answers(said("", "", ""), references=REFERENCES)
    assert result.bleu == 0
    assert result.chrf == 0
