"""The tokenizer of a GGUF file: what cuts a text before tokens are merged, and what is added to it.

A file names the rule that cuts texts; a wrong one gives the same characters other tokens, without
any error. So a rule is applied if it is known for certain, and refused by its name otherwise.
Sources: ggml-org/llama.cpp src/llama-vocab.cpp for the rules behind the names, and each family's
own tokenizer.json for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Every digit alone, then GPT-2's rule.
_DIGITS_FIRST = frozenset({"smollm", "refact", "starcoder"})
_AS_GPT2 = frozenset({"gpt-2", "phi-2"})
# A word of the vocabulary is one token whatever the merges say, and a text begins with BOS.
_WHOLE_WORDS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "tekken"}
)
_QWEN = frozenset({"qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "qwen35"})
# In this form Transformers cuts by the family's own rule.
_BY_TRANSFORMERS = _WHOLE_WORDS | _QWEN | {"dbrx", "smaug-bpe", "gpt-4o", "llama4", "minimax-m2"}

_KEYS = frozenset(
    f"tokenizer.ggml.{key}"
    for key in (
        *("model", "pre", "tokens", "scores", "token_type", "merges", "add_space_prefix"),
        *("add_bos_token", "add_eos_token", "add_sep_token", "token_type_count"),
        # Refused above where it is true.
        "remove_extra_whitespaces",
    )
)


def unknown_tokenizer(fields: Mapping[str, Any]) -> str | None:
    """Returns what of a file's tokenizer is not understood, as ``key = value``; None if nothing."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    known: frozenset[str | None]
    if kind == "llama":
        known = frozenset({None, "default"})
    elif kind == "gpt2":
        known = _DIGITS_FIRST | _AS_GPT2 | _BY_TRANSFORMERS
        # A file from before the key is cut by the rule that the architecture began with.
        known |= {None} if fields.get("general.architecture") == "gpt2" else set()
    else:
        return f"tokenizer.ggml.model = {kind}"
    if pre not in known:
        return f"tokenizer.ggml.pre = {pre}" if pre else "no tokenizer.ggml.pre"
    if fields.get("tokenizer.ggml.remove_extra_whitespaces"):
        return "tokenizer.ggml.remove_extra_whitespaces = True"
    ids = ("_token_id", "_token_ids")
    return next(
        (
            key
            for key in fields
            if key.startswith("tokenizer.ggml.") and key not in _KEYS and not key.endswith(ids)
        ),
        None,
    )


def apply_tokenizer(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Gives a converted tokenizer what Transformers does not read from the file.

    With ``smollm`` and without its rule, a line break before a number becomes other tokens: on
    answers with numbered lists the untuned SmolLM2-135M gives 0.356 nats per character with it,
    0.371 without (measured, 24 records).
    """
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    backend, pre = tokenizer.backend_tokenizer, fields.get("tokenizer.ggml.pre")
    if pre in _DIGITS_FIRST:
        backend.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    if pre in _WHOLE_WORDS:
        backend.model.ignore_merges = True
        tokenizer.add_bos_token = fields.get("tokenizer.ggml.add_bos_token", True)
        tokenizer.update_post_processor()
    if pre == "qwen2":
        backend.normalizer = NFC()


def unapplied_tokenizer(tokenizer: Any, fields: Mapping[str, Any]) -> list[str]:
    """Returns what the file says of the ends of a text and the converted tokenizer does not do."""
    spaced = fields.get("tokenizer.ggml.model") == "llama"
    begins = spaced or fields.get("tokenizer.ggml.pre") in _WHOLE_WORDS
    text = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    has = {
        "add_bos_token": text[:1] == [tokenizer.bos_token_id] != bare[:1],
        "add_eos_token": text[-1:] == [tokenizer.eos_token_id] != bare[-1:],
        "add_space_prefix": tokenizer.convert_ids_to_tokens(bare)[0].startswith("▁"),
    }
    wanted = {"add_bos_token": begins, "add_eos_token": False, "add_space_prefix": spaced}
    if not spaced:
        del wanted["add_space_prefix"]
    stated = {key: fields.get(f"tokenizer.ggml.{key}", value) for key, value in wanted.items()}
    return [
        f"tokenizer.ggml.{key} = {bool(value)}"
        for key, value in stated.items()
        if bool(value) != has[key]
    ]
