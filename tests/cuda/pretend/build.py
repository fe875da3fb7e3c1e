"""python build.py OUT - compiles the pretended card for this Python's CUDA build of PyTorch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
_SOURCES = [HERE / f"{name}.c" for name in ("memory", "device", "streams", "kernels", "products")]
_ASKING = (
    "torch/lib/lib*cuda*.so",
    "torch/lib/libtorch_python.so",
    "torch/lib/libcaffe2_nvrtc.so",
    "bitsandbytes/libbitsandbytes_cuda1*.so",
)
_ANSWERED = re.compile(r"(cuda[A-Z]|__cuda|cu[A-Z]|cublas)\w*")


def build(out: Path) -> Path:
    """Compiles the library to preload, which it returns, and a libcuda.so.1 that leads to it."""
    site = Path(sysconfig.get_paths()["purelib"])
    out.mkdir(parents=True, exist_ok=True)
    options = [
        "-O2",
        "-fPIC",
        "-shared",
        f"-Wl,--version-script={HERE / 'exports.map'}",
        "-Wall",
        "-Wno-unused-parameter",
        "-Wno-deprecated-declarations",
        f"-I{_headers(site)}",
        f"-I{HERE}",
        *_compiler_headers(site),
    ]
    first = out / f"first-{os.getpid()}.so"
    _gcc(*options, *_SOURCES, "-o", first, "-lpthread", "-ldl")
    asked = _symbols(_libraries(site), "--undefined-only") | _driver_functions(site)
    missing = sorted(asked - _symbols([first], "--defined-only"))
    rest = first.with_suffix(".c")
    lines = [
        '#include "pretend.h"',
        *(_nothing(name) for name in missing if _ANSWERED.fullmatch(name)),
    ]
    rest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _gcc(*options, "-fno-builtin", "-w", *_SOURCES, rest, "-o", first, "-lpthread", "-ldl")
    rest.unlink()
    # Commands that run keep the library they have; a half-written one is never found.
    library = first.replace(out / "libpretend.so")
    _driver(out)
    return library


def _nothing(name: str) -> str:
    """A function that succeeds and does nothing, and says so once where it was asked to."""
    product = " count(PRODUCTS, 1);" if re.match(r"cublas[SDCZH](?!et[A-Z])", name) else ""
    text = f'{{ static int said;{product} if (!said++) unanswered("{name}"); return ready(); }}'
    return f'int loracle_{name}(void) __asm__("{name}"); int loracle_{name}(void) {text}'


def _driver(out: Path) -> None:
    empty = out / "driver.c"
    empty.write_text("int pretend_driver(void) { return 1; }\n", encoding="utf-8")
    whole = [
        "-Wl,--no-as-needed",
        f"-L{out}",
        "-lpretend",
        f"-Wl,-rpath,{out}",
        "-Wl,-soname,libcuda.so.1",
    ]
    _gcc("-shared", "-fPIC", empty, "-o", out / "libcuda.so.1", *whole)


def _headers(site: Path) -> Path:
    for found in (
        *site.glob("nvidia/cu*/include/cublasLt.h"),
        Path("/usr/local/cuda/include/cublasLt.h"),
    ):
        if found.exists():
            return found.parent
    raise SystemExit(
        f"{site}: no CUDA headers (the wheels nvidia-cuda-runtime and nvidia-cublas bring them)"
    )


def _compiler_headers(site: Path) -> list[str]:
    """crt/ is no part of the runtime's wheel; Triton brings one of its own."""
    return ["-idirafter", str(site / "triton/backends/nvidia/include")]


def _driver_functions(site: Path) -> set[str]:
    """All of cuda.h: Triton links a module to the driver, others look functions up by name."""
    header = (_headers(site) / "cuda.h").read_text(encoding="utf-8")
    versions = re.findall(r"^#define (cu[A-Z]\w*)\s+(cu[A-Z]\w*_v\d)$", header, flags=re.MULTILINE)
    return {*re.findall(r"CUDAAPI (cu[A-Z]\w*)\(", header), *(newest for _, newest in versions)}


def _libraries(site: Path) -> list[Path]:
    return [found for pattern in _ASKING for found in sorted(site.glob(pattern))]


def _symbols(libraries: list[Path], which: str) -> set[str]:
    listed = subprocess.run(
        ["nm", "-D", which, *libraries], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines() if len(line.split()) > 1}


def _gcc(*words: object) -> None:
    subprocess.run(["gcc", *map(str, words)], check=True)


if __name__ == "__main__":
    print(build(Path(sys.argv[1]).resolve()))
