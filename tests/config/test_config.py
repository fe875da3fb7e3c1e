"""The config is strict and frozen, has one table of defaults, and a digest of what it computes."""

import re
from dataclasses import dataclass

import pytest
from pydantic import BaseModel, ValidationError

from loracle.config.files import load_config, read_yaml, shipped_config
from loracle.config.run import Config, config_digest, difference, flatten, identity
from loracle.errors import ConfigError

BASE = load_config()


def fields_of(model: type[BaseModel], *, prefix: str = "") -> set[str]:
    """The dotted name of every field that is not a section."""
    found = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= fields_of(kind, prefix=f"{prefix}{name}.")
        else:
            found.add(prefix + name)
    return found


def test_the_base_config_is_the_one_table_of_defaults():
    table = flatten(read_yaml(shipped_config("base_config")))
    assert set(table) == fields_of(Config)
    assert len(table) > 40


def test_only_what_is_not_written_when_it_is_off_has_a_default():
    def with_default(model: type[BaseModel]) -> list[str]:
        found = [
            name
            for name, field in model.model_fields.items()
            if not field.is_required()
            and not (field.exclude_if and field.exclude_if(field.get_default()))
        ]
        for field in model.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found += with_default(field.annotation)
        return found

    assert with_default(Config) == []


def test_every_field_is_described():
    def undescribed(model: type[BaseModel]) -> list[str]:
        found = [name for name, field in model.model_fields.items() if not field.description]
        for field in model.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found += undescribed(field.annotation)
        return found

    assert undescribed(Config) == []


def test_the_base_config_is_the_standard_baseline():
    assert BASE.lora.placement == "all-linear"
    assert (BASE.lora.rank, BASE.lora.alpha, BASE.lora.dropout) == (16, 32.0, 0.1)
    assert (BASE.train.max_steps, BASE.train.batch_size) == (1000, 8)
    assert BASE.data.max_tokens == 512
    assert BASE.data.validation_frac == 0.2
    assert BASE.data.template == "alpaca"
    assert (BASE.train.schedule, BASE.train.warmup_frac) == ("cosine", 0.03)
    assert (BASE.train.learning_rate, BASE.train.weight_decay) == (3e-4, 0.0)
    assert (BASE.train.beta1, BASE.train.beta2, BASE.train.epsilon) == (0.9, 0.999, 1e-8)


def test_it_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        BASE.train.max_steps = 5


def test_numbers_are_not_read_from_words():
    tree = BASE.model_dump()
    for key, value in (("max_steps", "5"), ("max_steps", 5.0), ("batch_size", True)):
        with pytest.raises(ValidationError, match=key):
            Config.model_validate({**tree, "train": {**tree["train"], key: value}})


@dataclass(frozen=True)
class Change:
    key: str
    value: str


SAME_RUN = [
    Change("checkpoint.every_steps", "7"),
    Change("checkpoint.keep", "9"),
    Change("measure.clock_rounds", "3"),
    Change("tracking.mode", "offline"),
    Change("tracking.project", "elsewhere"),
]
OTHERS = {
    "model": "path:x",
    "seed": "1",
    "dtype": "float32",
    "device": "cpu",
    "quantization": "nf4",
    "deterministic": "true",
    "train.gradient_checkpointing": "true",
    "data.source": "path:y",
    "data.columns.instruction": "a",
    "data.columns.input": "null",
    "data.columns.output": "b",
    "data.template": "{with_input: '{instruction} {input}', without_input: '{instruction}'}",
    "data.max_records": "9",
    "lora.placement": "attention",
    "train.schedule": "linear",
    "train.max_grad_norm": "null",
    "train.trunk": "off",
    "eval.bleu_tokenize": "zh",
    "eval.max_examples": "3",
}


def test_off_is_a_word_and_false_is_not():
    assert load_config(overrides=["train.trunk=off"]).train.trunk == "off"
    assert load_config(overrides=["train.trunk='off'"]).train.trunk == "off"
    with pytest.raises(ConfigError, match=r"train\.trunk"):
        load_config(overrides=["train.trunk=on"])
    with pytest.raises(ConfigError, match=r"train\.trunk"):
        load_config(overrides=["train.trunk=false"])


@pytest.mark.parametrize(("steps", "every"), [(1, 0), (1, 5), (5, 5), (6, 5), (7, 1), (9, 4)])
def test_validations_are_counted_without_counting_steps(steps, every):
    config = load_config(overrides=[f"train.max_steps={steps}", f"eval.every_steps={every}"])
    assert config.num_validations == sum(map(config.validates_at, range(1, steps + 1)))


@pytest.mark.parametrize("change", SAME_RUN, ids=lambda change: change.key)
def test_how_a_run_is_kept_and_watched_is_not_in_its_digest(change):
    other = load_config(overrides=[f"{change.key}={change.value}"])
    assert other != BASE
    assert config_digest(other) == config_digest(BASE)
    assert difference(BASE, other) == []


def test_every_other_field_is():
    digests = {config_digest(BASE)}
    kept = {change.key for change in SAME_RUN}
    unwritten = {
        "quantization": None,
        "deterministic": None,
        "train.gradient_checkpointing": False,
        "eval.bleu_tokenize": "auto",
    }
    for key, value in (flatten(BASE.model_dump()) | unwritten).items():
        if key in kept:
            continue
        changed = OTHERS.get(key) or (value / 2 or 0.5 if isinstance(value, float) else value + 1)
        other = load_config(overrides=[f"{key}={changed}"])
        assert config_digest(other) not in digests, key
        digests.add(config_digest(other))
        assert all(line.startswith(key) for line in difference(BASE, other)), key
        assert difference(BASE, other), key
    assert len(digests) == 1 + len(fields_of(Config)) - len(kept)


def test_a_digest_is_twelve_hex_digits_of_the_value_and_not_its_spelling():
    assert re.fullmatch(r"[0-9a-f]{12}", config_digest(BASE))
    spelled = load_config(overrides=["train.learning_rate=3e-4", "lora.alpha=32.0"])
    assert config_digest(spelled) == config_digest(BASE)


def test_the_difference_says_what_was_and_what_is():
    other = load_config(overrides=["seed=3", "lora.rank=8"])
    assert difference(BASE, other) == ["lora.rank: 16 -> 8", "seed: 0 -> 3"]


def test_flatten_joins_keys_with_dots():
    assert flatten({"a": {"b": {"c": 1}}, "d": [1, 2]}) == {"a.b.c": 1, "d": [1, 2]}
    not_there = {"checkpoint", "tracking", "quantization", "deterministic"}
    assert set(identity(BASE)) == set(Config.model_fields) - not_there
