"""The command line: parse, call, print. Nothing is computed here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from loracle.config.files import dump_yaml, find_config, load_config
from loracle.errors import LoracleError, RunFolderError
from loracle.version import __version__

app = typer.Typer(
    name="loracle",
    help="Where should LoRA adapters go? Controlled comparisons, measured, with error bars.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

ConfigArgument = Annotated[
    str, typer.Argument(metavar="[CONFIG]", help="A YAML file or the name of a shipped config.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. train.max_steps=100."),
]

FitOption = Annotated[
    bool,
    typer.Option("--fit", help="Choose passes, checkpointing and 4 bits so that memory suffices."),
]

RUNS = Path("runs")


def main() -> None:
    """Runs the command and turns every error of ours into one line and an exit code."""
    sys.exit(run(app))


def run(command: Callable[..., Any]) -> int:
    """Returns the exit code of a command; the one place where our errors are caught."""
    try:
        code = command(standalone_mode=False)
    except LoracleError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False
        )
        return error.exit_code
    except typer.Abort:
        return 130
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _fitted(
    config: str, overrides: list[str] | None, *, wanted: bool
) -> tuple[list[str], Mapping[str, Any]]:
    """Returns the settings given and, if it is wanted, those that make everything fit."""
    given = list(overrides or ())
    if not wanted:
        return given, {}
    from loracle.study.forecast import choose_fit

    choice = choose_fit(config, overrides=given)
    Console(stderr=True, soft_wrap=True).print(escape(choice.words), highlight=False)
    return [*given, *choice.overrides], choice.notes


@app.command()
def baseline(
    config: ConfigArgument = "base_config",
    overrides: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default: runs/<config>-<time>.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was stopped.")
    ] = False,
    fit: FitOption = False,
) -> None:
    """Fine-tune with the standard LoRA baseline; measure quality and cost before and after."""
    settings, notes = _fitted(config, overrides, wanted=fit)
    resolved = load_config(config, overrides=settings)
    from loracle.records.find_runs import find_resumable, new_run_path

    if out is None and resume:
        from loracle.runner.run_many import portable_config

        out = find_resumable(RUNS, config=portable_config(resolved))
        if out is None:
            raise RunFolderError(
                f"{RUNS}: no unfinished run of this configuration; name one with --out"
            )
    folder = out or new_run_path(RUNS, name=find_config(config).stem)
    from loracle.report.terminal.run import result_view
    from loracle.runner.run_many import run_baseline

    result = run_baseline(resolved, out=folder, resume=resume, notes=notes)
    console = Console()
    console.print(result_view(result))
    console.print(f"Recorded in {escape(str(folder))}", highlight=False, soft_wrap=True)


@app.command()
def study(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A study's YAML file, or a shipped one's name.")
    ],
    overrides: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Study folder; default: runs/<config>. It is gone on with.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show arms, ranks, counts, runs and time; run nothing.")
    ] = False,
    fit: FitOption = False,
) -> None:
    """Compare placements under identical conditions over several seeds, then report."""
    from loracle.study.file import load_study

    name = find_config(config).stem
    settings, notes = _fitted(config, overrides, wanted=fit)
    resolved, base = load_study(config, overrides=settings)
    from loracle.report.terminal.study_plan import plan_view, time_of
    from loracle.study.run import prepare_study

    folder = out or RUNS / name
    planned = prepare_study(resolved, base=base, name=name, out=folder)
    console = Console()
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
        typer.Argument(metavar="[CONFIG]", help="A run's or a study's file, or a shipped name."),
    ] = "base_config",
    overrides: SetOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="t4, l4, rtx4090, a100-40, a100-80, h100, h200, or memory: 24GiB."
        ),
    ] = None,
    fit: FitOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown.")] = False,
) -> None:
    """Predict memory and time, and whether it fits: without weights and without the GPU."""
    from loracle.report.terminal.forecast import plan_report_markdown, plan_report_view
    from loracle.study.forecast import make_plan

    found = make_plan(config, overrides=overrides or (), gpu=gpu, fit=fit)
    if markdown:
        sys.stdout.write(plan_report_markdown(found))
    else:
        Console().print(plan_report_view(found))


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A study, a run, or a folder of runs.")
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown.")] = False,
) -> None:
    """Write a study's report; print the table of a run, or of runs that differ in their seed."""
    from loracle.records.names import STUDY

    if (folder / STUDY).is_file():
        if markdown:
            from loracle.report import study_markdown

            sys.stdout.write(study_markdown(folder))
            return
        from loracle.cli.study import report_study

        report_study(folder, console=Console())
        return
    from loracle.records.find_runs import read_results
    from loracle.records.lone_runs import study_of_runs
    from loracle.report.tables.baseline import baseline_table
    from loracle.report.terminal.run import result_view

    results = read_results(folder)
    if markdown or len(results) > 1:
        sys.stdout.write(baseline_table(study_of_runs(folder)) + "\n")
    else:
        Console().print(result_view(results[0]))


@app.command()
def config(config: ConfigArgument = "base_config", overrides: SetOption = None) -> None:
    """Print a configuration as it resolves, every field."""
    resolved = load_config(config, overrides=overrides or ())
    sys.stdout.write(dump_yaml(resolved.model_dump(mode="json")))


@app.command()
def placements(
    model: Annotated[str, typer.Argument(help="A model key, hub:, path: or pypi: source.")],
    rank: Annotated[int, typer.Option(min=1, help="r.")] = 16,
    alpha: Annotated[float, typer.Option(help="Scaling is alpha / r.")] = 32.0,
) -> None:
    """Show the modules of a model, their shapes, and what each placement would train."""
    from loracle.model.inventory import inventory_from_architecture
    from loracle.report.terminal.placements import placements_table
    from loracle.sources import model_architecture

    inventory = inventory_from_architecture(model_architecture(model))
    Console().print(placements_table(inventory, rank=rank, alpha=alpha, model_name=model))


@app.command()
def sample(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    instruction: Annotated[str, typer.Argument(help="What to do.")],
    input_text: Annotated[str, typer.Option("--input", help="The record's input, if any.")] = "",
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per answer.")] = None,
) -> None:
    """Print the untuned and the tuned model's answers to an instruction, side by side."""
    from loracle.report.terminal.answers import answers_view
    from loracle.runner.sample import sample_run

    answers = sample_run(
        run_folder, instruction=instruction, input_text=input_text, max_new_tokens=max_new_tokens
    )
    Console().print(answers_view(answers))


@app.command()
def doctor(
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure the device's speed, for plans; keep it idle."),
    ] = False,
) -> None:
    """Say what this machine can do and what is missing."""
    from loracle.cli.doctor import calibrate_device, checkup, doctor_view

    if calibrate:
        calibrate_device(Console(stderr=True))
    Console().print(doctor_view(checkup()))
