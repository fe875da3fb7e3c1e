"""A warm process that forks, as `lives` of the tests: each life runs a command under faults.

Reads a list of lives per line as JSON (``argv``, ``out``, ``err``, ``limit_s``, ``cache``,
``faults``) that begin together; answers their exit codes, negative for a signal that ended one, or
``hang``. Faults are applied in the life alone:

``{"kind": "signal", "at": "module:function", "nth": n, "delay_s": s, "number": k}``
    Sends the signal so long after the n-th call of the function has begun.
``{"kind": "disk", "folder": F, "nth": n, "errno": e}``
    From the n-th time that something in the folder is opened to be written, the disk refuses.
``{"kind": "limit", "name": "RLIMIT_...", "more": n}``
    The limit is what the life uses already and n more.
``{"kind": "stream", "number": 1 or 2, "is": "closed", "full" or "left"}``
    Standard output or error is closed, a full device, or a pipe whose reader left.
``{"kind": "threads"}``
    No thread can be started.
"""

import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

from lives import WARM, born, warm_up

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def signal_at(fault: dict) -> None:
    module_name, _, name = fault["at"].partition(":")
    module = importlib.import_module(module_name)
    right, calls = getattr(module, name), []

    def wrapped(*given, **settings):
        calls.append(name)
        if len(calls) == fault["nth"]:
            delay = threading.Timer(fault["delay_s"], os.kill, (os.getpid(), fault["number"]))
            delay.daemon = True
            delay.start()
        return right(*given, **settings)

    setattr(module, name, wrapped)


def refuse_writes(fault: dict) -> None:
    seen = [0]

    def hook(event: str, given: tuple) -> None:
        if event == "open" and fault["folder"] in str(given[0]):
            path, mode, flags = given
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & WRITES:
                seen[0] += 1
                if seen[0] >= fault["nth"]:
                    raise OSError(fault["errno"], os.strerror(fault["errno"]), str(path))

    sys.addaudithook(hook)


def limit(fault: dict) -> None:
    name = fault["name"]
    used = 0
    if name == "RLIMIT_AS":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if name == "RLIMIT_NOFILE":
        used = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1
    number = getattr(resource, name)
    resource.setrlimit(number, (used + fault["more"], resource.getrlimit(number)[1]))


def lose_stream(fault: dict) -> None:
    number = fault["number"]
    if fault["is"] == "closed":
        os.close(number)
        setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
        return
    if fault["is"] == "full":
        taken = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, taken = os.pipe()
        os.close(reader)
    os.dup2(taken, number)
    os.close(taken)


def refuse_threads(_fault: dict) -> None:
    def refused(*_given, **_settings):
        raise RuntimeError("can't start new thread")

    threading._start_new_thread = refused
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"


FAULTS = {
    "signal": signal_at,
    "disk": refuse_writes,
    "limit": limit,
    "stream": lose_stream,
    "threads": refuse_threads,
}


def live(life: dict) -> int:
    from loracle.cli.main import app, run

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, life["out"]), (2, life["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if life["cache"]:
        os.environ["LORACLE_CACHE"] = life["cache"]
    for fault in life["faults"]:
        FAULTS[fault["kind"]](fault)
    code = run(partial(app, args=life["argv"]))
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    return code


def wait(child: int, *, limit_s: float) -> str:
    ends_at = time.monotonic() + limit_s
    while time.monotonic() < ends_at:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hang"


def main() -> None:
    warm_up(("loracle.cli.main", "loracle.cli.study", *WARM))
    for line in sys.stdin:
        lives = json.loads(line)
        children = [born(life, live) for life in lives]
        ends = [
            wait(child, limit_s=life["limit_s"])
            for child, life in zip(children, lives, strict=True)
        ]
        print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    main()
