"""Where a study's numbers come from: seeds, examples, device, date, commit, versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loracle.records.files import read_json
from loracle.records.find_runs import without_seed
from loracle.records.names import DATA, ENVIRONMENT
from loracle.records.study_folder import RunRecord, StudyRecord
from loracle.text import plural

_SHORT_COMMIT = 7
_VERSIONS = ("torch", "transformers", "peft", "sacrebleu", "numpy")


@dataclass(frozen=True)
class Provenance:
    """What stands under every table."""

    seeds: tuple[int, ...]
    """Seeds that some arm completed."""
    num_examples: int
    """Validation examples scored."""
    num_targets: int
    """Their target tokens."""
    num_answers: int | None
    """Validation instructions answered; None: none."""
    devices: tuple[str, ...]
    """Devices the runs name."""
    date: str
    """Day on which the last run finished, as YYYY-MM-DD in UTC."""
    commits: tuple[str, ...]
    """Commits of the code, each with ``+changes`` if the checkout was not clean."""

    @property
    def line(self) -> str:
        """All of it in one line."""
        return ", ".join(
            (
                plural(len(self.seeds), "seed"),
                plural(self.num_examples, "validation example"),
                f"{self.num_targets:,} target tokens",
                " and ".join(self.devices),
                self.date,
                f"commit {' and '.join(self.commits) or 'n/a'}",
            )
        )


def provenance_of(study: StudyRecord) -> Provenance:
    """Returns where the study's numbers come from."""
    counted = [run for run in study.runs if run.role == "arm"] or list(study.runs)
    tuned = counted[0].result.quality.tuned
    return Provenance(
        seeds=tuple(sorted({run.seed for run in counted})),
        num_examples=tuned.num_examples,
        num_targets=tuned.num_targets,
        num_answers=tuned.num_answers,
        devices=_once(run.result.device for run in study.runs),
        date=max(run.result.finished_at for run in study.runs)[:10],
        commits=_once(filter(None, (_commit(_environment(run)) for run in study.runs))),
    )


def environment_rows(study: StudyRecord) -> list[tuple[str, str]]:
    """Returns what the runs were measured on, as name and value."""
    environments = [environment for run in study.runs if (environment := _environment(run))]
    rows = [
        ("device", _distinct(run.result.device for run in study.runs)),
        ("operating system", _distinct(_platform(found) for found in environments)),
        ("Python", _distinct(str(found["python"]) for found in environments)),
        *((name, _distinct(_version(found, name) for found in environments)) for name in _VERSIONS),
        ("threads", _distinct(_threads(found) for found in environments)),
        ("LoRAcle commit", _distinct(_commit(found) or "n/a" for found in environments)),
    ]
    return [(name, value) for name, value in rows if value]


def signature_rows(study: StudyRecord) -> list[tuple[str, str]]:
    """Returns each arm with the signature that its runs share but for the seed."""
    rows = []
    for arm in study.arms:
        signatures = _once(
            without_seed(run.result.signature) for run in study.runs_of(arm.name).values()
        )
        rows += [(arm.name, signature) for signature in signatures]
    return rows


def data_of(study: StudyRecord) -> Mapping[str, Any]:
    """Returns what the first run recorded about its data; empty if it did not."""
    file = study.runs[0].path / DATA
    return read_json(file) if file.is_file() else {}


def _environment(run: RunRecord) -> Mapping[str, Any]:
    file = run.path / ENVIRONMENT
    return read_json(file) if file.is_file() else {}


def _commit(environment: Mapping[str, Any]) -> str | None:
    found = environment.get("loracle", {})
    if not found.get("commit"):
        return None
    return str(found["commit"])[:_SHORT_COMMIT] + ("+changes" if found.get("dirty") else "")


def _platform(environment: Mapping[str, Any]) -> str:
    found = environment["platform"]
    return f"{found['system']} {found['release']} {found['machine']}"


def _version(environment: Mapping[str, Any], name: str) -> str:
    return str(environment.get("versions", {}).get(name) or "")


def _threads(environment: Mapping[str, Any]) -> str:
    return str(environment.get("torch_settings", {}).get("num_threads") or "")


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(filter(None, _once(values)))


def _once(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
