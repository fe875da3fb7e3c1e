"""Scores of a study's modules: from its folder if they are of its inputs, else computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loracle.config.run import Config
from loracle.digest import Inputs, code_digest, key_of
from loracle.errors import RunFolderError
from loracle.records.files import read_json
from loracle.records.manifest import require_intact
from loracle.records.names import MODULES, SCORES
from loracle.runner.progress import Progress
from loracle.sources.cache import CONVERSION_SOURCES
from loracle.study.config import StudyConfig
from loracle.study.plan import Scores
from loracle.version import package_version

# assumed: training batches over which module scores settle (LOG.md)
SCORED_STEPS = 4
SCORE_SOURCES = (
    "data/**/*.py", "model/**/*.py", "engine/**/*.py", "seeds.py", *CONVERSION_SOURCES,
)  # fmt: skip
_SCORERS = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "gguf")


def module_scores(
    study: StudyConfig, *, base: Config, kinds: Sequence[str], out: Path, progress: Progress
) -> tuple[Scores, str | None]:
    """Returns the scores of the modules, from the study's folder if they are there, and their key.

    They are computed on the first training batches of the study's first seed, never on validation
    examples.

    Raises:
        RunFolderError: If those in the folder, by which its runs got their modules, were computed
            from other inputs than the study's.
    """
    record = _kept(out, progress=progress)
    scores, kept = record.get("scores", {}), record.get("key")
    key = scores_key(study, base=base, progress=progress)
    if all(kind in scores for kind in kinds):
        if kept is None:
            progress.notice(f"{SCORES}: records not what it was computed from; not verified")
        if kept in (None, key):
            return scores, kept
        if any((out / "runs").glob(f"*/{MODULES}")):
            raise RunFolderError(
                f"{out}: its modules were scored with another model, other data or by other code "
                "than there is now; restore them, or give another --out"
            )
        progress.notice(f"{SCORES}: computed from other inputs; computing it again")
    return _score(study, base=base, kinds=kinds, progress=progress), key


def _kept(out: Path, *, progress: Progress) -> dict[str, Any]:
    """Returns the scores in a study's folder, as recorded; empty if they are damaged."""
    try:
        require_intact(out, names=[SCORES], remedy="the modules are scored again")
        return read_json(out / SCORES) if (out / SCORES).is_file() else {}
    except RunFolderError as damage:
        progress.notice(str(damage))
        return {}


def scores_key(study: StudyConfig, *, base: Config, progress: Progress) -> str:
    """Returns the key of the module scores, without loading the model.

    A pinned model's revision stands for its weights, configuration and tokenizer.
    """
    from loracle.engine.determinism import determinism
    from loracle.engine.device import choose_device, choose_dtype, dtype_name
    from loracle.engine.environment import torch_settings
    from loracle.sources import resolve_data, resolve_model

    device = choose_device(base.device)
    data = resolve_data(base.data.source, progress=progress.notice)
    with determinism(device, requested=base.deterministic):
        settings = torch_settings()
    inputs = Inputs(
        weights=resolve_model(base.model, progress=progress.notice).revision,
        config=None,
        generation=None,
        tokenizer=None,
        dtype=dtype_name(choose_dtype(base.dtype, device=device)),
        quantization=base.quantization,
        device={"type": device.type, **settings},
        versions={name: package_version(name) for name in _SCORERS},
        code=code_digest(SCORE_SOURCES),
        asked={
            "records": data.revision,
            "data": base.data.model_dump(mode="json", exclude={"source"}),
            "seed": study.seeds[0],
            "steps": SCORED_STEPS,
            "rank": base.lora.rank,
            "batch_size": base.train.batch_size,
            "micro_batch_tokens": base.train.micro_batch_tokens,
        },
    )
    return key_of("module scores", inputs)


def _score(study: StudyConfig, *, base: Config, kinds: Sequence[str], progress: Progress) -> Scores:
    from loracle.engine.determinism import determinism
    from loracle.engine.device import choose_device
    from loracle.engine.schedule import DataOrder
    from loracle.model.scores import score_modules
    from loracle.runner.shared_base import open_shared_base
    from loracle.runner.signals import StopRequest

    scores: dict[str, Mapping[str, float]] = {}
    switched = determinism(choose_device(base.device), requested=base.deterministic)
    with StopRequest() as stop, switched:
        shared = open_shared_base(base, progress=progress, stop=stop)
        order = DataOrder(shared.data.train, batch_size=base.train.batch_size, seed=study.seeds[0])
        examples = [example for step in range(SCORED_STEPS) for example in order.batch(step)]
        with progress.phase("score the modules", total=len(kinds)) as advance:
            for kind in kinds:
                scores[kind] = score_modules(
                    shared.base,
                    examples,
                    score=kind,
                    seed=study.seeds[0],
                    rank=base.lora.rank,
                    batch_size=base.train.batch_size,
                    micro_batch_tokens=base.train.micro_batch_tokens,
                )
                advance(1, detail=kind)
                stop.check()
    return scores
