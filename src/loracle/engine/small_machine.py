"""Machines that allow few processes or have no temporary folder: ways to go on without them."""

from __future__ import annotations

import os
import resource
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# assumed: as many threads as loading a model and asking a tokenizer start at a time
_FEW = 8

# Read by the libraries when they are imported, so set before.
# source: transformers 5 core_model_loading.py, tokenizers, OpenMP, MKL, Arrow
_ONE_THREAD = {
    "HF_DEACTIVATE_ASYNC_LOAD": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ARROW_IO_THREADS": "1",
    "TQDM_DISABLE": "1",
}


def fit_machine(temporary_folder: Callable[[], Path]) -> list[str]:
    """Prepares this process for what the machine allows, before libraries are imported.

    ``temporary_folder`` gives the folder to use if no usual place is writable. Returns what was
    changed that makes a difference, a line each.
    """
    find_temporary_folder(temporary_folder)
    if has_limited_address_space():
        load_in_one_thread()
    if can_start_threads():
        return []
    go_without_threads()
    return ["few processes are allowed here (ulimit -u): going on in one thread"]


def can_start_threads(count: int = _FEW) -> bool:
    """Returns whether this process may have so many more threads (``ulimit -u``, cgroups)."""
    ended, started = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=ended.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        return False
    finally:
        ended.set()
        for thread in started:
            thread.join()
    return True


def go_without_threads() -> None:
    """Has the libraries that are not imported yet do their work in one thread."""
    os.environ.update(_ONE_THREAD)


def has_limited_address_space() -> bool:
    """Returns whether the process may map only so much memory (``ulimit -v``)."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def load_in_one_thread() -> None:
    """Has Transformers load weights in one thread.

    assumed: each takes 72 MiB of address space, 8 for its stack and 64 for glibc's arena.
    """
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"


def find_temporary_folder(fallback: Callable[[], Path]) -> None:
    """Has temporary files go to ``fallback()`` if no usual place for them is writable."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        # Code that needs one reports that there is none. RuntimeError: there is no home either.
        with suppress(OSError, RuntimeError):
            folder = fallback()
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                tempfile.tempdir = str(folder)
