"""Prepares the examples of a run from a source.

The order of events, and why: unusable rows are dropped first (nothing else decides what a record
is), then ``max_records`` are drawn, then the records are split, and only then tokenised. The split
therefore depends on the records, the fraction and the split seed, and not on the model: a record
whose prompt is too long for one tokenizer leaves its part and moves nobody else, so models and
limits are compared on one split, and nothing that is asked twice comes to straddle it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from loracle.config.run import DataConfig
from loracle.data.account import account_of, notices_of, warnings_of
from loracle.data.prompt import template_of
from loracle.data.records import read_source
from loracle.data.rows import Drop
from loracle.data.split import draw_records, split_records
from loracle.data.summary import (
    describe_part,
    describe_recurring,
    describe_repeated,
    fingerprint,
    public_source,
)
from loracle.data.tokens import EncodedRecord, Example, encode_records, eos_id_of, truncate
from loracle.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loracle.sources import ResolvedSource


@dataclass(frozen=True)
class PreparedData:
    """The examples of a run."""

    train: tuple[Example, ...]
    """Examples to learn from, in source order."""
    validation: tuple[Example, ...]
    """Examples held out, in source order."""
    fingerprint: str
    """Equal if and only if a model sees the same data in the same split."""
    report: dict[str, Any]
    """The content of ``data.json``."""
    notices: tuple[str, ...] = ()
    """What a person should be told of it, a line each."""


def prepare_data(
    source: ResolvedSource,
    *,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int] = (),
) -> PreparedData:
    """Returns the examples of the source, split, tokenised and described.

    Args:
        source: Where the records are.
        config: The ``data`` section of a run.
        tokenizer: The model's tokenizer.
        end_ids: What the model ends answers with, as ``FrozenBase.end_ids``; responses end with the
            first. Empty: the tokenizer's EOS.

    Raises:
        DataError: If the records cannot be read or split, or ``max_tokens`` leaves a part empty.
        ModelError: If the tokenizer has no EOS.
    """
    eos_id = eos_id_of(tokenizer, end_ids=end_ids)
    reading = read_source(source.path, columns=config.columns)
    used = draw_records(reading.records, max_records=config.max_records, seed=config.split_seed)
    split = split_records(used, validation_frac=config.validation_frac, seed=config.split_seed)
    template = template_of(config.template)

    def encoded(most: int | None) -> dict[str, list[EncodedRecord]]:
        encode = partial(encode_records, template=template, tokenizer=tokenizer, most=most)
        return {"train": encode(split.train), "validation": encode(split.validation)}

    parts, unfit = _fit_parts(
        encoded(config.max_tokens), max_tokens=config.max_tokens, eos_id=eos_id
    )
    for name, examples in parts.items():
        if not examples:
            raise _nothing_fits(name, encoded=encoded(None), max_tokens=config.max_tokens)

    digits = fingerprint(parts["train"], validation=parts["validation"])
    report = {
        "source": public_source(source.source),
        "revision": source.revision,
        "template": {"name": template.name, "digest": template.digest},
        "max_tokens": config.max_tokens,
        "max_records": config.max_records,
        "split_seed": config.split_seed,
        "validation_frac_asked": config.validation_frac,
        "fingerprint": digits,
        "num_records_read": len(reading.records) + len(reading.drops),
        "num_records_used": len(used),
        **account_of(reading, unfit=unfit, examples=[*parts["train"], *parts["validation"]]),
        "recurring_instructions": describe_recurring(used),
        "repeated_records": describe_repeated(split),
        "validation_frac": len(parts["validation"]) / sum(map(len, parts.values())),
        **{name: describe_part(examples) for name, examples in parts.items()},
    }
    report["warnings"] = warnings_of(report)
    return PreparedData(
        parts["train"], parts["validation"], digits, report, tuple(notices_of(report))
    )


def _fit_parts(
    encoded: Mapping[str, Sequence[EncodedRecord]], *, max_tokens: int, eos_id: int
) -> tuple[dict[str, tuple[Example, ...]], list[Drop]]:
    """Returns the examples of each part within the limit, and the records left out."""
    parts: dict[str, tuple[Example, ...]] = {}
    drops: list[Drop] = []
    for name, members in encoded.items():
        results = [truncate(record, max_tokens=max_tokens, eos_id=eos_id) for record in members]
        parts[name] = tuple(result for result in results if isinstance(result, Example))
        drops += [result for result in results if isinstance(result, Drop)]
    return parts, drops


def _nothing_fits(
    part: str, *, encoded: Mapping[str, Sequence[EncodedRecord]], max_tokens: int
) -> DataError:
    """Returns the error for a part that the limit, or the tokenizer, leaves empty."""
    limits = {
        name: [len(record.prompt) + 2 for record in members if record.prompt and record.response]
        for name, members in encoded.items()
    }
    if not all(limits.values()):
        return DataError(
            f"{part}: the tokenizer finds no tokens in any of its {len(encoded[part])} records"
        )
    # A record needs room for its prompt, one response token and EOS.
    smallest = max(min(needed) for needed in limits.values())
    largest = max(max(needed) for needed in limits.values())
    return DataError(
        f"data.max_tokens: {max_tokens} is below every prompt of the {part} part, template "
        f"included; the smallest limit that would work is {smallest}, and {largest} would keep "
        "every record"
    )
