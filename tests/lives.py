"""A warmed-up process that forks: each life runs one command and can be killed at a chosen moment.

Importing PyTorch takes seconds and a fork takes none, so a test can kill one run many times. Reads
one life per line as JSON (``argv``, ``folder``, ``log``, ``end``), answers its exit code, negative
for the signal that ended it, and how many events there were.

``argv`` is a command of ours, or ``many`` and what ``run_runs`` takes.

Ends: ``{"events": n}`` is SIGKILL before the n-th time that the life opens, renames, makes or
removes something in the run folder; ``{"step": n, "delay_s": s}`` is SIGKILL, or the ``signal`` of
that number, so long after the life's n-th step, whatever it does then; ``{"half": n}`` writes half
of the n-th file that belongs to a checkpoint and then is SIGKILL; ``{"touching": name}`` is SIGKILL
before the life first touches a path with that name in it. ``{"offline": true}`` ends nothing: it
shuts every way out. ``{"only_runs": true}`` leaves a study at its runs.
"""

import errno
import gc
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

WARM = (
    "loracle.cli.main",
    "loracle.runner.run_many",
    "loracle.report.terminal.run",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "sacrebleu.metrics",
    "sacrebleu.tokenizers.tokenizer_13a",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
)
TOUCHING = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def watch(folder: str, *, end: dict, counted: list[int]) -> None:
    """Counts what touches the run folder; ends the life at the event asked for."""

    def hook(event: str, args: tuple) -> None:
        if event in TOUCHING and folder in str(args[0]):
            counted[0] += 1
            touched = end.get("touching", "/") in Path(str(args[0])).name
            if touched or counted[0] == end.get("events"):
                die()

    sys.addaudithook(hook)


def die_after_step(nth: int, *, delay_s: float, number: int = signal.SIGKILL) -> None:
    from loracle.records.run_folder import RunFolder

    append, seen = RunFolder.append_step, []

    def appending(self, row):
        append(self, row)
        seen.append(row)
        if len(seen) == nth:
            threading.Timer(delay_s, os.kill, (os.getpid(), number)).start()

    RunFolder.append_step = appending


def die_in_checkpoint(nth: int) -> None:
    from loracle.runner import checkpoint

    write, seen = checkpoint.write_synced, []

    def writing(path, content):
        seen.append(path)
        if len(seen) == nth:
            path.write_bytes(content[: len(content) // 2])
            die()
        write(path, content)

    checkpoint.write_synced = writing


def shut_every_way_out() -> None:
    """Refuses every address but this machine's; whoever tries gets what a cut cable gives."""
    from huggingface_hub.utils import _http

    local = ("127.0.0.1", "::1", "localhost")

    def hook(event: str, args: tuple) -> None:
        if event == "socket.connect" and not is_local(*args):
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        if event == "socket.getaddrinfo" and args[0] not in (None, *local):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def is_local(given: socket.socket, address: object) -> bool:
        return given.family == socket.AF_UNIX or address[0] in local

    sys.addaudithook(hook)
    # Else the hub's client waits 23 s in all before its last attempt.
    _http.time = without_sleep()


def without_sleep() -> SimpleNamespace:
    """Returns the module ``time``, but that its ``sleep`` returns at once."""
    return SimpleNamespace(**vars(time) | {"sleep": lambda _s: None})


def leave_out_what_follows_runs() -> None:
    from loracle.cli import study

    for name in ("keep_clock", "compare_with_measured", "report_study"):
        setattr(study, name, lambda *_, **__: None)


def live(life: dict) -> int:
    from loracle.cli.main import app, run

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(life["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    end, counted = life["end"], [0]
    if "step" in end:
        number = end.get("signal", signal.SIGKILL)
        die_after_step(end["step"], delay_s=end["delay_s"], number=number)
    if "half" in end:
        die_in_checkpoint(end["half"])
    if "only_runs" in end:
        leave_out_what_follows_runs()
    if "offline" in end:
        shut_every_way_out()
    watch(life["folder"], end=end, counted=counted)
    first, *rest = life["argv"]
    command = partial(run_runs, rest[0]) if first == "many" else partial(app, args=[first, *rest])
    code = run(command)
    sys.stdout.flush()
    sys.stderr.flush()
    Path(life["log"]).with_suffix(".events").write_text(str(counted[0]))
    return code


def run_runs(given: str, *, standalone_mode: bool) -> int:
    """Runs many; ``given`` is JSON: ``config``, ``runs`` (folder: overrides), ``bundle_size``."""
    from loracle.config.files import load_config
    from loracle.runner.run_many import run_many
    from loracle.runner.run_spec import RunSpec

    study = json.loads(given)
    specs = [
        RunSpec(load_config(study["config"], overrides=overrides), Path(folder))
        for folder, overrides in study["runs"].items()
    ]
    outcomes = run_many(specs, bundle_size=study["bundle_size"])
    return int(any(outcome.error for outcome in outcomes))


def warm_up(names: Iterable[str]) -> None:
    """Imports modules and sets them aside, so that a life neither imports nor collects them."""
    import torch

    torch.set_num_threads(1)
    for name in names:
        importlib.import_module(name)
    use_once()
    # A run collects garbage at every change of phase: 1.6 s for a tiny one, else 5.2 (LOG.md).
    gc.collect()
    gc.freeze()
    # Counting them would take each life longer than a step.
    gc.get_freeze_count = lambda: 1


def use_once() -> None:
    """Has libraries fill the tables that they make at first use, without a gradient.

    After a gradient PyTorch allows no fork that computes another.
    """
    import torch

    from loracle.model.inventory import inventory_of
    from loracle.model.load import load_base
    from loracle.model.reach import on_trial
    from loracle.placement import resolve_placement
    from tiny import save_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder), layers=1)
        base = load_base(model, device=torch.device("cpu"), dtype=torch.float32)
    inventory = inventory_of(base.model)
    plan = resolve_placement("attention", inventory=inventory, rank=1, alpha=1.0)
    with on_trial(base, plan=plan):
        pass


def born(life: dict, live: Callable[[dict], int]) -> int:
    """Forks a life and returns its process id; the life ends with what ``live`` returns."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = live(life)
        finally:
            os._exit(code)
    return child


def main() -> None:
    warm_up(WARM)
    for line in sys.stdin:
        _, status = os.waitpid(born(json.loads(line), live), 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
