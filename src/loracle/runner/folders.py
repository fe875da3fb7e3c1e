"""Folders of the runs that are about to be done: opened, given up, told why their run ended."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from loracle.errors import Interrupted, LoracleError, UsageError
from loracle.records.files import disk_faults
from loracle.records.names import CONFIG, MODULES
from loracle.records.run_folder import RunFolder
from loracle.runner.failure import as_failure, record_failure
from loracle.runner.run_spec import RunOutcome, RunSpec


@contextmanager
def open_folder(spec: RunSpec, *, resume: bool) -> Iterator[RunFolder]:
    """Opens a run folder; a new one is removed again if the run never got to train."""
    out = spec.out
    with disk_faults(out):
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    is_resumed = resume and (out / CONFIG).exists()
    open_ = RunFolder.reopen if is_resumed else RunFolder.create
    try:
        opened = open_(out, config=spec.config)
    except UsageError as error:
        # Refused by the disk half-way; a folder that is held or was there before is not ours.
        if isinstance(error.__cause__, OSError) and out in missing:
            _remove(out, missing=missing)
        raise
    with opened as folder:
        try:
            yield folder
        except UsageError:
            if not is_resumed and not folder.has(MODULES):
                _remove(out, missing=missing)
            elif is_resumed and not folder.has_begun:
                folder.restore_status()
            raise


def _remove(out: Path, *, missing: Sequence[Path]) -> None:
    """Removes an unused run folder, and the folders above it that were made for it."""
    shutil.rmtree(out, ignore_errors=True)
    # A parent that is not empty any more stays, and so do those above it.
    with suppress(OSError):
        if out not in missing:
            out.mkdir()
        for folder in missing[1:]:
            folder.rmdir()


@contextmanager
def recording(folders: Sequence[RunFolder], outcomes: Mapping[Path, RunOutcome]) -> Iterator[None]:
    """Records why an error or a signal ended the runs, in the folder of each that is not done."""
    try:
        yield
    except Exception as error:
        ended = [
            folder
            for folder in folders
            if folder.path not in outcomes and folder.status.get("status") == "running"
        ]
        failures = [_record_end(folder, error) for folder in ended]
        if isinstance(error, LoracleError) or not failures:
            raise
        raise failures[0] from error


def _record_end(folder: RunFolder, error: Exception) -> LoracleError:
    """Leaves in a run's folder why it ended, and returns that."""
    if isinstance(error, Interrupted):
        folder.set_status("interrupted", error=str(error))
        return error
    failure = as_failure(error, folder)
    record_failure(folder, failure)
    return failure
