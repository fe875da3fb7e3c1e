"""Captures what a run's numbers depend on besides its configuration.

Nothing recorded identifies a person or place: no host, no user, no absolute path, no token.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from loracle.digest import PACKAGE, code_digest
from loracle.model.layers.ops import has_kernels
from loracle.text import GIB
from loracle.version import __version__, package_version

_PACKAGES = (
    "torch", "transformers", "peft", "accelerate",
    "tokenizers", "safetensors", "sacrebleu", "numpy", "wandb",
)  # fmt: skip
# The parts of the checkout that can change a number; a changed README does not make it dirty.
_SOURCES = ("src", "experiments", "pyproject.toml")
# The rooms whose code can change a number: two commits that agree in them are one engine.
ENGINE_SOURCES = (
    "data/**/*.py", "placement/**/*.py", "model/**/*.py", "engine/**/*.py", "runner/**/*.py",
    "seeds.py",
)  # fmt: skip


def capture_environment(
    *, device: str, dtype: str, quantization: str | None = None
) -> dict[str, Any]:
    """Returns the content of ``environment.json``.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: dtype of the frozen base, resolved.
        quantization: How its linear layers are packed, if they are.
    """
    cpu, gpus = cpu_model(), _gpus()
    on_gpu = device.startswith("cuda")
    name = str(gpus[int(device.partition(":")[2] or 0)]["name"]) if on_gpu else cpu
    affinity = getattr(os, "sched_getaffinity", None)
    usable_cores = len(affinity(0)) if affinity else os.cpu_count()
    return {
        "schema": 1,
        "captured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "loracle": {
            "version": __version__,
            **_checkout(PACKAGE.parents[1]),
            "engine": code_digest(ENGINE_SOURCES)[:12],
        },
        "python": platform.python_version(),
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
        },
        "cpu": {"model": cpu, "logical_cores": os.cpu_count(), "usable_cores": usable_cores},
        "memory_gib": round(psutil.virtual_memory().total / GIB, 2),
        "device": {"name": name, "dtype": dtype}
        | ({"quantization": quantization} if quantization else {}),
        "gpus": gpus,
        "cuda": _cuda() if gpus else None,
        "torch_settings": torch_settings(),
        "torch_build": _torch_build(),
        "versions": {
            package: package_version(package)
            for package in (
                *_PACKAGES,
                *(["bitsandbytes"] if quantization else []),
                *(["triton"] if gpus else []),
            )
        },
    }


def _checkout(root: Path) -> dict[str, Any]:
    """Returns commit and dirty flag of the checkout LoRAcle runs from; null for an installed one.

    Only a checkout of LoRAcle itself counts, not another repository that contains a virtual
    environment with LoRAcle installed.
    """
    unknown = {"commit": None, "dirty": None}
    if not (root / ".git").exists() or not (root / "src" / "loracle").is_dir():
        return unknown
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *_SOURCES)
    if commit is None or changes is None:
        return unknown
    return {"commit": commit, "dirty": bool(changes)}


def _git(root: Path, *words: str) -> str | None:
    # GIT_DIR and similar variables, set by a hook or a user, would select another repository.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return _output("git", "-C", str(root), *words, env=clean)


def _output(*command: str, env: Mapping[str, str] | None = None) -> str | None:
    """Returns a command's output; None if it is missing, fails or hangs."""
    try:
        completed = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return completed.stdout.strip()


def cpu_model() -> str:
    """Returns the processor's model name, where the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.M)
        if match:
            return match[1].strip()
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "memory_gib": round(gpu.total_memory / GIB, 2),
            "compute_capability": f"{gpu.major}.{gpu.minor}",
        }
        for gpu in gpus
    ]


def _cuda() -> dict[str, Any]:
    # Annotated here because not every release of PyTorch annotates it.
    cudnn_version: Callable[[], int | None] = torch.backends.cudnn.version
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "runtime": torch.version.cuda,
        "cudnn": cudnn_version(),
        "driver": drivers.splitlines()[0].strip() if drivers else None,
    }


def torch_settings() -> dict[str, Any]:
    """Returns the settings that change a result's last bits."""
    return {
        "num_threads": torch.get_num_threads(),
        "num_interop_threads": torch.get_num_interop_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn_enabled": bool(torch.backends.mkldnn.enabled),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": bool(torch.backends.cudnn.deterministic),
        "cudnn_benchmark": bool(torch.backends.cudnn.benchmark),
    } | ({"kernels": _gpu_kernels()} if torch.cuda.is_available() else {})


def _gpu_kernels() -> str:
    """Returns whose kernels run between a GPU's products; on a CPU ours give PyTorch's bits."""
    return "triton" if has_kernels(torch.device("cuda")) else "pytorch"


def _torch_build() -> list[str]:
    """Returns PyTorch's build options, without compiler flags and the builder's paths."""
    lines = [line.strip(" -\n") for line in torch.__config__.show().splitlines()[1:]]
    parts = [part.strip(" ,") for line in lines for part in line.split(", ")]
    return [part for part in parts if part and not re.search(r"(^|[=\s])/|_FLAGS=", part)]
