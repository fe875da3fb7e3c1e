"""The cells of the fault campaign: what is done to a run or study, and how it must come out.

A trial ends as one of ``OUTCOMES``. After a fault the command is started again without one: it must
come to the same bits as if nothing had happened, or say in one line what is wrong, by name, so that
what was sound can be put back and the run goes on. Damage to finished records must be named.
"""

from __future__ import annotations

import errno
import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_ground import Ended, Ground

OUTCOMES = ("survived", "refused", "lost", "silent")
"""Survived: the same bits. Refused: one line names the fault, nothing is lost. Lost: a traceback,
a hang, or a restart that comes to nothing. Silent: other figures without a word."""

Trial = Callable[[Ground, random.Random, Path], "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """How a trial came out."""

    kind: str
    what: str
    """The fault as it was drawn, and what was seen if it came out badly."""


@dataclass(frozen=True)
class Cell:
    """One kind of fault."""

    name: str
    trials: int
    trial: Trial


def one_line(ended: Ended) -> bool:
    """Returns whether a command ended with one clear line and without a traceback."""
    lines = ended.err.strip().splitlines()
    is_clear = bool(lines) and re.match(r"^\w+: \S", lines[-1]) is not None
    return ended.code in ("1", "2", "130") and is_clear and not traceback_in(ended)


def traceback_in(ended: Ended) -> bool:
    """Returns whether a terminal saw a traceback or an abort."""
    seen = ended.err + ended.out
    return "Traceback (most recent" in seen or "panicked at" in seen or "Fatal" in seen


def judged(ground: Ground, run: Path, first: Ended, what: str) -> Outcome:
    """Starts the run again, unless it is done, and compares what it comes to."""
    if traceback_in(first) or first.code == "hang":
        return Outcome("lost", f"{what}: {first.code}: {first.err[-300:]}")
    if first.code == "0":
        return _same(ground, run, what)
    again = ground.again(run)
    if again.code != "0":
        return Outcome("lost", f"{what}: {first.code}, then {again.code}: {again.err[-300:]}")
    return _same(ground, run, what)


def _same(ground: Ground, run: Path, what: str) -> Outcome:
    """Returns whether a run that completed has the bits of the undisturbed one."""
    try:
        is_same = ground.facts(run) == ground.expected
    except (OSError, ValueError, KeyError) as error:
        return Outcome("silent", f"{what}: completed, but {error!r}")
    return Outcome("survived" if is_same else "silent", what)


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
    """A signal at a random moment of a phase, up to three times in a row."""
    at, within = PHASES[phase]

    def trial(ground: Ground, draw: random.Random, run: Path) -> Outcome:
        said = []
        for _ in range(draw.randint(1, 2)):
            fault = {
                "kind": "signal", "at": at, "nth": draw.randint(1, 2) if phase == "validate" else 1,
                "delay_s": draw.uniform(0, within), "number": number,
            }  # fmt: skip
            ended = ground.again(run, faults=[fault])
            said.append(f"{fault['delay_s']:.3f} s: {ended.code}")
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
            return Outcome("lost", f"write {nth}: {ended.code}: {ended.err[-300:]}")
        return judged(ground, run, ended, f"write {nth}: {ended.code}")

    return trial


def limited(name: str, low: int, high: int) -> Trial:
    """A limit of the operating system, a little above what is used."""

    def trial(ground: Ground, draw: random.Random, run: Path) -> Outcome:
        more = draw.randint(low, high)
        ended = ground.again(run, faults=[{"kind": "limit", "name": name, "more": more}])
        if ended.code != "0" and not one_line(ended):
            return Outcome("lost", f"{name} +{more}: {ended.code}: {ended.err[-300:]}")
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
        return Outcome("lost", f"{what}: {ended.code}: {ended.err[-300:]}")
    return judged(ground, run, Ended("0", ended.out, ended.err), what)


def two_at_once(ground: Ground, _draw: random.Random, run: Path) -> Outcome:
    both = ground.together(run, count=2)
    codes = sorted(ended.code for ended in both)
    for ended in both:
        if ended.code != "0" and not one_line(ended):
            return Outcome("lost", f"{codes}: {ended.err[-300:]}")
    done = next((ended for ended in both if ended.code == "0"), both[0])
    return judged(ground, run, done, f"{codes}")


def harmed(path: Path, draw: random.Random) -> str:
    """Flips a bit of a file, or cuts it; returns what was done."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.75 and content:
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        content[at] ^= 1 << bit
        what = f"{path.name}: bit {bit} of byte {at}"
    else:
        keep = draw.randrange(len(content)) if content else 0
        del content[keep:]
        what = f"{path.name}: cut after {keep} bytes"
    path.write_bytes(content)
    return what


def files_below(folder: Path, *, without: Sequence[str] = ()) -> list[Path]:
    """Returns the files of a folder that hold something, in order."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return [
        path for path in found
        if path.name != ".lock" and not any(part in path.parts for part in without)
    ]  # fmt: skip


def damaged_finished(ground: Ground, draw: random.Random, run: Path) -> Outcome:
    """A record of a finished run is damaged: the report names it."""
    shutil.copytree(ground.finished, run)
    file = draw.choice(files_below(run, without=("checkpoints", "adapter")))
    what = harmed(file, draw)
    return _named(ground.command("report", run), file, what)


def damaged_adapter(ground: Ground, draw: random.Random, run: Path) -> Outcome:
    """A file of the adapter is damaged: no answer comes from it."""
    shutil.copytree(ground.finished, run)
    file = draw.choice(files_below(run / "adapter"))
    what = harmed(file, draw)
    return _named(ground.command("sample", run, "Name a color."), file, what)


def damaged_study(ground: Ground, draw: random.Random, run: Path) -> Outcome:
    """A record of a study, or of one of its runs, is damaged: the report names it."""
    shutil.copytree(ground.study, run)
    if draw.random() < 0.5:
        file = draw.choice([path for path in files_below(run) if path.parent == run])
    else:
        file = draw.choice(files_below(run / "runs", without=("checkpoints", "adapter")))
    what = harmed(file, draw)
    return _named(ground.command("report", run, "--markdown"), file, what)


def _named(ended: Ended, file: Path, what: str) -> Outcome:
    if one_line(ended) and file.name in ended.err:
        return Outcome("refused", what)
    if ended.code == "0":
        return Outcome("silent", f"{what}: reported")
    return Outcome("lost", f"{what}: {ended.code}: {ended.err[-300:]}")


def damaged_unfinished(only: str) -> Trial:
    """A file of a run that was stopped is damaged: it is made again, or named and refused."""

    def trial(ground: Ground, draw: random.Random, run: Path) -> Outcome:
        shutil.copytree(ground.stopped[draw.randrange(len(ground.stopped))], run)
        files = files_below(run / only, without=() if only else ("checkpoints",))
        if not files:
            return Outcome("survived", "nothing there yet")
        file = draw.choice(files)
        sound = file.read_bytes()
        what = harmed(file, draw)
        ended = ground.again(run)
        if ended.code == "0":
            return judged(ground, run, ended, what)
        if not one_line(ended) or file.name not in ended.err:
            return Outcome("lost", f"{what}: {ended.code}: {ended.err[-300:]}")
        # Named: with the file put back it goes on as if nothing had happened.
        file.write_bytes(sound)
        out = judged(ground, run, ended, what)
        return Outcome("refused", what) if out.kind == "survived" else out

    return trial


def in_the_way(ground: Ground, draw: random.Random, run: Path) -> Outcome:
    """A folder where a file belongs, a file where a folder does, or something foreign."""
    names = (
        "result.json",
        "examples.jsonl",
        "steps.jsonl",
        "adapter",
        "checkpoints",
        "config.yaml",
    )
    name = draw.choice((*names, "status.json", "evals.jsonl", "manifest.json", "traceback.txt"))
    run.mkdir()
    path = run / name
    path.write_text("mine") if name in ("adapter", "checkpoints") else path.mkdir()
    ended = ground.again(run, resume=False)
    if ended.code != "0" and not one_line(ended):
        return Outcome("lost", f"{name}: {ended.code}: {ended.err[-300:]}")
    if not path.exists():
        return Outcome("lost", f"{name}: removed, and was not ours")
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return judged(ground, run, ended, f"{name}: {ended.code}")


def damaged_cache(ground: Ground, draw: random.Random, run: Path) -> Outcome:
    """A kept value in the cache is damaged: it is computed again."""
    with ground.own_cache(run) as cache:
        file = draw.choice(files_below(cache))
        what = harmed(file, draw)
        ended = ground.again(run)
        return judged(ground, run, ended, what)


HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07", "<script>alert(1)</script>", "![x](http://example.org/x.png)",
    "=HYPERLINK(1)", "\\input{/etc/passwd}", "\u202etxt.exe", "a\x00b", "|---|", "{{7*7}}",
    "[link=http://example.org]x[/link]", "\r\n# heading", "$(touch owned)", "\ud800",
)  # fmt: skip


def hostile_text(ground: Ground, draw: random.Random, run: Path) -> Outcome:
    """Texts that mean something to a terminal, a page or a shell, in every field of the data."""
    texts = draw.sample(HOSTILE, 4)
    data = ground.hostile_data(run.with_name(f"{run.name}-data.json"), texts)
    ended = ground.again(run, changes={"data.source": f"path:{data}"})
    seen = ended.out + ended.err
    if ended.code != "0":
        kind = "refused" if one_line(ended) else "lost"
        return Outcome(kind, f"{texts!a}: {ended.code}: {ended.err[-300:]}")
    reported = ground.command("report", run)
    if reported.code != "0" or traceback_in(reported):
        return Outcome("lost", f"{texts!a}: report: {reported.err[-300:]}")
    raw = any(char in seen + reported.out for char in "\x1b\x07\x00\u202e")
    return Outcome("silent" if raw else "survived", f"{texts!a}")


def _signals() -> list[Cell]:
    return [
        Cell(f"{signal.Signals(number).name} in {phase}", 8, ended_in(phase, number=number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for phase in ("train", "finish")
    ]


CELLS: tuple[Cell, ...] = (
    *(
        Cell(f"kill in {phase}", 20, ended_in(phase, number=signal.SIGKILL))
        for phase in PHASES
    ),
    *_signals(),
    Cell("disk full", 24, disk(errno.ENOSPC)),
    Cell("disk read-only", 16, disk(errno.EROFS)),
    Cell("disk error", 8, disk(errno.EIO)),
    Cell("file size limited", 12, limited("RLIMIT_FSIZE", 0, 60_000)),
    Cell("memory limited", 20, limited("RLIMIT_AS", 1 << 20, 200 << 20)),
    Cell("open files limited", 12, limited("RLIMIT_NOFILE", 0, 12)),
    Cell("no threads", 4, without_threads),
    Cell("stream closed, full or left", 20, stream_lost),
    Cell("two processes on one folder", 12, two_at_once),
    Cell("damaged record of a finished run", 100, damaged_finished),
    Cell("damaged adapter", 16, damaged_adapter),
    Cell("damaged record of a study", 60, damaged_study),
    Cell("damaged record of a stopped run", 60, damaged_unfinished("")),
    Cell("damaged checkpoint", 40, damaged_unfinished("checkpoints")),
    Cell("damaged cache", 12, damaged_cache),
    Cell("something in the way", 20, in_the_way),
    Cell("hostile text in the data", 16, hostile_text),
)  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, for each cell in order, how many of its trials came out in which way."""
    return [
        {
            "cell": cell.name,
            "trials": len(of),
            **{kind: sum(row["outcome"] == kind for row in of) for kind in OUTCOMES},
        }
        for cell in CELLS
        if (of := [row for row in rows if row["cell"] == cell.name])
    ]
