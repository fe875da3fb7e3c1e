"""What plans and runs say of every causal architecture of Transformers.

    python benchmarks/architectures.py FILE [--only TYPE ...] [--most-s SECONDS]

For each model type, a miniature of its default configuration (where none runs, that itself): what a
run says of it before training (its checks of a base and of all-linear), and what ``loracle plan``
says, on a CPU, a T4 and an H100. No outcome may be a fault, and a plan is refused where the run is.
Rows go to FILE as they are made, and a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loracle.config.files import load_config
from loracle.config.run import Config
from loracle.errors import UsageError
from loracle.forecast import small_model
from loracle.forecast.cases import PlannedArms, predict_cases
from loracle.forecast.devices import DEVICES, Device
from loracle.model.base import FrozenBase
from loracle.model.guard import checked, require_long_rows
from loracle.model.inventory import inventory_from_architecture
from loracle.model.reach import require_reached
from loracle.placement import ModulePlan, resolve_placement
from loracle.screen import quiet_transformers

_DEVICES = {
    "cpu": Device("cpu", 64, has_bf16=False, is_gpu=False),
    "t4": DEVICES["t4"],
    "h100": DEVICES["h100"],
}
_SETTINGS = ("data.max_tokens=96", "eval.max_new_tokens=8", "eval.generate_batch_size=2")
# A type that takes longer is a fault.
_MOST_S = 120


def main() -> int:
    """Fills FILE and prints what it counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--most-s", type=float, default=float("inf"))
    given = parser.parse_args()
    table: dict[str, Any] = {
        "transformers": transformers_version,
        "settings": _SETTINGS,
        "rows": {},
    }
    if given.file.exists():
        table = json.loads(given.file.read_text(encoding="utf-8"))
    signal.signal(signal.SIGALRM, _too_long)
    until = time.monotonic() + given.most_s
    for model_type in given.only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if (model_type in table["rows"] and not given.only) or time.monotonic() > until:
            continue
        table["rows"][model_type] = row = row_of(model_type)
        print(model_type, row, file=sys.stderr, flush=True)
        given.file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(summary(table["rows"]))
    return 0


def _too_long(*_: object) -> None:
    raise TimeoutError(f"longer than {_MOST_S} s")


def row_of(model_type: str) -> dict[str, str]:
    """Returns what a run and plans say of a small model of this type."""
    small_model._small_base.cache_clear()
    try:
        with quiet_transformers():
            architecture = _fields(AutoConfig.for_model(model_type), model_type)
    except Exception as error:  # noqa: BLE001 - of whatever kind, it is a row
        return {"default": f"not tried: its default configuration is none ({_words(error)})"}
    config = load_config(overrides=[f"model={model_type}", *_SETTINGS])
    base = None
    with suppress(UsageError):
        base = small_model.random_base(architecture)
    small = architecture if base is None else _fields(base.model.config, model_type)
    row = {"run": _outcome(lambda: _run(base, small, config))}
    for name, device in _DEVICES.items():
        row[name] = _outcome(lambda device=device: _plan(small, config, device=device))
    return row


def _fields(config: Any, model_type: str) -> dict[str, Any]:
    return {**json.loads(config.to_json_string(use_diff=False)), "model_type": model_type}


def _outcome(work: Callable[[], str]) -> str:
    signal.alarm(_MOST_S)
    try:
        return work()
    except UsageError as error:
        return f"{'not planned' if 'cannot be planned' in str(error) else 'refused'}: {error}"
    except Exception as error:  # noqa: BLE001 - of whatever kind, it is a row
        return f"fault: {_words(error)}"
    finally:
        signal.alarm(0)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _run(base: FrozenBase | None, architecture: Mapping[str, Any], config: Config) -> str:
    plan = _all_linear(architecture)
    if base is None:
        small_model.random_base(architecture)
        return "not tried: no small model of it runs"
    base = checked(base)
    require_long_rows(base, tokens=config.data.max_tokens)
    require_reached(base, plan=plan)
    return "ran" if base.plain_head else "ran, logits of its own"


def _plan(architecture: Mapping[str, Any], config: Config, *, device: Device) -> str:
    plan = _all_linear(architecture)
    arms = PlannedArms("sweep", config, architecture, {"all-linear": plan}, {"all-linear": 1}, ())
    predict_cases(arms, [("all-linear", config)], device=device, rates=None)
    return "planned"


def _all_linear(architecture: Mapping[str, Any]) -> ModulePlan:
    with quiet_transformers():
        inventory = inventory_from_architecture(architecture)
    return resolve_placement("all-linear", inventory=inventory, rank=4, alpha=8.0)


def summary(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Returns the outcomes of runs and plans, counted."""
    lines = []
    for column in ("run", *_DEVICES):
        kinds = Counter(
            row.get(column, "not tried").split(":")[0].split(" (")[0] for row in rows.values()
        )
        lines.append(f"{column}: " + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()))
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
