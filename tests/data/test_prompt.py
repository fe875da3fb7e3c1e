"""Prompts: Stanford's two forms to the character; a record's text is never interpreted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_alpaca import record

from loracle.config.run import TemplateConfig
from loracle.data import template_of

CUSTOM = TemplateConfig(
    with_input="Q: {instruction} | {input}\nA:", without_input="Q: {instruction}\nA:"
)


def test_the_form_with_input_is_stanfords():
    assert template_of("alpaca").render(record("Add.", context="1, 2")) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:"
    )


def test_the_form_without_input_is_stanfords():
    assert template_of("alpaca").render(record("Say hi.")) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nSay hi.\n\n### Response:"
    )


def test_a_custom_template_is_used_as_given():
    template = template_of(CUSTOM)
    assert template.name == "custom"
    assert template.render(record("Add.", context="1, 2")) == "Q: Add. | 1, 2\nA:"
    assert template.render(record("Say hi.")) == "Q: Say hi.\nA:"


@pytest.mark.parametrize(
    "text", ["{input}", "{instruction}", "{0}", "{", "}}", "{x!r:>{y}}", r"\1"]
)
def test_braces_in_a_record_are_plain_text(text):
    assert template_of(CUSTOM).render(record(text, context="42")) == f"Q: {text} | 42\nA:"
    assert template_of(CUSTOM).render(record("Say", context=text)) == f"Q: Say | {text}\nA:"


def test_other_braces_of_a_template_are_plain_text():
    config = TemplateConfig(
        with_input="{'a': {instruction}, {input}} {{", without_input="{{instruction}} {json}"
    )
    template = template_of(config)
    assert template.render(record("I", context="X")) == "{'a': I, X} {{"
    assert template.render(record("I")) == "{I} {json}"


TEXT = st.text(alphabet=st.sampled_from("{}inputsrco %\\\n")).filter(str.strip) | st.sampled_from(
    ["{input}", "{instruction}", "a{input}b{instruction}c"]
)


@given(instruction=TEXT, context=TEXT)
def test_rendering_is_concatenation_whatever_the_record_says(instruction, context):
    rendered = template_of(CUSTOM).render(record(instruction, context=context))
    assert rendered == "Q: " + instruction + " | " + context + "\nA:"


def test_a_digest_is_equal_for_equal_templates_only():
    changed = CUSTOM.model_copy(update={"without_input": "Q: {instruction}\nA: "})
    digests = {template_of(one).digest for one in ("alpaca", CUSTOM, changed)}
    assert len(digests) == 3
    assert template_of(CUSTOM).digest == template_of(CUSTOM.model_copy()).digest
