"""The command line: parses arguments, calls one function, prints its result."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from loracle.cli.ending import run, show_tracebacks
from loracle.cli.parameters import (
    ConfigArgument,
    FitOption,
    FolderArgument,
    MarkdownOption,
    ResumeOption,
    RunArgument,
    RunOption,
    SetOption,
    StudyOption,
    Words,
)
from loracle.cli.streams import fill_closed_descriptors
from loracle.config.files import find_config, load_config
from loracle.engine.small_machine import fit_machine
from loracle.errors import ConfigError, RunFolderError
from loracle.screen import screen
from loracle.version import __version__

app = typer.Typer(
    cls=Words,
    name="loracle",
    help="Where should LoRA adapters go? Compares placements under equal conditions.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

RUNS = Path("runs")


def main() -> None:
    """Runs the command line and exits with its code."""
    fill_closed_descriptors()
    for notice in fit_machine(lambda: _cache() / "tmp"):
        _notify(notice)
    sys.exit(run(app))


def _notify(line: str) -> None:
    screen(stderr=True, soft_wrap=True).print(line)


def _cache() -> Path:
    from loracle.sources.cache import cache_folder

    return cache_folder()


@app.callback(invoke_without_command=True)
def _global_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, before its line.")
    ] = False,
) -> None:
    show_tracebacks(debug)
    if version:
        print(__version__)
        raise typer.Exit


def _fitted(
    config: str, overrides: list[str] | None, *, fit: bool
) -> tuple[list[str], Mapping[str, Any]]:
    """Returns the overrides, with ``fit`` also those that fit the device, and notes on them."""
    given = list(overrides or ())
    if not fit:
        return given, {}
    from loracle.study.forecast import choose_fit

    choice = choose_fit(config, overrides=given)
    _notify(choice.words)
    return [*given, *choice.overrides], choice.notes


@app.command()
def baseline(
    config: ConfigArgument = "base_config",
    overrides: SetOption = None,
    out: RunOption = None,
    resume: ResumeOption = False,
    fit: FitOption = False,
) -> None:
    """Fine-tune with the standard LoRA baseline; measure quality and cost before and after."""
    settings, notes = _fitted(config, overrides, fit=fit)
    resolved = load_config(config, overrides=settings)
    from loracle.records.find_runs import find_resumable, new_run_path

    if out is None and resume:
        from loracle.runner.place import portable_config

        out = find_resumable(RUNS, config=portable_config(resolved))
        if out is None:
            raise RunFolderError(
                f"{RUNS}: no unfinished run of this configuration; name one with --out"
            )
    folder = out or new_run_path(RUNS, name=find_config(config).stem)
    from loracle.report.terminal.run import result_view
    from loracle.runner.run_many import run_baseline

    result = run_baseline(resolved, out=folder, resume=resume, notes=notes)
    console = screen()
    console.print(result_view(result))
    console.print(f"Recorded in {folder}", soft_wrap=True)


@app.command()
def study(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML file, or name of a shipped study.")
    ],
    overrides: SetOption = None,
    out: StudyOption = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Only show arms, ranks, parameter counts, runs and predicted time."
        ),
    ] = False,
    fit: FitOption = False,
) -> None:
    """Compare placements over several seeds under equal conditions, then write a report."""
    from loracle.study.file import load_study

    name = find_config(config).stem
    settings, notes = _fitted(config, overrides, fit=fit)
    resolved, base = load_study(config, overrides=settings)
    from loracle.report.terminal.study_plan import plan_view, time_of
    from loracle.runner.place import absolute_config, place_of
    from loracle.study.run import prepare_study

    folder = out or RUNS / name
    base, console = absolute_config(base), screen()
    with place_of(folder):
        planned = prepare_study(resolved, base=base, name=name, out=folder)
        if plan:
            console.print(plan_view(planned, time=time_of(planned, out=folder)))
            return
        console.print(plan_view(planned, maps=False))
        from loracle.cli.study import conduct_study

        failed = conduct_study(planned, out=folder, console=console, notes=notes)
    if failed:
        raise typer.Exit(1)


@app.command()
def plan(
    config: Annotated[
        str,
        typer.Argument(
            metavar="[CONFIG]", help="YAML file of a run or a study, or name of a shipped one."
        ),
    ] = "base_config",
    overrides: SetOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="t4, l4, rtx4090, a100-40, a100-80, h100, h200, or a size of memory: 24GiB.",
            show_default="this machine's device",
        ),
    ] = None,
    fit: FitOption = False,
    markdown: MarkdownOption = False,
) -> None:
    """Predict memory and time of a run or study; needs neither weights nor the GPU."""
    from loracle.report.terminal.forecast import plan_report_markdown, plan_report_view
    from loracle.study.forecast import make_plan

    forecast = make_plan(config, overrides=overrides or (), gpu=gpu, fit=fit)
    if markdown:
        sys.stdout.write(plan_report_markdown(forecast))
    else:
        screen().print(plan_report_view(forecast))


@app.command()
def report(
    folder: FolderArgument,
    markdown: MarkdownOption = False,
) -> None:
    """Write a study's report, or print the results of a run or of runs with different seeds."""
    from loracle.records.find_runs import read_results, unverified
    from loracle.records.study_folder import is_study

    note = unverified(folder)
    if note:
        _notify(note)
    if is_study(folder):
        if markdown:
            from loracle.report import study_markdown

            sys.stdout.write(study_markdown(folder))
            return
        from loracle.cli.study import report_study

        report_study(folder, console=screen())
        return
    from loracle.records.lone_runs import study_of_runs
    from loracle.report.tables.baseline import baseline_table
    from loracle.report.terminal.run import result_view

    results = read_results(folder)
    if markdown or len(results) > 1:
        sys.stdout.write(baseline_table(study_of_runs(folder)) + "\n")
    else:
        screen().print(result_view(results[0]))


