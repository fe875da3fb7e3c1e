"""Two answers to one instruction: the untuned model's and the tuned one's."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loracle.data import Record
from loracle.data.prompt import ALPACA
from loracle.runner.sample import sample_run
from runs_fixture import copied, rows


def stock_answer(model, tokenizer, prompt, *, max_new_tokens):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# PEFT asks Transformers for an attribute that Transformers has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_answers_are_those_of_the_stock_model_and_of_stock_peft(place, finished):
    """Greedy in both, so the texts are the same to the character."""
    from peft import PeftModel

    with place.entered():
        given = sample_run(finished, instruction="Name river 3.", input_text="The Nile.")
    prompt = ALPACA.render(Record(0, "Name river 3.", "The Nile.", ""))
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    base = AutoModelForCausalLM.from_pretrained(place.model)
    assert given.prompt == prompt
    assert given.base.text == stock_answer(base, tokenizer, prompt, max_new_tokens=8)
    tuned = PeftModel.from_pretrained(base, str(finished / "adapter"))
    assert given.tuned.text == stock_answer(tuned, tokenizer, prompt, max_new_tokens=8)
    assert given.base.text != given.tuned.text


def test_an_instruction_of_the_validation_set_gets_the_answers_that_were_recorded(place, finished):
    row = rows(finished / "examples.jsonl")[0]
    with place.entered():
        given = sample_run(finished, instruction=row["instruction"], input_text=row["input"])
    assert (given.base.text, given.tuned.text) == (row["base_generated"], row["generated"])
    assert (given.base.hit_limit, given.tuned.hit_limit) == (
        row["base_hit_limit"],
        row["hit_limit"],
    )


def test_the_command_shows_both_answers_side_by_side(place, finished):
    outcome = place.loracle("sample", finished, "Name river 3.", "--max-new-tokens", 3)
    assert (outcome.code, outcome.err) == (0, "")
    header = outcome.out.splitlines()[1]
    assert header.index("untuned") < header.index("tuned", header.index("untuned") + 7)
    with place.entered():
        given = sample_run(finished, instruction="Name river 3.", max_new_tokens=3)
    assert given.base.hit_limit
    assert "[cut at the token limit]" in outcome.out


def test_text_that_looks_like_markup_is_shown_as_it_is(capsys):
    from rich.console import Console

    from loracle.engine.answers import Answer
    from loracle.report.terminal.answers import answers_view
    from loracle.runner.sample import Answers

    view = answers_view(Answers("", Answer("[bold]x[/bold] [/oops]", False), Answer(" ", False)))
    Console(width=80).print(view)
    out = capsys.readouterr().out
    assert "[bold]x[/bold] [/oops]" in out
    assert "(empty)" in out


def test_a_folder_without_a_run_is_one_line(place):
    outcome = place.loracle("sample", "nowhere", "Say hi.")
    assert outcome.code == 2
    assert outcome.line.startswith("RunFolderError: nowhere: no run here")


def test_a_run_without_an_adapter_says_how_to_get_one(place, finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    outcome = place.loracle("sample", run, "Say hi.")
    assert outcome.code == 2
    assert outcome.line == (
        f"RunFolderError: {run}: has no adapter yet; finish the run with --resume"
    )


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_an_adapter_of_another_plan_is_refused(place, finished, tmp_path, change):
    from safetensors.torch import load_file, save_file

    run = copied(finished, tmp_path / "run")
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    tensors[f"{first}.more"] = tensors[first].clone()
    if change == "missing":
        del tensors[first], tensors[f"{first}.more"]
    save_file(tensors, path)
    # Nothing vouches for the adapter of an older run that never finished.
    for name in ("manifest.json", "result.json"):
        (run / name).unlink()
    outcome = place.loracle("sample", run, "Say hi.")
    assert outcome.code == 2
    assert outcome.line.startswith(
        "ModelError: adapter_model.safetensors: 1 tensors are not the plan's, first "
    )
