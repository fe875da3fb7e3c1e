"""Provenance of a study: seeds, examples, device, date, commit, versions."""

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
_PLATFORM = ("system", "release", "machine")
_VERSIONS = ("torch", "transformers", "peft", "sacrebleu", "numpy")


@dataclass(frozen=True)
class Provenance:
    """The provenance under every table."""

    seeds: tuple[int, ...]
    """Seeds that any arm completed."""
    num_examples: int
    """Scored validation examples."""
    num_targets: int
    """Target tokens of these."""
    num_answers: int | None
    """Answered validation instructions; None: none."""
    devices: tuple[str, ...]
    date: str
    """Day on which the last run finished, as YYYY-MM-DD in UTC."""
    commits: tuple[str, ...]
    """Commits of the code, each with ``+changes`` if the checkout was not clean."""

    @property
    def line(self) -> str:
        """The provenance in one line."""
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
    """Returns the provenance of a study's numbers."""
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
    """Returns device, system and versions of the runs, as name and value."""
    environments = [environment for run in study.runs if (environment := _environment(run))]
    rows = [
        ("device", _distinct(run.result.device for run in study.runs)),
        (
            "operating system",
            _distinct(" ".join(env["platform"][key] for key in _PLATFORM) for env in environments),
        ),
        ("Python", _distinct(str(env["python"]) for env in environments)),
        *((name, _values_of(environments, "versions", name)) for name in _VERSIONS),
        ("threads", _values_of(environments, "torch_settings", "num_threads")),
        ("LoRAcle commit", _distinct(_commit(env) or "n/a" for env in environments)),
    ]
    return [(name, value) for name, value in rows if value]


def signature_rows(study: StudyRecord) -> list[tuple[str, str]]:
    """Returns each arm with the signature of its runs, without the seed."""
    rows = []
    for arm in study.arms:
        signatures = _once(
            without_seed(run.result.signature) for run in study.runs_of(arm.name).values()
        )
        rows += [(arm.name, signature) for signature in signatures]
    return rows


def data_of(study: StudyRecord) -> Mapping[str, Any]:
    """Returns ``data.json`` of the first run; empty if it has none."""
    file = study.runs[0].path / DATA
    return read_json(file) if file.is_file() else {}


def _environment(run: RunRecord) -> Mapping[str, Any]:
    file = run.path / ENVIRONMENT
    return read_json(file) if file.is_file() else {}


def _commit(environment: Mapping[str, Any]) -> str | None:
    code = environment.get("loracle", {})
    if not code.get("commit"):
        return None
    return str(code["commit"])[:_SHORT_COMMIT] + ("+changes" if code.get("dirty") else "")


def _values_of(environments: Iterable[Mapping[str, Any]], section: str, key: str) -> str:
    return _distinct(str(env.get(section, {}).get(key) or "") for env in environments)


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(filter(None, _once(values)))


def _once(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
