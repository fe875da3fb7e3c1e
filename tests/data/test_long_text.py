"""The first tokens of a long text are those of the whole, found without tokenising the whole."""

import contextlib
import random
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_alpaca import byte_tokenizer, data_config, record, write_json
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from loracle.data import Record, prepare_data, template_of
from loracle.data.literal import Part, encode_texts
from loracle.data.long_text import first_ids
from loracle.data.tokens import encode_records, truncate
from loracle.errors import DataError
from loracle.sources import ResolvedSource

CORPUS = [
    "Name three primary colors, 12 of 3456. Red, blue, and yellow; so on and so on. \u4e00\u4e8c"
]
GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Digits in threes from the right: the first depend on the last.
FROM_THE_RIGHT = r"\d{1,3}(?=(?:\d{3})*(?:\D|$))|[^\d]+?(?=\d|\s|$)|\s+"


def trained(model, trainer, pre_tokenizer, normalizer=None):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def bpe(pre_tokenizer, **more):
    special = ["<unk>", "</s>", *pre_tokenizers.ByteLevel.alphabet()]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special[:2], show_progress=False,
                                  initial_alphabet=special[2:])  # fmt: skip
    return trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizer, **more)


def split_by(pattern):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])


def unigram(pre_tokenizer):
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, pre_tokenizer, normalizer=normalizers.NFKC())


def llama_2():
    """One word for its pre-tokenizer, and no token across a space."""
    tokenizer = bpe(pre_tokenizers.Metaspace(prepend_scheme="first", split=True))
    whole = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.backend_tokenizer.pre_tokenizer = whole
    return tokenizer


TOKENIZERS = {
    "llama 2": llama_2(),
    "gpt-2": byte_tokenizer(),
    "gpt-4": bpe(split_by(GPT4)),
    "digits from the right": bpe(split_by(FROM_THE_RIGHT)),
    "one word": bpe(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "words": bpe(pre_tokenizers.Metaspace(prepend_scheme="first", split=True)),
    "unigram": unigram(pre_tokenizers.Metaspace(prepend_scheme="always", split=True)),
    "without a backend": ByT5Tokenizer(),
}
PIECES = ["so on", " ", "  ", "\n", "\n\n", "a", "red", "12", "3456", ", ", ".", "\u4e00\u4e8c",
          "</s>", "e\u0301", "\ufb01", "-", "colors", "?!", "_"]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=12)


@contextlib.contextmanager
def eager():
    """Takes any text for a long one, and small pieces of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loracle.data.literal.LONG_CHARS", 30)
        patch.setattr("loracle.data.long_text._LEAST_CHARS", 1)
        patch.setattr("loracle.data.long_text._CHARS_PER_TOKEN", 4)
        yield


@pytest.mark.parametrize("name", TOKENIZERS)
@given(pieces=TEXT, times=st.integers(1, 20), end=TEXT, most=st.integers(1, 12), ours=st.booleans())
def test_the_first_tokens_are_those_of_the_whole(name, pieces, times, end, most, ours):
    tokenizer = TOKENIZERS[name]
    text = "".join(pieces) * times + "".join(end)
    parts = [Part(text, from_record=ours)]
    (whole,) = encode_texts([parts], tokenizer=tokenizer)
    with eager():
        (first,) = encode_texts([parts], tokenizer=tokenizer, most=most)
    assert first == whole[: len(first)]
    assert len(first) >= min(most, len(whole))


def sizes_of(tokenizer, text, *, most):
    """How many characters were tokenised to find the first ids; None: it must be whole."""
    sizes = []

    def call(piece):
        sizes.append(len(piece))
        return tokenizer(piece, add_special_tokens=False)

    ids = first_ids(text, most=most, call=call, tokenizer=tokenizer)
    return None if ids is None else sum(sizes)


@pytest.mark.parametrize("name", ["gpt-2", "gpt-4", "llama 2", "words", "unigram"])
def test_a_long_text_is_not_tokenised_whole(name):
    draw = random.Random(0)
    text = " ".join(draw.choice(["red", "so", "on", "12,", "colors."]) for _ in range(500_000))
    assert sizes_of(TOKENIZERS[name], text, most=512) < len(text) / 10


@pytest.mark.parametrize("name", ["llama 2", "without a backend", "digits from the right"])
def test_what_may_depend_on_its_end_is_tokenised_whole(name):
    assert sizes_of(TOKENIZERS[name], "1" * 70_000, most=512) is None


def test_a_very_long_record_is_cut_or_left_out_as_it_was(tokenizer):
    alpaca = template_of("alpaca")
    records = [
        record(output="Red, or blue. " * 80, row=1),
        record(context="Blue, or red. " * 80, row=2),
        Record(3, "Name it.", "", "It."),
    ]
    with eager():
        for most in (200, 300, 5000):
            encode = partial(encode_records, records, template=alpaca, tokenizer=tokenizer)
            whole, cut = (
                [truncate(one, max_tokens=most, eos_id=1) for one in encode(most=limit)]
                for limit in (None, most)
            )
            assert whole == cut


def test_the_limits_that_an_error_names_are_those_of_whole_prompts(tmp_path, tokenizer):
    rows = [{"instruction": f"{n} {'red ' * 90}", "input": "", "output": "x"} for n in range(9)]
    source = ResolvedSource(write_json(tmp_path / "a.json", rows), "path:a.json", "")

    def message():
        with pytest.raises(DataError) as caught:
            prepare_data(source, config=data_config(max_tokens=40), tokenizer=tokenizer)
        return str(caught.value)

    whole = message()
    with eager():
        assert message() == whole
