"""Lengths of a run's examples, before a tokenizer is loaded."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from loracle.config.run import Config
from loracle.errors import UsageError
from loracle.sources.catalog import DataShapeEntry, catalog

# source: common for byte-pair tokenizers on English text; the demo has 4.4
_CHARS_PER_TOKEN = 4.0
_SAMPLED_RECORDS = 500


@dataclass(frozen=True)
class Lengths:
    """Lengths of the examples of a data source."""

    prompt_tokens: float
    """Mean per example."""
    response_tokens: float
    """Mean per example, EOS included."""
    num_records: int
    """Records used, training and validation together."""
    basis: str
    """Where the lengths are from, in words."""

    @property
    def tokens(self) -> float:
        """Mean per example, prompt and response."""
        return self.prompt_tokens + self.response_tokens

    def num_validation(self, config: Config) -> int:
        """Returns the number of examples that a validation scores."""
        held_out = round(self.num_records * config.data.validation_frac)
        return min(held_out, config.eval.max_examples or held_out)

    def num_train(self, config: Config) -> int:
        """Returns the number of examples in an epoch."""
        return self.num_records - round(self.num_records * config.data.validation_frac)

    def example(self) -> tuple[int, int]:
        """Returns prompt and response tokens of an example of average length."""
        return max(1, round(self.prompt_tokens)), max(1, round(self.response_tokens))


def lengths_of(config: Config) -> Lengths:
    """Returns the lengths of a run's data: the catalogue's, or estimated from characters.

    An unlisted source on a model hub is not fetched: Alpaca's lengths are assumed, and ``basis``
    says that.

    Raises:
        UsageError: If a local source cannot be read, or too few records are used.
    """
    entries, source = catalog().data, config.data.source
    entry = entries.get(source) or next((e for e in entries.values() if e.source == source), None)
    if entry is not None:
        lengths = _listed(entry.shape, basis=entry.shape.basis)
    elif source.startswith("hub:"):
        lengths = _listed(entries["alpaca"].shape, basis="assumed to be Alpaca's")
    else:
        lengths = _estimated(config)
    used = min(lengths.num_records, config.data.max_records or lengths.num_records)
    if used * config.data.validation_frac < 1:
        raise UsageError(f"data.max_records: {used} records leave none to validate on")
    return replace(_cut(lengths, most=config.data.max_tokens), num_records=used)


def _cut(lengths: Lengths, *, most: int) -> Lengths:
    """Returns the lengths of examples of at most so many tokens, of which the prompt keeps one."""
    response = min(most - 1.0, lengths.response_tokens)
    prompt = min(most - response, lengths.prompt_tokens)
    return replace(lengths, prompt_tokens=prompt, response_tokens=response)


def _listed(shape: DataShapeEntry, *, basis: str) -> Lengths:
    return Lengths(shape.prompt_tokens, shape.response_tokens, shape.records, basis)


def _estimated(config: Config) -> Lengths:
    """Returns lengths estimated from the characters of a source's first records."""
    from loracle.data.prompt import template_of
    from loracle.data.records import read_records
    from loracle.sources import resolve_data

    data = config.data
    records, _ = read_records(resolve_data(data.source).path, columns=data.columns)
    template = template_of(data.template)
    prompts, responses = [], []
    for record in records[:_SAMPLED_RECORDS]:
        response = len(record.output) / _CHARS_PER_TOKEN + 1
        prompt = len(template.render(record)) / _CHARS_PER_TOKEN
        responses.append(min(data.max_tokens, response))
        prompts.append(min(data.max_tokens, prompt + response) - responses[-1])
    return Lengths(
        prompt_tokens=statistics.fmean(prompts),
        response_tokens=statistics.fmean(responses),
        num_records=len(records),
        basis="counted in characters, four to a token",
    )


def usual_batch(lengths: Lengths, config: Config) -> list[tuple[int, int]]:
    """Returns (prompt, response) tokens of a batch of examples of average length."""
    return [lengths.example()] * config.train.batch_size


def full_pass(lengths: Lengths, *, budget: int, most: int, longest: int) -> list[tuple[int, int]]:
    """Returns (prompt, response) tokens of a pass that fills its budget.

    Args:
        lengths: Lengths of the data.
        budget: Tokens per pass.
        most: Largest number of examples.
        longest: Largest number of tokens of an example, which may take a pass of its own.
    """
    prompt, response = lengths.example()
    most_tokens = min(max(budget, longest), most * longest)
    count = min(most, max(1, most_tokens // (prompt + response)))
    left = most_tokens - count * (prompt + response)
    # The remainder lengthens the responses, each up to the limit.
    room = longest - prompt - response
    batch = []
    for index in range(count):
        more = min(room, -(-left // (count - index)))
        left -= more
        batch.append((prompt, response + more))
    return batch
