"""Trials in which files are not what was written, or not what anyone expects."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from fault_ground import Ended, Ground
from fault_outcomes import Outcome, Trial, judged, lost, one_line, traceback_in


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
    return lost(what, ended)


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
            return lost(what, ended)
        # Named: with the file put back it goes on as if nothing had happened.
        file.write_bytes(sound)
        out = judged(ground, run, ended, what)
        return Outcome("refused", what) if out.kind == "survived" else out

    return trial


IN_A_RUN = (
    "result.json", "examples.jsonl", "steps.jsonl", "adapter", "checkpoints", "config.yaml",
    "status.json", "evals.jsonl", "manifest.json", "traceback.txt",
)  # fmt: skip


def in_the_way(ground: Ground, draw: random.Random, run: Path) -> Outcome:
    """A folder where a file belongs, a file where a folder does, or something foreign."""
    name = draw.choice(IN_A_RUN)
    run.mkdir()
    path = run / name
    path.write_text("mine") if name in ("adapter", "checkpoints") else path.mkdir()
    ended = ground.again(run, resume=False)
    if ended.code != "0" and not one_line(ended):
        return lost(name, ended)
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