@app.command()
def config(config: ConfigArgument = "base_config", overrides: SetOption = None) -> None:
    """Print a configuration with every field resolved and described."""
    from loracle.config.printed import commented_yaml

    sys.stdout.write(commented_yaml(load_config(config, overrides=overrides or ())))


@app.command()
def placements(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Key of a listed model, or hub:, path:, pypi: source."
        ),
    ],
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank r.")] = 16,
    alpha: Annotated[
        float, typer.Option(help="LoRA alpha; updates are scaled by alpha / rank.")
    ] = 32.0,
) -> None:
    """List a model's modules with their shapes, and the parameters each placement trains."""
    if not 0 < alpha < math.inf:
        raise ConfigError(f"--alpha: must be a number above 0, got {alpha}")
    from loracle.model.inventory import inventory_from_architecture
    from loracle.report.terminal.placements import placements_table
    from loracle.sources import model_architecture

    inventory = inventory_from_architecture(model_architecture(model))
    screen().print(placements_table(inventory, rank=rank, alpha=alpha, model_name=model))


@app.command()
def sample(
    run_folder: RunArgument,
    instruction: Annotated[
        str, typer.Argument(metavar="INSTRUCTION", help="Instruction to answer.")
    ],
    input_text: Annotated[
        str, typer.Option("--input", help="Input of the instruction.", show_default="none")
    ] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum length of an answer, in tokens.", show_default="the run's"
        ),
    ] = None,
) -> None:
    """Print the answers of the untuned and the tuned model to an instruction, side by side."""
    from loracle.report.terminal.answers import answers_view
    from loracle.runner.sample import sample_run

    answers = sample_run(
        run_folder, instruction=instruction, input_text=input_text, max_new_tokens=max_new_tokens
    )
    screen().print(answers_view(answers))


@app.command()
def doctor(
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure the device's speed, from which times are predicted. Takes some seconds; "
            "the machine should be idle.",
        ),
    ] = False,
) -> None:
    """Check this machine: packages, device, memory, cache, access to models."""
    from loracle.cli.doctor import calibrate_device, checkup, doctor_view

    if calibrate:
        calibrate_device(screen(stderr=True))
    screen().print(doctor_view(checkup()))
