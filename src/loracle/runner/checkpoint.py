"""Checkpoints: the state of a run, complete on disk or not there.

::

    checkpoints/step-00000040/state.safetensors   adapter and optimizer tensors, to the bit
                              state.json          step, and what else the run resumes from
                              steps.jsonl, ...    copies of the run's growing records
                              manifest.json       sizes and SHA-256 of the others, written last
    checkpoints/step-00000060.4242.tmp/           half-written; ignored, removed by the next save

A checkpoint gets its name when all of it is on the disk. The files of one that is not kept any more
are written over rather than removed, as long as another complete one is there: a synced folder
(Colab's Drive) keeps what is removed in a bin that counts, and earlier contents of a file do not.
Source: Google Drive API v3, files, quotaBytesUsed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from loracle.records.files import disk_faults, strict_json, sync_folder, write_synced

_TENSORS, _STATE, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
_OWN = (_TENSORS, _STATE)

# ".old": replaced by a newer save of the same step, and valid until that one has the name.
_NAME = re.compile(r"step-(\d{8,})(\.old)?")


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after a step."""

    step: int
    """Optimizer steps taken."""
    tensors: dict[str, torch.Tensor]
    """Adapter and optimizer tensors by name; each keeps its dtype and its bits."""
    state: dict[str, Any] = field(default_factory=dict)
    """Everything else, as JSON."""
    records: dict[str, bytes] = field(default_factory=dict)
    """Contents of the run's growing files; none in checkpoints of older versions."""


class _Damaged(Exception):
    """A checkpoint that differs from its manifest; never leaves this module."""


def save_checkpoint(folder: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Writes a checkpoint and returns its folder once it is on the disk.

    The ``keep`` - 1 newest undamaged ones before it stay. A later step's goes: it is damaged, or of
    a past that this run has left. With ``keep`` = 1 the others go only when it is there.

    Raises:
        RunFolderError: If it cannot be written; what was there before is untouched.
    """
    final = folder / f"step-{snapshot.step:08d}"
    temporary = folder / f"{final.name}.{os.getpid()}.tmp"
    with disk_faults(final):
        folder.mkdir(parents=True, exist_ok=True)
        kept = _kept_beside(final, keep=keep)
        _recycle(folder, into=temporary, final=final, kept=kept)
        try:
            _write(temporary, snapshot)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        # At no moment is there none of this step.
        if final.exists():
            old = final.with_name(f"{final.name}.old")
            _remove(old)
            final.rename(old)
        temporary.rename(final)
        sync_folder(folder)
        _prune(folder, kept=[final, *kept])
    return final


def load_latest(
    folder: Path, *, notice: Callable[[str], None], up_to: int | None = None
) -> Snapshot | None:
    """Returns the newest complete and undamaged checkpoint, at most of step ``up_to``, or None.

    ``notice`` gets one line about each half-written or damaged checkpoint that is passed over.
    """
    for path in sorted(folder.glob("step-*.tmp")):
        notice(f"{path.name}: half-written checkpoint, ignored")
    for path in _newest_first(folder):
        if up_to is not None and _order(path)[0] > up_to:
            continue
        try:
            return _read(path)
        except _Damaged as damage:
            notice(f"{path.name}: damaged checkpoint ({damage}), the one before it is used")
    return None


def sound_steps(folder: Path) -> list[int]:
    """Returns the steps of the complete and undamaged checkpoints, in order."""
    return sorted({_order(path)[0] for path in _newest_first(folder) if _is_undamaged(path)})


def _write(path: Path, snapshot: Snapshot) -> None:
    path.mkdir(exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in snapshot.tensors.items()}
    state = {"step": snapshot.step, "state": snapshot.state}
    contents = {
        _TENSORS: safetensors_torch.save(tensors),
        _STATE: strict_json(state, origin=_STATE).encode(),
        **snapshot.records,
    }
    for left in path.iterdir():
        if left.name not in (*contents, _MANIFEST):
            left.unlink()
    for name, content in contents.items():
        write_synced(path / name, content)
    manifest = {name: _fingerprint(content) for name, content in contents.items()}
    write_synced(path / _MANIFEST, json.dumps(manifest, indent=2).encode())
    sync_folder(path)


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _kept_beside(final: Path, *, keep: int) -> list[Path]:
    """Returns the checkpoints that stay when ``final`` is there."""
    kept: list[Path] = []
    for path in _newest_first(final.parent):
        earlier = _order(path) < _order(final) and not path.name.endswith(".old")
        if len(kept) < keep - 1 and earlier and _is_undamaged(path):
            kept.append(path)
    return kept


def _recycle(folder: Path, *, into: Path, final: Path, kept: Sequence[Path]) -> None:
    """Takes the name of a folder that is not needed any more, whose files are then written over."""
    unused = sorted(folder.glob("step-*.tmp"))
    if kept:
        # Oldest first; not one of this very step, which is replaced only by its successor.
        saved = reversed(_newest_first(folder))
        same = (final, final.with_name(f"{final.name}.old"))
        unused += [path for path in saved if path not in (*kept, *same)]
    if unused and not into.exists():
        unused[0].rename(into)


def _prune(folder: Path, *, kept: Sequence[Path]) -> None:
    for path in _newest_first(folder):
        if path not in kept:
            _remove(path)
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Removes a checkpoint by taking its name away first, so that none is ever half there."""
    if path.exists():
        doomed = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    saved = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(saved, key=_order, reverse=True)


def _order(path: Path) -> tuple[int, bool]:
    name = _NAME.fullmatch(path.name)
    assert name is not None
    return int(name[1]), name[2] is None


def _read(path: Path) -> Snapshot:
    contents = _verified(path)
    try:
        saved = json.loads(contents[_STATE])
        tensors = safetensors_torch.load(contents[_TENSORS])
        records = {name: contents[name] for name in contents if name not in _OWN}
        return Snapshot(saved["step"], tensors=tensors, state=saved["state"], records=records)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _Damaged(f"{type(error).__name__} behind a valid manifest") from error


def _is_undamaged(path: Path) -> bool:
    try:
        _verified(path)
    except _Damaged:
        return False
    return True


def _verified(path: Path) -> dict[str, bytes]:
    """Returns the contents of a checkpoint's files, if they are what its manifest says."""
    try:
        manifest = json.loads(_read_bytes(path / _MANIFEST))
    except ValueError:
        raise _Damaged(f"{_MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict):
        raise _Damaged(f"{_MANIFEST} is not a JSON object")
    contents = {name: _read_bytes(path / name) for name in {*_OWN, *manifest}}
    for name, content in contents.items():
        if manifest.get(name) != _fingerprint(content):
            raise _Damaged(f"{name} is not what was written")
    return contents


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _Damaged(f"{path.name}: {error.strerror}") from None
