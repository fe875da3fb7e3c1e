"""Answers of the untuned and the tuned model of a run to an instruction of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.data import Record, encode_prompts, template_of
from loracle.engine.answers import Answer, answer_prompts
from loracle.engine.device import choose_device, choose_dtype
from loracle.errors import RunFolderError
from loracle.model.adapters import load_adapter
from loracle.model.base import FrozenBase
from loracle.model.identity import identify
from loracle.model.limits import require_reach
from loracle.model.load import load_base
from loracle.placement import ModulePlan
from loracle.records.files import read_json
from loracle.records.manifest import require_intact
from loracle.records.names import ADAPTER, MODULES, RESULT
from loracle.records.result import read_result
from loracle.records.run_state import recorded_config
from loracle.runner.active_run import DEFAULT_ADAPTER
from loracle.runner.finish import saved_weights
from loracle.runner.place import place_of
from loracle.runner.progress import Progress
from loracle.runner.same_inputs import READERS, base_record, require_same_base
from loracle.sources import ResolvedSource, resolve_model
from loracle.sources.cache import sha256_file
from loracle.version import package_version

_REMEDY = "restore it, or run it again"


@dataclass(frozen=True)
class Answers:
    """One instruction, answered twice."""

    prompt: str
    """Text that the model was given."""
    base: Answer
    tuned: Answer


def sample_run(
    run: Path,
    *,
    instruction: str,
    input_text: str = "",
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> Answers:
    """Returns the greedy answers of a run's base and tuned model.

    Args:
        run: Folder of a run that saved its adapter.
        instruction: The instruction.
        input_text: The record's input; empty if it has none.
        max_new_tokens: Tokens per answer; defaults to those of the run's evaluation.
        progress: Takes notices; defaults to standard error.

    Raises:
        RunFolderError: If there is no run, it has no adapter yet, or its base is another one now.
    """
    with place_of(run):
        return _sample(
            run,
            Record(row=0, instruction=instruction, input=input_text, output=""),
            max_new_tokens=max_new_tokens,
            progress=progress or Progress(),
        )


def _sample(
    run: Path, record: Record, *, max_new_tokens: int | None, progress: Progress
) -> Answers:
    config = recorded_config(run)
    require_intact(run, remedy=_REMEDY)
    unfinished = RunFolderError(f"{run}: has no adapter yet; finish the run with --resume")
    if not (run / MODULES).is_file():
        raise unfinished
    plan = ModulePlan.from_json(read_json(run / MODULES))
    saved = saved_weights(run, is_full=plan.is_full)
    if not saved.is_file():
        raise unfinished
    require_intact(run, below=ADAPTER, remedy=_REMEDY)
    _require_recorded(saved, run=run)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device=device)
    model = resolve_model(config.model, progress=progress.notice)
    base = load_base(model.path, device=device, dtype=dtype, quantization=config.quantization)
    require_same_base([run], now=_base_here(base, model=model), notice=progress.notice)
    template = template_of(config.data.template)
    prompt = template.render(record)
    (ids,) = encode_prompts([record], template=template, tokenizer=base.tokenizer)
    require_reach(
        base,
        tokens=len(ids) + (max_new_tokens or config.eval.max_new_tokens),
        what="the prompt and its answer",
        remedy="ask something shorter, or for a shorter answer",
    )

    def answered(by: FrozenBase, adapter: str | None) -> Answer:
        return answer_prompts(
            by,
            [ids],
            adapter=adapter,
            max_new_tokens=max_new_tokens or config.eval.max_new_tokens,
            batch_size=1,
        )[0]

    untuned = answered(base, None)
    if plan.is_full:
        tuned = load_base(saved.parent, device=device, dtype=dtype, trains=True)
        return Answers(prompt, base=untuned, tuned=answered(tuned, None))
    load_adapter(base, name=DEFAULT_ADAPTER, plan=plan, saved=saved, model_source=model.source)
    return Answers(prompt, base=untuned, tuned=answered(base, DEFAULT_ADAPTER))


def _base_here(base: FrozenBase, *, model: ResolvedSource) -> dict[str, Any]:
    """Returns the parts of an environment that tell whether the base is a run's."""
    identity = identify(base, folder=model.path, weights_digest=base.weights_digest())
    versions = {name: package_version(name) for name in READERS}
    record = base_record(identity, revision=model.revision, device=base.device.type)
    return {"base": record, "versions": versions}


def _require_recorded(saved: Path, *, run: Path) -> None:
    """Raises unless the trained weights are those of the run's result, if it has one."""
    if (run / RESULT).is_file() and sha256_file(saved) != read_result(
        run, verify=False
    ).adapter_sha256:
        raise RunFolderError(
            f"{saved}: is not what the run recorded (adapter_sha256 in {RESULT}); {_REMEDY}"
        )
