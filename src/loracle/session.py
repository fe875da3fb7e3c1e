"""A run in progress: its inputs resolved, its base loaded, its state where it was left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loracle.checkpoint import load_latest
from loracle.config import Config, config_digest
from loracle.data import Example, PreparedData, prepare_data
from loracle.device import choose_device, choose_dtype, dtype_name
from loracle.environment import capture_environment, environment_differences, signature
from loracle.errors import RunFolderError
from loracle.measure import MemoryMeter
from loracle.model.adapters import Adapter, attach_adapter
from loracle.model.base import FrozenBase, load_base
from loracle.model.inventory import inventory_of
from loracle.placement import ModulePlan, resolve_placement
from loracle.record import RunFolder
from loracle.screen import Screen
from loracle.signals import StopRequest
from loracle.sources import ResolvedSource, catalog, resolve_data, resolve_model
from loracle.train import TrainingRun, new_run, restore_state

# PEFT saves an adapter of this name without a folder of its own.
ADAPTER = "default"


@dataclass
class Session:
    """A run in progress and everything it needs."""

    folder: RunFolder
    config: Config
    screen: Screen
    stop: StopRequest
    memory: MemoryMeter
    model: ResolvedSource
    base: FrozenBase
    data: PreparedData
    plan: ModulePlan
    adapter: Adapter
    run: TrainingRun
    environment: dict[str, Any]
    signature: str
    frozen_digest: str
    micro_batch_tokens: int
    """Tokens per forward pass in training."""

    @property
    def scored(self) -> Sequence[Example]:
        """The validation examples that are scored."""
        return self.data.validation[: self.config.eval.max_examples]

    @property
    def answered(self) -> Sequence[Example]:
        """The validation examples whose instruction is answered."""
        return self.data.validation[: self.config.eval.generate_examples]


def prepare(folder: RunFolder, *, config: Config, screen: Screen, stop: StopRequest) -> Session:
    """Resolves sources, loads the base, tokenises, attaches the adapter, restores the state."""
    folder.set_status("running", phase="prepare")
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device=device)
    memory = MemoryMeter(device)
    model = resolve_model(config.model, progress=screen.notice)
    source = resolve_data(config.data.source, progress=screen.notice)
    stop.check()
    with memory.phase("load"):
        base = load_base(model.path, device=device, dtype=dtype)
    data = prepare_data(source, config=config.data, tokenizer=base.tokenizer)
    plan = resolve_placement(
        config.lora.placement,
        inventory=inventory_of(base.model),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
    )
    environment = capture_environment(device=str(device), dtype=dtype_name(dtype))
    _record_inputs(folder, data=data, plan=plan, environment=environment, screen=screen)
    digest = base.weights_digest()
    adapter = attach_adapter(
        base,
        name=ADAPTER,
        plan=plan,
        dropout=config.lora.dropout,
        seed=config.seed,
        model_source=model.source,
    )
    run = new_run(
        base,
        adapter=adapter,
        examples=data.train,
        train=config.train,
        dropout=config.lora.dropout,
        seed=config.seed,
    )
    _restore(folder, run=run, screen=screen)
    screen.notice(
        f"{config.model} on {config.data.source}: {plan.placement}, {plan.trainable_params:,} of "
        f"{plan.base_params:,} parameters train; {len(data.train)} training and "
        f"{len(data.validation)} validation examples; {dtype_name(dtype)} on {device}"
    )
    return Session(
        folder=folder,
        config=config,
        screen=screen,
        stop=stop,
        memory=memory,
        model=model,
        base=base,
        data=data,
        plan=plan,
        adapter=adapter,
        run=run,
        environment=environment,
        signature=signature(
            config=config,
            model=f"{config.model}@{model.revision}",
            data=data.fingerprint,
            placement=plan.placement,
            environment=environment,
        ),
        frozen_digest=digest,
        micro_batch_tokens=token_budget(config, device_type=device.type),
    )


def token_budget(config: Config, *, device_type: str) -> int:
    """Returns the tokens per forward pass: the config's, or fewer if the model's profile says so.

    A large model's profile lowers memory and changes no figure.
    """
    entry = catalog().models.get(config.model)
    profile = entry.profiles.get(device_type) if entry else None
    asked = config.train.micro_batch_tokens
    return min(asked, profile.micro_batch_tokens) if profile else asked


def _record_inputs(
    folder: RunFolder,
    *,
    data: PreparedData,
    plan: ModulePlan,
    environment: dict[str, Any],
    screen: Screen,
) -> None:
    """Writes what the run starts from; on resume, requires that it is still the same.

    Raises:
        RunFolderError: If a continued run would see other data or train other modules.
    """
    if (folder.path / "modules.json").exists():
        before = folder.read_json("data.json")["fingerprint"]
        if before != data.fingerprint:
            raise RunFolderError(
                f"{folder.path.name}: the data changed since the run began (fingerprint {before}, "
                f"now {data.fingerprint}); restore it or start a new run"
            )
        if folder.read_json("modules.json") != plan.to_json():
            raise RunFolderError(
                f"{folder.path.name}: the model's modules changed since the run began; "
                "start a new run"
            )
        changed = environment_differences(folder.read_json("environment.json"), environment)
        if changed:
            screen.notice(f"resuming in another environment: {'; '.join(changed)}")
    folder.write_json("environment.json", environment)
    folder.write_json("data.json", data.report)
    folder.write_json("modules.json", plan.to_json())


def _restore(folder: RunFolder, *, run: TrainingRun, screen: Screen) -> None:
    """Puts the run and its records back to the newest checkpoint, or to step 0."""
    snapshot = load_latest(folder.path / "checkpoints", notice=screen.notice)
    if snapshot is not None:
        digest = config_digest(folder.config)
        if snapshot.state["config_digest"] != digest:
            raise RunFolderError(
                f"{folder.path.name}: its checkpoint belongs to another configuration "
                f"({snapshot.state['config_digest']}, not {digest})"
            )
        restore_state(run, tensors=snapshot.tensors, state=snapshot.state)
        screen.notice(f"resuming after step {run.step} of {run.train.max_steps}")
    folder.rewind(run.step)
