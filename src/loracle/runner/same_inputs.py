"""Whether a run that goes on still has the base and the data that it began with.

What a run begins with is recorded in ``environment.json``, under ``base``: digests of what the
model is, not where it lies. Records of older versions have none; what cannot be verified is said
in one line and not refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loracle.data import PreparedData
from loracle.digest import digest_of
from loracle.errors import RunFolderError
from loracle.model.identity import BaseIdentity
from loracle.records.files import read_json
from loracle.records.names import DATA, ENVIRONMENT

# Parts of a base, by their key in the record.
_PARTS = {
    "weights_sha256": "weights",
    "config_sha256": "config.json",
    "generation_config_sha256": "generation_config.json",
    "tokenizer_sha256": "tokenizer",
}
# What the bits of the weights depend on besides the weights.
_FORM = ("dtype", "quantization", "device")
# Libraries that read a base; another version may describe the same files otherwise.
READERS = ("transformers", "tokenizers", "torch", "bitsandbytes")


@dataclass(frozen=True)
class BaseCheck:
    """Outcome of comparing a recorded base with the one that is here."""

    changed: tuple[str, ...] = ()
    """Parts that are not what they were."""
    unverified: str = ""
    """Why something cannot be compared; empty if all could."""


def base_record(identity: BaseIdentity, *, revision: str, device: str) -> dict[str, Any]:
    """Returns the section ``base`` of ``environment.json``.

    Args:
        identity: Digests of the base.
        revision: Its pinned commit or hash.
        device: ``cpu`` or ``cuda``; packed weights have other bits on another one.
    """
    where = device if identity.quantization else None
    return {"revision": revision, **asdict(identity), "device": where}


def held_out_digest(data: PreparedData) -> str:
    """Returns a digest of the held-out texts, of which tokens may be only the beginning."""
    records = [example.record for example in data.validation]
    return digest_of([[record.instruction, record.input, record.output] for record in records])


def compare_base(before: Mapping[str, Any], now: Mapping[str, Any]) -> BaseCheck:
    """Returns how the base of one environment differs from that of another, both as recorded."""
    recorded, here = before.get("base"), now["base"]
    if recorded is None:
        return BaseCheck(unverified="its record has no digests of its base")
    same_files = recorded["revision"] == here["revision"]
    parts, unverified = dict(_PARTS), ""
    if any(recorded[key] != here[key] for key in _FORM):
        del parts["weights_sha256"]
        if not same_files:
            unverified = f"its weights were {recorded['dtype']} and are {here['dtype']} here"
    changed = tuple(part for key, part in parts.items() if recorded[key] != here[key])
    if changed and same_files and _readers(before) != _readers(now):
        return BaseCheck(unverified=f"other versions read its {' and '.join(changed)}")
    return BaseCheck(changed, unverified)


def _readers(environment: Mapping[str, Any]) -> list[Any]:
    return [environment["versions"].get(name) for name in READERS]


def require_same_base(
    runs: Sequence[Path], *, now: Mapping[str, Any], notice: Callable[[str], None]
) -> None:
    """Checks that these runs were begun with the base that is here.

    Args:
        runs: Their folders.
        now: What ``environment.json`` of a run would hold that begins now.
        notice: Takes one line for a person about runs for which that cannot be verified.

    Raises:
        RunFolderError: Naming the first run with another base, and what changed.
    """
    unverified: dict[str, list[str]] = {}
    for run in runs:
        check = compare_base(_environment_of(run), now)
        if check.changed:
            raise RunFolderError(
                f"{run.name}: the base model changed since the run began "
                f"({', '.join(check.changed)}); restore it or start a new run"
            )
        if check.unverified:
            unverified.setdefault(check.unverified, []).append(run.name)
    for why, names in unverified.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notice(f"{names[0]}{others}: that the base is the same cannot be verified: {why}")


def _environment_of(run: Path) -> Mapping[str, Any]:
    """Returns what a run began in; empty if that was damaged, and so taken away."""
    return read_json(run / ENVIRONMENT) if (run / ENVIRONMENT).is_file() else {}


def require_same_data(runs: Sequence[Path], *, data: PreparedData, now: Mapping[str, Any]) -> None:
    """Checks that these runs were begun with the data that are here.

    Raises:
        RunFolderError: Naming the first run with other data.
    """
    for run in runs:
        fingerprint = read_json(run / DATA)["fingerprint"]
        if fingerprint != data.fingerprint:
            raise RunFolderError(
                f"{run.name}: the data changed since the run began (fingerprint {fingerprint}, "
                f"now {data.fingerprint}); restore it or start a new run"
            )
        texts = _environment_of(run).get("held_out_sha256", now["held_out_sha256"])
        if texts != now["held_out_sha256"]:
            raise RunFolderError(
                f"{run.name}: the held-out texts changed since the run began, beyond the tokens "
                "that are read; restore them or start a new run"
            )
