"""Special tokens: a template's are special, a record's are letters, whatever the tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_alpaca import byte_tokenizer, record
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import loracle.data.literal
from loracle.data.literal import Part, encode_texts
from loracle.data.prompt import Template
from loracle.data.tokens import encode_prompts

CHAT = Template(
    "custom",
    "<s>user {instruction}\n{input} <|end|>\n <|next|> model ",
    "<s>user {instruction} <|end|>\n model",
)
SPELLED = ["<s>", "</s>", "<|end|>", "<|next|>", "<pad>", "<", "s>"]
# Texts of any script, often with the names of special tokens in them or halves of such.
TEXT = st.lists(st.sampled_from(SPELLED) | st.text(max_size=8), max_size=6).map("".join)


def space_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space before what stands first, as Llama 2 does; its tokens swallow spaces."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(["Name three primary colors. user model <>/s|end next"], trainer)
    bos = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    backend.add_special_tokens(
        [AddedToken("<|end|>", rstrip=True), AddedToken("<|next|>", lstrip=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bytes with BOS": byte_tokenizer("<s> $A"),
    "spaces": space_tokenizer(),
    "without a backend": ByT5Tokenizer(),
}


def stock(tokenizer, text, *, plain=False):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    return tuple(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT)
def test_a_text_of_a_record_is_read_as_letters(name, text):
    tokenizer = TOKENIZERS[name]
    (ids,) = encode_texts([[Part(text, from_record=True)]], tokenizer=tokenizer)
    assert ids == stock(tokenizer, text, plain=True)
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None} & {*ids}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT)
def test_a_text_of_a_template_is_read_as_stock_transformers_reads_it(name, text):
    tokenizer = TOKENIZERS[name]
    (ids,) = encode_texts([[Part(text, from_record=False)]], tokenizer=tokenizer)
    assert ids == stock(tokenizer, text)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("context", ["", "of wood"])
def test_reading_piece_by_piece_is_what_stock_transformers_does(name, context, monkeypatch):
    tokenizer = TOKENIZERS[name]
    one = record("Name three colors", context=context)
    monkeypatch.setattr("loracle.data.literal._Encoder._num_special", lambda *_: (1, 2))
    (ids,) = encode_texts([CHAT.parts(one)], tokenizer=tokenizer)
    assert ids == stock(tokenizer, CHAT.render(one))


@pytest.mark.parametrize("name", ["bytes", "bytes with BOS", "spaces"])
@given(instruction=TEXT, context=TEXT)
def test_a_prompt_has_the_special_tokens_of_its_template_and_no_others(name, instruction, context):
    tokenizer = TOKENIZERS[name]
    one = record(instruction, context=context)
    form = CHAT.with_input if context else CHAT.without_input
    (ids,) = encode_prompts([one], template=CHAT, tokenizer=tokenizer)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {
        tokenizer.unk_token_id
    }
    written = [token for token in stock(tokenizer, form) if token in special]
    assert [token for token in ids if token in special] == written


@pytest.mark.parametrize("form", ["$A", "<s> $A", "<s> $A </s>", "<s> <s> $A"])
@pytest.mark.parametrize("start", ["<s>", "<s>\n", "", " "])
def test_bos_stands_as_often_as_the_tokenizer_or_the_template_puts_it(form, start):
    tokenizer = byte_tokenizer(form)
    template = Template("custom", start + "{instruction} {input}", start + "{instruction}")
    (ids,) = encode_prompts([record("<s>Hi")], template=template, tokenizer=tokenizer)
    by_itself = form.count("<s>")
    wanted = 1 if start.startswith("<s>") else by_itself
    assert ids.count(tokenizer.bos_token_id) == wanted
    assert ids[:wanted] == (tokenizer.bos_token_id,) * wanted


def test_what_a_template_and_a_record_spell_together_is_text():
    tokenizer = TOKENIZERS["bytes"]
    template = Template("custom", "<{instruction}> {input}", "<{instruction}>")
    (ids,) = encode_prompts([record("s")], template=template, tokenizer=tokenizer)
    assert ids == stock(tokenizer, "<s>", plain=True)
    assert len(ids) > 1


def test_the_anchor_is_made_once_for_many_texts(monkeypatch):
    made = []
    make = loracle.data.literal._with_anchor
    monkeypatch.setattr(
        "loracle.data.literal._with_anchor", lambda one: made.append(1) or make(one)
    )
    texts = [CHAT.parts(record(f"Say </s> {index}")) for index in range(5)]
    assert len(list(encode_texts(texts, tokenizer=TOKENIZERS["spaces"]))) == 5
    assert made == [1]
