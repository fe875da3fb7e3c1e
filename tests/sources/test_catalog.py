from __future__ import annotations

import pytest

from loracle.config.files import load_config, validate
from loracle.config.run import Config
from loracle.errors import ConfigError
from loracle.sources import catalog, model_architecture, resolve_data, resolve_model
from loracle.sources.catalog import Catalog
from loracle.sources.spec import PypiSource, parse_source

# The counts that the models' owners and PEFT's own printout give.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "qwen2.5-0.5b": 494_032_768,
    "llama-3.2-1b": 1_235_814_400,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
}


def test_every_model_has_a_published_count():
    assert set(catalog().models) == set(PARAMETERS)


@pytest.mark.parametrize("key", PARAMETERS)
def test_a_key_counts_every_parameter_without_network_or_weights(key, offline, cache):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    offline()
    config = AutoConfig.for_model(**model_architecture(key))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[key]
    assert type(model).__name__ == config.architectures[0]
    assert not cache.exists()


@pytest.mark.parametrize("key", PARAMETERS)
def test_transformers_reads_every_field_of_an_architecture(key):
    from transformers import AutoConfig

    given = model_architecture(key)
    defaults = AutoConfig.for_model(given["model_type"]).to_dict()
    read = AutoConfig.for_model(**given).to_dict()
    assert {name: read[name] for name in given} == given
    assert set(given) - set(defaults) == set()


def test_the_defaults_of_a_run_are_keys_that_work_wherever_pip_works():
    config: Config = load_config()
    entries = catalog()
    model, data = entries.models[config.model], entries.data[config.data.source]
    assert isinstance(parse_source(model.source), PypiSource)
    assert isinstance(parse_source(data.source), PypiSource)


def test_an_architecture_is_a_copy(offline):
    offline()
    model_architecture("llama-2-7b")["hidden_size"] = 1
    assert model_architecture("llama-2-7b")["hidden_size"] == 4096


def test_a_source_that_a_key_names_answers_like_the_key(offline):
    offline()
    source = catalog().models["smollm2-135m"].source
    assert model_architecture(source) == model_architecture("smollm2-135m")


@pytest.mark.parametrize(
    ("resolve", "text", "says"),
    [
        (resolve_model, "llama2-7b", "did you mean 'llama-2-7b'?"),
        (model_architecture, "smolm2-135m", "did you mean 'smollm2-135m'?"),
        (resolve_model, "alpaca", "'alpaca' names data"),
        (resolve_data, "llama-2-7b", "'llama-2-7b' names a model"),
        (resolve_data, "alpaca_demo", "did you mean 'alpaca-demo'?"),
        (resolve_model, "meta-llama/Llama-2-7b-hf", "'hub:meta-llama/Llama-2-7b-hf'"),
        (resolve_data, "./data.json", "did you mean 'path:./data.json'?"),
        (resolve_data, "zzz", "(there are alpaca-demo, alpaca, alpaca-cleaned)"),
    ],
)
def test_an_unknown_name_lists_the_keys_and_the_nearest(fails, resolve, text, says):
    message = fails(resolve, text)
    assert says in message
    assert f"'{text}'" in message


def test_a_catalog_reports_every_fault_at_once():
    tree = {
        "models": {
            "a": {"source": "hub:a/b", "dtype": "int8", "architecture": {}},
            "b": {
                "source": "pypi:a==1/x",
                "dtype": "float32",
                "architecture": {"model_type": "llama"},
                "profiles": {"t4": {"micro_batch_tokens": 0}},
            },
        },
        "data": {"d": {"source": "hub:a/b", "columns": 1}},
    }
    with pytest.raises(ConfigError) as caught:
        validate(Catalog, tree, origin="model_configs.yaml")
    message = str(caught.value)
    assert message.startswith("model_configs.yaml: models.a.dtype: ")
    for fault in (
        "models.a.architecture: must name its model_type",
        "models.b.source: source 'pypi:a==1/x': a pypi: source must be pinned",
        "models.b.profiles.t4.micro_batch_tokens",
        "data.d.columns",
    ):
        assert fault in message
    assert "\n" not in message
