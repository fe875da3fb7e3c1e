"""Weights & Biases beside the local record: the same curves, the same summary, never in the way.

The run folder is the source of truth. Tracking asks nothing, prints nothing, waits a few seconds at
the most, and after its first failure is off for the rest of the run, with one notice. It sends
no user, host, path, program, git or system metadata: the configuration and the numbers only.

Curves are drawn over the logged ``step``, not W&B's own counter, which cannot go back: the steps
that a resumed run repeats are logged again over the same values.
"""

from __future__ import annotations

import netrc
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from loracle.config.run import flatten
from loracle.engine.small_machine import can_start_threads
from loracle.errors import LoracleError
from loracle.records.files import write_durably
from loracle.records.signature import without_folder
from loracle.sources.spec import home_folder
from loracle.text import shortened

Mode = Literal["auto", "online", "offline", "disabled"]

# assumed: a server that answers does so within a second; one that does not delays no run for long.
_INIT_TIMEOUT_S = 10.0

# assumed: what is left to upload after a run is its last few rows.
_FINISH_TIMEOUT_S = 30.0

_ID_FILE = "run_id.txt"

_ENVIRONMENT_MODES = {
    "online": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled",
}  # fmt: skip


class Tracker:
    """A run on W&B; without one every method does nothing."""

    def __init__(
        self, run: Any | None, *, mode: str, folder: Path, notice: Callable[[str], None]
    ) -> None:
        self.mode = mode
        """``online``, ``offline`` or ``disabled``, as it turned out."""
        self._run, self._folder, self._notice = run, folder, notice

    def log(self, row: Mapping[str, Any], *, step: int) -> None:
        """Adds a point at ``step`` to each curve that ``row`` names; None is no point."""
        values = _measured(row)
        self._attempt(lambda run: run.log({**values, "step": step}))

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Sets figures of the whole run, under dotted names."""
        values = _measured(summary)
        self._attempt(lambda run: run.summary.update(values))

    def finish(self, exit_code: int) -> None:
        """Ends the run on W&B; what could not be uploaded in time stays in the run folder."""
        self._attempt(lambda run: run.finish(exit_code=exit_code))
        self._run = None
        _remove_logs(self._folder)

    def _attempt(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # noqa: BLE001 - no failure of a tracker may cost a training run
            self._run = None
            self._notice(
                f"W&B: {_one_line(error)}; tracking is off from here, the local record continues "
                f"(what W&B holds is in {self._folder / 'wandb'}, see 'wandb sync')"
            )


def open_tracker(
    *,
    mode: Mode,
    project: str,
    name: str,
    config: Mapping[str, Any],
    folder: Path,
    notice: Callable[[str], None],
) -> Tracker:
    """Returns the tracker of a run; one that does nothing if tracking is disabled or fails.

    A run folder keeps one W&B run, in ``wandb``: a resumed run continues it.

    Args:
        mode: ``auto`` is ``WANDB_MODE`` if that is set, else online if there is a key in
            ``WANDB_API_KEY`` or netrc, else offline. Any other mode overrides ``WANDB_MODE``.
        project: W&B project.
        name: Name of the run.
        config: Configuration, as plain data.
        folder: The run folder.
        notice: Called with one line about each thing that went wrong.
    """
    chosen: str = mode
    if mode == "auto":
        chosen = _ENVIRONMENT_MODES.get(os.environ.get("WANDB_MODE", ""), "auto")
    run = _Run(project=project, name=name, config=_public(config), folder=folder, notice=notice)
    if chosen == "disabled":
        return run.tracker(None, mode="disabled")
    if not can_start_threads():
        # Its service would abort with a long traceback, or never return.
        notice("W&B: needs more processes than are allowed; this run is recorded locally only")
        return run.tracker(None, mode="disabled")
    try:
        # What W&B reads from the environment only while it starts.
        quiet = {
            "WANDB_SILENT": "true",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_CACHE_DIR": str(folder.absolute() / "wandb" / "cache"),
        }
        with _environment(quiet):
            return _open(run, mode=chosen)
    except Exception as error:  # noqa: BLE001 - no failure of a tracker may cost a training run
        notice(f"W&B: {_one_line(error)}; this run is recorded locally only")
        return run.tracker(None, mode="disabled")


@dataclass(frozen=True)
class _Run:
    """Identity of the run on W&B."""

    project: str
    name: str
    config: dict[str, Any]
    folder: Path
    notice: Callable[[str], None]

    def tracker(self, run: Any | None, *, mode: str) -> Tracker:
        return Tracker(run, mode=mode, folder=self.folder, notice=self.notice)


def _open(run: _Run, *, mode: str) -> Tracker:
    _remove_logs(run.folder)
    if mode == "auto":
        mode = "online" if has_key() else "offline"
    id_file = run.folder / "wandb" / _ID_FILE
    stored_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
    tracker = _open_online(run, stored_id=stored_id) if mode == "online" else None
    if tracker is None:
        # W&B's service holds on to the id of a run that failed to start online: take another one.
        run_id = stored_id if stored_id and mode == "offline" else secrets.token_hex(6)
        tracker = run.tracker(_init(run, mode="offline", run_id=run_id), mode="offline")
        if stored_id is None:
            _store_id(run.folder, run_id)
    return tracker


def _open_online(run: _Run, *, stored_id: str | None) -> Tracker | None:
    """Returns the tracker of a run that the server has accepted; None, with a notice, if not."""
    run_id = stored_id or secrets.token_hex(6)
    sessions = set(_sessions(run.folder))
    try:
        tracker = run.tracker(_init(run, mode="online", run_id=run_id), mode="online")
    except Exception as error:  # noqa: BLE001 - the next best thing is to keep it for later
        upload = f"wandb sync --id {stored_id}" if stored_id else "wandb sync"
        run.notice(f"W&B: {_one_line(error)}; tracking offline ('{upload}' uploads it later)")
        for failed in set(_sessions(run.folder)) - sessions:
            shutil.rmtree(failed, ignore_errors=True)
        return None
    _store_id(run.folder, run_id)
    return tracker


def _init(run: _Run, *, mode: str, run_id: str) -> Any:
    import wandb

    started = wandb.init(
        project=run.project,
        name=run.name,
        id=run_id,
        resume="allow",
        config=run.config,
        settings=wandb.Settings(**_settings(mode, folder=run.folder)),
    )
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started


def _settings(mode: str, *, folder: Path) -> dict[str, Any]:
    quiet = {
        "silent": True, "quiet": True, "console": "off",
        "show_info": False, "show_warnings": False, "show_errors": False,
    }  # fmt: skip
    private = {
        "x_disable_meta": True, "x_disable_machine_info": True, "x_disable_stats": True,
        "x_save_requirements": False, "disable_git": True, "disable_code": True,
        "save_code": False, "disable_job_creation": True, "label_disable": True,
        "host": "", "username": "", "email": "", "program": "loracle", "program_relpath": "loracle",
    }  # fmt: skip
    patience = {
        "init_timeout": _INIT_TIMEOUT_S, "login_timeout": _INIT_TIMEOUT_S,
        "x_service_wait": _INIT_TIMEOUT_S, "finish_timeout": _FINISH_TIMEOUT_S,
        "finish_timeout_raises": True,
    }  # fmt: skip
    return {
        "mode": mode,
        "root_dir": str(folder.absolute()),
        "symlink": False,
        # Several runs may be open in one process, and none is W&B's global one.
        "reinit": "create_new",
        # A resumed run may be checkpointed and tracked otherwise than before.
        "allow_val_change": True,
        **quiet,
        **private,
        **patience,
    }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables inside the block, and takes back what W&B sets."""
    # WANDB_SERVICE would tie the runs of child processes to the service of this one.
    before = {key: os.environ.get(key) for key in (*variables, "WANDB_SERVICE")}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def has_key() -> bool:
    """Returns whether W&B would find a key, without letting it ask for one."""
    import wandb

    try:
        with _environment({}):
            settings = wandb.setup(wandb.Settings(silent=True)).settings
        is_own_server = settings.base_url != wandb.Settings().base_url
    except Exception:  # noqa: BLE001 - W&B settings that W&B cannot read hold no key for it
        return False
    if os.environ.get("WANDB_API_KEY", "").strip() or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = {urlsplit(settings.base_url).netloc, *([] if is_own_server else ["api.wandb.ai"])}
    return bool(settings.api_key) or not hosts.isdisjoint(_netrc_hosts())


