"""Fixtures of the tests of ``loracle.data``."""

import pytest
from tiny_alpaca import byte_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Adds nothing by itself, and pads with EOS, as SmolLM2 does."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Adds BOS, as Llama does."""
    return byte_tokenizer("<s> $A")
