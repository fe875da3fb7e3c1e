"""python tests/cuda/run.py CARD COMMAND ... - runs a command on a pretended card.

Cards: t4, l4, a100, h100. ``loracle ...`` and ``python ...`` are run by this Python, which needs a
CUDA build of PyTorch. The exit code is the command's. What the card was asked is printed at the
end (``--quiet``: not).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
CARDS = ("t4", "l4", "a100", "h100")
_LORACLE = (
    "import sys; sys.argv[0] = 'loracle'; from loracle.cli.main import main; sys.exit(main())"
)


def on_card(card: str, *, built: Path | None = None, **more: str) -> dict[str, str]:
    """Returns the environment of a process that finds this card; ``more``: see README.md."""
    built = built or library_folder()
    paths = [
        *(str(HERE / name) for name in ("pretend/site", "pretend", ".", "..", "../../benchmarks")),
        str(HERE.parents[1] / "src"),
        os.environ.get("PYTHONPATH", ""),
    ]
    return {
        **os.environ,
        "PRETEND_CARD": card,
        "LD_PRELOAD": str(built / "libpretend.so"),
        "LD_LIBRARY_PATH": os.pathsep.join(
            filter(None, [str(built), os.environ.get("LD_LIBRARY_PATH", "")])
        ),
        "TRITON_LIBCUDA_PATH": str(built),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **more,
    }


def library_folder() -> Path:
    """Returns the library's folder, built: ``PRETEND_LIBRARY``, else tests/cuda/build."""
    folder = Path(os.environ.get("PRETEND_LIBRARY", HERE / "build")).resolve()
    sources = max(path.stat().st_mtime for path in (HERE / "pretend").iterdir() if path.is_file())
    built = folder / "libcuda.so.1"
    if not built.exists() or built.stat().st_mtime < sources:
        subprocess.run(
            [sys.executable, HERE / "pretend" / "build.py", folder],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return folder


def command_of(words: Sequence[str]) -> list[str]:
    """Returns the words of a process for ``loracle ...``, ``python ...`` or any other command."""
    first, *rest = words
    if first == "loracle":
        return [sys.executable, "-c", _LORACLE, *rest]
    return [sys.executable if first == "python" else first, *rest]


def told(report: Path) -> list[Mapping[str, object]]:
    """Returns what each process of a command asked of the card."""
    return (
        [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
        if report.exists()
        else []
    )


def main(words: list[str]) -> int:
    quiet = "--quiet" in words[:1]
    card, *command = words[quiet:]
    if card not in CARDS or not command:
        print(f"{__doc__}\n{card!r} is no card" if card not in CARDS else __doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        code = subprocess.run(
            command_of(command), env=on_card(card, PRETEND_REPORT=str(report)), check=False
        ).returncode
        for row in [] if quiet else told(report):
            print("on the card:", json.dumps(row), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
