"""The command: words in, text and exit codes out."""

import errno
import re
import socket
import subprocess
import sys
from functools import partial

import pytest
import typer

from loracle import __version__
from loracle.cli.main import run
from loracle.config.files import load_config
from loracle.errors import Interrupted, RunFailed, UsageError
from runs_fixture import contents, settings


def test_version(place):
    outcome = place.loracle("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{__version__}\n", "")


def test_the_command_starts_without_loading_what_it_does_not_need(place):
    """Only what parses and prints: a mistyped key is told at once, not after seconds."""
    heavy = ("torch", "transformers", "peft", "datasets", "wandb", "sacrebleu")
    code = f"import loracle.cli.main, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_words_it_lists_its_verbs(place):
    outcome = place.loracle()
    assert outcome.code == 2
    for verb in ("baseline", "config", "placements", "sample", "doctor"):
        assert re.search(rf"\b{verb}\b", outcome.out + outcome.err)


def test_a_printed_config_reads_back_as_the_same_config(place, tmp_path):
    words = settings(train__max_steps=7, lora__placement="{modules: [q_proj], layers: [1]}")
    outcome = place.loracle("config", "demo", *words)
    assert (outcome.code, outcome.err) == (0, "")
    (tmp_path / "printed.yaml").write_text(outcome.out)
    config = load_config(tmp_path / "printed.yaml")
    assert config == load_config("demo", overrides=words[1::2])
    assert (config.train.max_steps, config.lora.rank) == (7, 16)


def test_a_printed_config_names_every_field(place):
    from loracle.config.run import flatten

    printed = place.loracle("config").out
    for key in flatten(load_config().model_dump()):
        assert re.search(rf"^ *{key.rpartition('.')[2]}:", printed, re.MULTILINE), key


@pytest.mark.parametrize(
    "words",
    [
        ["report"],
        ["sample", "~nobody-of-this-name/x", "Hi"],
        ["baseline", "--out"],
        ["study", "placement_study", "--out"],
        ["config"],
    ],
)
def test_a_folder_of_a_home_that_is_not_there(place, words):
    words = words if "Hi" in words else [*words, "~nobody-of-this-name/x"]
    outcome = place.loracle(*words)
    assert outcome.code == 2
    assert outcome.line == "ConfigError: '~nobody-of-this-name/x': no such home folder"


def test_a_tilde_is_the_home_folder(place, finished):
    run = "~/work/finished/first"
    assert place.loracle("report", run).code == 0
    outcome = place.loracle("baseline", "~/work/tiny.yaml", f"--out={run}")
    held = f"RunFolderError: {finished}: holds a finished run, which is never overwritten"
    assert outcome.line == held
    assert not (place.work / "~").exists()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_placements_of_a_local_model(place, no_network):
    outcome = place.loracle("placements", f"path:{place.model}", "--rank", 4)
    assert (outcome.code, outcome.err) == (0, "")
    assert "counted here at rank 4" in outcome.out
    # 3 layers, rank 4: 4 x (64 + 48 + 48 + 64 + 96 + 96 + 96) each.
    assert re.search(r"all-linear +21 +6,144 ", outcome.out)
    assert "down_proj" in outcome.out


def test_placements_of_a_known_model_need_no_network(place, no_network):
    outcome = place.loracle("placements", "llama-2-7b")
    assert (outcome.code, outcome.err) == (0, "")
    assert "llama-2-7b: 6,738,415,616 parameters, 32 layers" in outcome.out
    for count in ("39,976,960", "8,388,608", "16,777,216", "23,199,744"):
        assert count in outcome.out


def test_a_run_without_a_name_gets_one_from_its_config_and_the_time(place, monkeypatch, tmp_path):
    from loracle.cli import main as cli

    monkeypatch.setattr(cli, "RUNS", tmp_path / "runs")
    outcome = place.baseline(
        train__max_steps=2, eval__generate_examples=0, measure__latency_trials=0
    )
    assert outcome.code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", folder.name)
    assert outcome.out.splitlines()[-1] == f"Recorded in {folder}"


def test_progress_goes_to_standard_error_and_the_table_to_standard_output(place, tmp_path):
    outcome = place.baseline("--out", tmp_path / "run", train__max_steps=3)
    assert outcome.code == 0
    assert "train: 3/3  done in " in outcome.err
    assert "step 0: validation loss " in outcome.err
    assert "Success criteria" not in outcome.err
    assert "Success criteria" in outcome.out
    # One line per thing that happens, however narrow the place.
    assert all(re.match(r"(path|step|train|validate|answer|latency|audit)", line)
               for line in outcome.err.splitlines())  # fmt: skip


def test_a_word_that_is_no_option_is_a_usage_error(place, tmp_path):
    outcome = place.loracle("baseline", "--lout", "x")
    assert outcome.code == 2
    assert "--lout" in outcome.err
    outcome = place.loracle("baselin")
    assert outcome.code == 2
    assert "baselin" in outcome.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("a [b]c[/b]"), 2),
        (RunFailed("a [b]c[/b]"), 1),
        (Interrupted("a [b]c[/b]"), 130),
    ],
)
def test_an_error_is_one_line_as_it_was_written_and_its_exit_code(capsys, error, code):
    def command(**_options):
        raise error

    assert run(command) == code
    assert capsys.readouterr().err == f"{type(error).__name__}: a [b]c[/b]\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, typer.Abort])
def test_a_break_outside_a_run_is_130_without_a_traceback(capsys, error):
    def command(**_options):
        raise error

    assert run(command) == 130
    assert capsys.readouterr().err == ""


def test_a_fault_of_our_own_is_not_hidden(capsys):
    def command(**_options):
        raise ZeroDivisionError

    assert run(command) == 1
    assert capsys.readouterr().err == (
        "UnexpectedError: ZeroDivisionError (loracle --debug ... shows where)\n"
    )


def test_sampling_and_the_rest_leave_a_finished_run_as_it_is(place, finished):
    untouched = contents(finished)
    assert place.loracle("sample", finished, "Name a color.", "--max-new-tokens", 2).code == 0
    assert place.loracle("config", finished / "config.yaml").code == 0
    assert contents(finished) == untouched


def test_run_returns_zero_for_a_command_that_returns_nothing():
    assert run(partial(lambda standalone_mode: None)) == 0
