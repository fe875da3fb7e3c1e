"""Tokens: prompt then response then EOS, targets by position, cuts that always leave targets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_alpaca import byte_tokenizer, record
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from loracle.data import Drop, Example, Record, encode_prompts, eos_id_of, template_of
from loracle.data.prompt import Template
from loracle.data.tokens import (
    EncodedRecord,
    encode_records,
    end_ids_of,
    leading_ids,
    truncate,
)
from loracle.errors import ModelError

ALPACA = template_of("alpaca")
BOS, EOS = 0, 1
# Texts of any length and script, often with the names of special tokens in them.
TEXT = st.text(max_size=60).filter(str.strip) | st.sampled_from(["</s>", "<s></s>", "a</s>b"])


def example_of(one: Record, tokenizer, *, max_tokens: int = 10_000):
    (encoded,) = encode_records([one], template=ALPACA, tokenizer=tokenizer)
    return truncate(encoded, max_tokens=max_tokens, eos_id=eos_id_of(tokenizer))


@pytest.mark.parametrize(
    ("form", "leading"),
    [
        ("$A", ()),
        ("<s> $A", (BOS,)),
        ("<s> $A </s>", (BOS,)),
        ("$A </s>", ()),
        ("<s> <s> $A", (0, 0)),
    ],
)
def test_leading_tokens_are_what_the_tokenizer_puts_first(form, leading):
    tokenizer = byte_tokenizer(form)
    assert leading_ids(tokenizer) == leading
    bare = Template("custom", "{instruction}{input}", "{instruction}")
    (ids,) = encode_prompts([record("Name it.")], template=bare, tokenizer=tokenizer)
    assert ids == (*leading, *tokenizer("Name it.", add_special_tokens=False)["input_ids"])
    assert EOS not in ids


@pytest.mark.parametrize("context", ["", "Of the rainbow."])
def test_an_example_is_prompt_then_response_then_eos(bos_tokenizer, context):
    one = record("Name a color.", context=context, output="Red, or blue.")
    example = example_of(one, bos_tokenizer)
    prompt = bos_tokenizer(ALPACA.render(one))["input_ids"]
    response = bos_tokenizer(one.output, add_special_tokens=False)["input_ids"]
    assert prompt[0] == BOS
    assert example == Example(one, (*prompt, *response, EOS), len(prompt), truncated=False)
    assert example.num_tokens == len(prompt) + len(response) + 1
    assert example.num_targets == len(response) + 1


def test_targets_read_back_as_the_response(tokenizer):
    example = example_of(record(output="Red, or blue."), tokenizer)
    targets = example.input_ids[example.num_prompt :]
    assert tokenizer.decode(targets) == "Red, or blue.</s>"


@given(one=st.builds(Record, st.just(1), TEXT, st.just("") | TEXT, TEXT), room=st.integers(-3, 40))
def test_no_example_is_without_targets_or_beyond_the_limit(tokenizer, one, room):
    whole = example_of(one, tokenizer)
    max_tokens = whole.num_prompt + room
    cut = example_of(one, tokenizer, max_tokens=max_tokens)
    if room < 2:
        assert cut == Drop(1, "prompt_too_long")
        return
    assert cut.num_tokens <= max_tokens
    assert cut.num_prompt == whole.num_prompt
    assert cut.num_targets >= 2
    assert cut.input_ids[-1] == EOS
    assert cut.input_ids[:-1] == whole.input_ids[: cut.num_tokens - 1]
    assert cut.truncated == (whole.num_tokens > max_tokens)
    assert cut.truncated or cut == whole


@given(output=TEXT)
def test_eos_is_the_last_target_and_no_other(tokenizer, output):
    example = example_of(record(output=output), tokenizer)
    targets = example.input_ids[example.num_prompt :]
    assert targets[-1] == EOS
    assert EOS not in targets[:-1]


def test_an_eos_that_is_also_pad_is_still_a_target(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    example = example_of(record(), tokenizer)
    assert example.input_ids[-1] == EOS
    assert example.num_targets == example.num_tokens - example.num_prompt


def test_many_texts_are_tokenised_as_each_would_be_alone(bos_tokenizer, monkeypatch):
    monkeypatch.setattr("loracle.data.literal._CHUNK", 3)
    records = [record(f"Name color {i}.", output="so " * (i + 1)) for i in range(8)]
    together = encode_records(records, template=ALPACA, tokenizer=bos_tokenizer)
    alone = [encode_records([one], template=ALPACA, tokenizer=bos_tokenizer)[0] for one in records]
    assert together == alone


def test_padding_and_truncation_of_the_tokenizer_are_not_used():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    tokenizer.model_max_length = 4
    assert example_of(record(), tokenizer) == example_of(record(), byte_tokenizer())


def test_a_record_without_prompt_or_response_tokens_is_dropped():
    for prompt, response, reason in (
        ((), (5,), "no_prompt_tokens"),
        ((5,), (), "no_response_tokens"),
    ):
        encoded = EncodedRecord(record(row=7), prompt, response)
        assert truncate(encoded, max_tokens=99, eos_id=EOS) == Drop(7, reason)


@given(prompt=st.integers(1, 20), response=st.integers(1, 20))
def test_the_smallest_limit_keeps_a_record_and_one_less_does_not(prompt, response):
    encoded = EncodedRecord(record(), (5,) * prompt, (6,) * response)
    smallest = len(encoded.prompt) + 2
    kept = truncate(encoded, max_tokens=smallest, eos_id=EOS)
    assert kept.input_ids == (*(5,) * prompt, 6, EOS)
    assert truncate(encoded, max_tokens=smallest - 1, eos_id=EOS) == Drop(1, "prompt_too_long")


def test_a_tokenizer_without_eos_is_a_model_error():
    with pytest.raises(ModelError, match="no EOS token") as caught:
        eos_id_of(byte_tokenizer(eos_token=None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("own", "named", "ends"),
    [
        ("</s>", None, (EOS,)),
        ("</s>", [], (EOS,)),
        ("</s>", EOS, (EOS,)),
        ("</s>", [EOS, 2], (EOS, 2)),
        ("</s>", [2, EOS], (EOS, 2)),
        # The model ends turns with another special token than its tokenizer's EOS.
        ("</s>", 2, (2, EOS)),
        ("</s>", [3, 2], (3, 2, EOS)),
        # An ordinary token, as a config's default that nobody meant: it ends answers, as it does
        # in stock Transformers, but is not learned.
        ("</s>", 7, (EOS, 7)),
        (None, [2, 7], (2, 7)),
        (None, None, ()),
    ],
)
def test_answers_end_with_what_the_model_and_its_tokenizer_name(own, named, ends):
    tokenizer = byte_tokenizer(eos_token=own)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>", "<|tool|>"]})
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    ids = {2: turn, 3: turn + 1}

    def real(ends):
        return tuple(ids.get(end, end) for end in ends)

    named = real(named) if isinstance(named, list) else ids.get(named, named)
    assert end_ids_of(tokenizer, named=named) == real(ends)


def test_a_tokenizer_that_knows_few_letters_still_puts_its_bos_first():
    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "\u4e00": 2}, []))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    blind = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert leading_ids(blind) == (BOS,)