def _netrc_hosts() -> list[str]:
    named, home = os.environ.get("NETRC"), home_folder()
    in_home = [home / ".netrc", home / "_netrc"] if home else []
    candidates = [Path(named)] if named else in_home
    present = [path for path in candidates if path.exists()]
    try:
        return list(netrc.netrc(present[0]).hosts) if present else []
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
        return []


def _store_id(folder: Path, run_id: str) -> None:
    write_durably(folder / "wandb" / _ID_FILE, f"{run_id}\n".encode())


def _remove_logs(folder: Path) -> None:
    """Removes W&B's own logs and cache, which hold this machine's paths and no result."""
    for path in [folder / "wandb" / "cache", *(path / "logs" for path in _sessions(folder))]:
        shutil.rmtree(path, ignore_errors=True)


def _sessions(folder: Path) -> list[Path]:
    """Returns W&B's folder of each time the run was started."""
    return list((folder / "wandb").glob("*run-*"))


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten(row).items() if value is not None}


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration without the folders of local sources."""
    public = {key: _public(v) for key, v in config.items() if isinstance(v, Mapping)}
    words = {key: without_folder(v) for key, v in config.items() if isinstance(v, str)}
    return {**config, **public, **words}


def _one_line(error: Exception) -> str:
    text = shortened(error)
    return text if isinstance(error, LoracleError) else f"{type(error).__name__} {text}".strip()
