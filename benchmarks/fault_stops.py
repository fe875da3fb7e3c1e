"""Trials in which something ends a command, or takes from it what it needs."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

from fault_damage import files_below
from fault_ground import Ended, Ground, signal_at
from fault_outcomes import Outcome, Trial, judged, lost, one_line, traceback_in

# Function whose call begins a phase, and the seconds within which the end comes.
PHASES = {
    "prepare": ("loracle.runner.run_many:open_shared_base", 0.2),
    "train": ("loracle.runner.bundle:_train", 0.4),
    "validate": ("loracle.runner.bundle:validate_due", 0.06),
    "answer": ("loracle.runner.bundle:answer", 0.08),
    "measure": ("loracle.runner.bundle:measure_arm_latency", 0.05),
    "audit": ("loracle.runner.bundle:audit_weights", 0.15),
    "finish": ("loracle.runner.bundle:finish_run", 0.03),
}


def ended_in(phase: str, *, number: int) -> Trial:
    """A signal at a random moment of a phase, once or twice in a row."""
    at, within = PHASES[phase]

    def trial(ground: Ground, draw: random.Random, run: Path) -> Outcome:
        said = []
        for _ in range(draw.randint(1, 2)):
            nth = draw.randint(1, 2) if phase == "validate" else 1
            delay_s = draw.uniform(0, within)
            fault = signal_at(at, nth=nth, delay_s=delay_s, number=number)
            ended = ground.again(run, faults=[fault])
            said.append(f"{delay_s:.3f} s: {ended.code}")
            if ended.code == "0":
                break
            if number != signal.SIGKILL and not (one_line(ended) or ended.code == f"-{number}"):
                return Outcome("lost", f"{said}: {ended.err[-300:]}")
        return judged(ground, run, ended, f"{phase} {'; '.join(said)}")

    return trial


def disk(code: int) -> Trial:
    """The disk refuses from a random moment on, as one that is full or was mounted read-only."""

    def trial(ground: Ground, draw: random.Random, run: Path) -> Outcome:
        nth = draw.randint(1, ground.writes)
        fault = {"kind": "disk", "folder": str(run), "nth": nth, "errno": code}
        ended = ground.again(run, faults=[fault])
        if ended.code != "0" and not one_line(ended):
            return lost(f"write {nth}", ended)
        return judged(ground, run, ended, f"write {nth}: {ended.code}")

    return trial


# How glibc and the kernel end a process that cannot map memory: as good as a kill.
ABORTED = ("127", "-6", "-7", "-11")


def limited(name: str, low: int, high: int) -> Trial:
    """A limit of the operating system, a little above what is used."""

    def trial(ground: Ground, draw: random.Random, run: Path) -> Outcome:
        more = draw.randint(low, high)
        ended = ground.again(run, faults=[{"kind": "limit", "name": name, "more": more}])
        if ended.code not in ("0", *ABORTED) and not one_line(ended):
            return lost(f"{name} +{more}", ended)
        return judged(ground, run, ended, f"{name} +{more}: {ended.code}")

    return trial


def without_threads(ground: Ground, _draw: random.Random, run: Path) -> Outcome:
    ended = ground.again(run, faults=[{"kind": "threads"}])
    if ended.code != "0" and not one_line(ended):
        return Outcome("lost", f"{ended.code}: {ended.err[-300:]}")
    return judged(ground, run, ended, ended.code)


def stream_lost(ground: Ground, draw: random.Random, run: Path) -> Outcome:
    """Standard output, error or both are closed, full or left by their reader."""
    numbers = draw.choice(([1], [2], [1, 2]))
    faults = [
        {"kind": "stream", "number": n, "is": draw.choice(("closed", "full", "left"))}
        for n in numbers
    ]
    ended = ground.again(run, faults=faults)
    what = ", ".join(f"{fault['number']} {fault['is']}" for fault in faults)
    # The work is done whatever becomes of the output; that it got lost may be told by the code.
    if ended.code not in ("0", "1") or not (run / "result.json").exists():
        return lost(what, ended)
    return judged(ground, run, Ended("0", ended.out, ended.err), what)


def two_at_once(ground: Ground, _draw: random.Random, run: Path) -> Outcome:
    both = ground.together(run, count=2)
    codes = sorted(ended.code for ended in both)
    for ended in both:
        if ended.code != "0" and not one_line(ended):
            return Outcome("lost", f"{codes}: {ended.err[-300:]}")
    done = next((ended for ended in both if ended.code == "0"), both[0])
    return judged(ground, run, done, f"{codes}")


# Where a study is killed, and how often the function has been called by then.
_STUDY_MOMENTS = (
    ("loracle.runner.bundle:finish_run", 4),
    ("loracle.study.run:keep_plan", 1),
    ("loracle.records.study_folder:write_records", 1),
    ("loracle.cli.study:keep_clock", 1),
    ("loracle.cli.study:compare_with_measured", 1),
    ("loracle.cli.study:report_study", 1),
)


def study_killed(ground: Ground, draw: random.Random, run: Path) -> Outcome:
    """A study is killed in a run, between them or in what follows, and started again."""
    at, most = draw.choice(_STUDY_MOMENTS)
    nth, delay_s = draw.randint(1, most), draw.uniform(0, 0.05)
    fault = signal_at(at, nth=nth, delay_s=delay_s)
    words = ("study", ground.study_file, "--out", run)
    ended = ground.live([ground.life(words, name=run.name, faults=[fault])])[0]
    what = f"{at} {nth}: {ended.code}"
    again = ground.command(*words)
    if again.code != "0" or traceback_in(again):
        return lost(what, again)
    return Outcome("survived" if ground.study_facts(run) == ground.of_study else "silent", what)


def report_killed(ground: Ground, draw: random.Random, run: Path) -> Outcome:
    """The report is killed while it is written, and written again."""
    # Under its own name, which the page tells.
    study = Path(shutil.copytree(ground.study, run / ground.study.name))
    fault = signal_at("loracle.report.write:write_durably", nth=draw.randint(1, 30))
    words = ("report", study)
    ended = ground.live([ground.life(words, name=run.name, faults=[fault])])[0]
    what = f"file {fault['nth']}: {ended.code}"
    again = ground.command(*words)
    if again.code != "0" or traceback_in(again):
        return lost(what, again)
    same = all(
        (study / path.relative_to(ground.study)).read_bytes() == path.read_bytes()
        for path in files_below(ground.study / "report")
        if path.suffix != ".pdf"
    )
    return Outcome("survived" if same else "silent", what)
