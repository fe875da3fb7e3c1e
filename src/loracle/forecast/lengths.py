"""How long the examples of a run are, as far as that is known before anything is loaded."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from loracle.config.run import Config
from loracle.errors import UsageError
from loracle.sources.catalog import catalog


@dataclass(frozen=True)
class Lengths:
    """Of the examples of a data source."""

    prompt_tokens: float
    """Per example, on average."""
    response_tokens: float
    """Per example, on average, EOS included."""
    num_records: int
    """Used, training and validation together."""
    basis: str
    """Where that is from, for a person."""

    @property
    def tokens(self) -> float:
        """Per example, on average."""
        return self.prompt_tokens + self.response_tokens

    def num_validation(self, config: Config) -> int:
        """Returns how many examples a validation scores."""
        held_out = round(self.num_records * config.data.validation_frac)
        return min(held_out, config.eval.max_examples or held_out)

    def num_train(self, config: Config) -> int:
        """Returns how many examples are trained on in an epoch."""
        return self.num_records - round(self.num_records * config.data.validation_frac)

    def example(self) -> tuple[int, int]:
        """Returns prompt and response tokens of an example of average length."""
        return max(1, round(self.prompt_tokens)), max(1, round(self.response_tokens))


def lengths_of(config: Config) -> Lengths:
    """Returns the lengths of the data of a run: measured before, or counted in characters.

    A source without a key on a model hub is not fetched for this: the lengths of Alpaca are taken,
    and said to be.

    Raises:
        UsageError: If a local source cannot be read.
    """
    entries = catalog().data
    known = entries.get(config.data.source)
    if known is None and config.data.source.startswith("hub:"):
        known = next((e for e in entries.values() if e.source == config.data.source), None)
        if known is None:
            return _kept(entries["alpaca"].shape, config, basis="assumed to be Alpaca's")
    if known is not None:
        return _kept(known.shape, config, basis=known.shape.basis)

    shape = data_shape(config)
    held_out = shape.num_validation
    return Lengths(
        prompt_tokens=shape.tokens - shape.targets,
        response_tokens=shape.targets,
        num_records=round(held_out / config.data.validation_frac),
        basis="counted in characters, four to a token",
    )


def _kept(shape: object, config: Config, *, basis: str) -> Lengths:
    from loracle.sources.catalog import DataShapeEntry

    assert isinstance(shape, DataShapeEntry)
    used = min(shape.records, config.data.max_records or shape.records)
    if used * config.data.validation_frac < 1:
        raise UsageError(f"data.max_records: {used} records leave none to validate on")
    return Lengths(shape.prompt_tokens, shape.response_tokens, used, basis)


def usual_batch(lengths: Lengths, config: Config) -> list[tuple[int, int]]:
    """Returns prompt and response tokens of a batch whose examples are all of average length."""
    return [lengths.example()] * config.train.batch_size


def full_pass(lengths: Lengths, *, budget: int, most: int, longest: int) -> list[tuple[int, int]]:
    """Returns a pass that fills its budget with examples of average length.

    Args:
        lengths: Of the data.
        budget: Tokens per pass.
        most: Examples that there are at most.
        longest: Tokens that an example has at most; it may have a pass to itself.
    """
    prompt, response = lengths.example()
    most_tokens = min(max(budget, longest), most * longest)
    count = min(most, max(1, most_tokens // (prompt + response)))
    left = most_tokens - count * (prompt + response)
    # What is over goes to the responses, none longer than it may be.
    room = longest - prompt - response
    batch = []
    for index in range(count):
        more = min(room, -(-left // (count - index)))
        left -= more
        batch.append((prompt, response + more))
    return batch


# source: common for byte-pair tokenizers on English text; the demo has 4.4
_CHARS_PER_TOKEN = 4.0


_SAMPLED_RECORDS = 500


@dataclass(frozen=True)
class DataShape:
    """What of the data decides how long things take."""

    tokens: float
    """Per example, prompt and response, on average."""
    targets: float
    """Per example, of the response."""
    num_validation: int
    """Examples scored in a validation."""


def data_shape(config: Config) -> DataShape:
    """Returns the lengths of the examples by their characters; no tokenizer is needed.

    Raises:
        UsageError: If the source cannot be read.
    """
    from loracle.data.prompt import template_of
    from loracle.data.records import read_records
    from loracle.sources import resolve_data

    data = config.data
    records, _ = read_records(resolve_data(data.source).path, columns=data.columns)
    template = template_of(data.template)
    sampled = records[:_SAMPLED_RECORDS]
    targets = [len(record.output) / _CHARS_PER_TOKEN + 1 for record in sampled]
    prompts = [len(template.render(record)) / _CHARS_PER_TOKEN for record in sampled]
    both = zip(prompts, targets, strict=True)
    used = min(len(records), data.max_records or len(records))
    return DataShape(
        tokens=statistics.fmean(min(data.max_tokens, prompt + target) for prompt, target in both),
        targets=statistics.fmean(min(data.max_tokens, target) for target in targets),
        num_validation=min(round(used * data.validation_frac), config.eval.max_examples or used),
    )
