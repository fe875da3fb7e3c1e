"""Dropout on a CPU in one pass, as C that is compiled at first use, where there is a compiler.

The same integer arithmetic as ``dropout`` in plain PyTorch, and so the same bits; that is checked
when it is loaded. Without a compiler, or with ``LORACLE_KERNELS=plain`` in the environment, PyTorch
goes on. A C file rather than ``torch.compile``, whose first use took 10 s against 0.4 s here, and
whose kernel was no faster than PyTorch's own 17 (2 x Xeon, one thread, 2026-11-30).

The source is a text in this file, so that every digest over ``model/**/*.py`` covers it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracle.errors import SourceError
from loracle.sources.cache import cache_folder

SWITCH = "LORACLE_KERNELS"
"""Environment variable; ``plain`` switches off every kernel of our own."""

# OpenMP's functions are taken from PyTorch's copy, already loaded: linked in, a second copy would
# have threads of its own. Without OpenMP the code is for one thread.
_FLAGS = ("-O3", "-shared", "-fPIC", "-fno-strict-aliasing", "-nostdlib")
_TRIES = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",))
# assumed: ten times what it takes, so that only a compiler that hangs is given up
_TIMEOUT_S = 5.0

_SOURCE = r"""
#include <stdint.h>

#define WORDS 64
#define LANES (4 * WORDS)

/* -1 where a feature is kept, 0 where it is dropped, of LANES features from word `first` on. */
static inline void keep_bits(uint64_t key, uint64_t first, int16_t threshold, int16_t *bits) {
  union { uint64_t words[WORDS]; int16_t lanes[LANES]; } drawn;
  for (int j = 0; j < WORDS; j++) {
    uint64_t z = key + (first + j) * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    drawn.words[j] = z ^ (z >> 31);
  }
  for (int i = 0; i < LANES; i++) {
    int16_t negative = (int16_t)(drawn.lanes[i] | INT16_MIN);
    bits[i] = (int16_t)((int16_t)(negative + threshold) >> 15);
  }
}

static inline float widened(int16_t bits) {
  union { uint32_t whole; float number; } both = {.whole = (uint32_t)(uint16_t)bits << 16};
  return both.number;
}

/* To bf16, ties to even, as PyTorch rounds. */
static inline int16_t rounded(float number) {
  union { float number; uint32_t whole; } both = {.number = number};
  uint32_t even = both.whole + 0x7FFF + ((both.whole >> 16) & 1);
  return number == number ? (int16_t)(even >> 16) : 0x7FC0;
}

#define SUM(NAME, NUMBER, WHOLE) \
  static inline NUMBER NAME(NUMBER sum, NUMBER term, int16_t bits) { \
    union { NUMBER number; WHOLE whole; } both = {.number = term}; \
    both.whole &= bits; \
    return sum + both.number; \
  }
SUM(plus32, float, int32_t)
SUM(plus64, double, int64_t)

#define DROP(to, x, bits) ((x) & (bits))
#define ADD16(to, x, bits) rounded(widened(to) + widened((int16_t)((x) & (bits))))

/* One pass over rows of features; a stride is that of a row. */
#define PASS(NAME, TYPE, VALUE) \
  void NAME(int64_t rows, int64_t features, int64_t threads, const int64_t *keys, \
            const int16_t *thresholds, int64_t module, const TYPE *x, int64_t x_stride, \
            TYPE *out, int64_t out_stride) { \
    _Pragma("omp parallel for schedule(static) num_threads(threads)") \
    for (int64_t t = 0; t < rows; t++) { \
      int16_t bits[LANES]; \
      for (int64_t first = 0; first < features; first += LANES) { \
        keep_bits((uint64_t)keys[t] + (uint64_t)module, first / 4, thresholds[t], bits); \
        const TYPE *restrict in = x + t * x_stride + first; \
        TYPE *restrict to = out + t * out_stride + first; \
        int64_t left = features - first; \
        if (left >= LANES) \
          for (int i = 0; i < LANES; i++) to[i] = VALUE(to[i], in[i], bits[i]); \
        else \
          for (int i = 0; i < left; i++) to[i] = VALUE(to[i], in[i], bits[i]); \
      } \
    } \
  }

PASS(drop_2, int16_t, DROP)
PASS(drop_4, int32_t, DROP)
PASS(drop_8, int64_t, DROP)
PASS(add_dropped_2, int16_t, ADD16)
PASS(add_dropped_4, float, plus32)
PASS(add_dropped_8, double, plus64)
"""


class Library:
    """The compiled functions; they take CPU tensors whose last dimension is contiguous."""

    def __init__(self, path: Path, *, has_threads: bool) -> None:
        self._functions = ctypes.CDLL(str(path))
        self.has_threads = has_threads
        """False: it runs in the calling thread only."""

    def run(
        self, name: str, x: Tensor, out: Tensor, *, keys: Tensor, thresholds: Tensor, module: int
    ) -> None:
        """Calls ``name`` for the element size of ``x``, (T, I), which it writes to ``out``."""
        self._call(
            f"{name}_{x.element_size()}",
            *(*x.shape, torch.get_num_threads()),
            *(keys.data_ptr(), thresholds.data_ptr(), module),
            *(x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0)),
        )

    def kept(
        self,
        kind: Any,
        rows: int,
        features: int,
        *,
        keys: Sequence[int],
        thresholds: Sequence[int],
        module: int,
    ) -> list[bool]:
        """Returns a mask of (rows, features) in one list, as numbers of ``kind`` are dropped."""
        given = (ctypes.c_int64 * rows)(*keys), (ctypes.c_int16 * rows)(*thresholds)
        count = rows * features
        ones, out = (kind * count)(*[-1] * count), (kind * count)()
        addresses = [ctypes.addressof(array) for array in (*given, ones, out)]
        self._call(
            f"drop_{ctypes.sizeof(kind)}",
            *(rows, features, 1, *addresses[:2], module),
            *(addresses[2], features, addresses[3], features),
        )
        return [value == -1 for value in out]

    def _call(self, name: str, *numbers: int) -> None:
        getattr(self._functions, name)(*map(ctypes.c_int64, numbers))


def library() -> Library | None:
    """Returns the functions, built at first use; None where they are not to be had."""
    if is_switched_off():
        return None
    found = _library()
    if found is None or (not found.has_threads and torch.get_num_threads() > 1):
        return None
    return found


def is_switched_off() -> bool:
    """Returns True if the user wants PyTorch's own kernels only."""
    return os.environ.get(SWITCH) == "plain"


@lru_cache(maxsize=1)
def _library() -> Library | None:
    compiler = find_compiler()
    if compiler is None:
        return None
    for flags in _TRIES:
        try:
            found = _obtained(compiler, (*flags, *_FLAGS))
            if is_exact(found):
                return found
        except subprocess.TimeoutExpired:
            return None
        except (OSError, subprocess.SubprocessError, AttributeError):
            continue
        warnings.warn(
            f"{shlex.join(compiler)}: dropout that it compiled with {' '.join(flags)} differs from "
            "PyTorch's, and is not used",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def is_exact(found: Library) -> bool:
    """Returns whether masks are those of the published generator, in numbers of every size."""
    rows, features, module = 2, 1030, 99
    keys, thresholds = (7, -3), (3277, 16384)
    kept = [
        word >> 16 * lane & 0x7FFF < 0x8000 - threshold
        for key, threshold in zip(keys, thresholds, strict=True)
        for word in (_word(key + module, place) for place in range((features + 3) // 4))
        for lane in range(4)
    ]
    width = len(kept) // rows
    expected = [kept[row * width + i] for row in range(rows) for i in range(features)]
    return all(
        found.kept(kind, rows, features, keys=keys, thresholds=thresholds, module=module)
        == expected
        for kind in (ctypes.c_int16, ctypes.c_int32, ctypes.c_int64)
    )


def _word(key: int, place: int) -> int:
    """Returns a word of SplitMix64 in the integers of Python."""
    z = (key + place * 0x9E3779B97F4A7C15) % (1 << 64)
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ z >> 27) * 0x94D049BB133111EB % (1 << 64)
    return z ^ z >> 31


def find_compiler() -> list[str] | None:
    """Returns the command of ``$CC``, else of the first C compiler found; None without one."""
    for command in (os.environ.get("CC"), "cc", "gcc", "clang"):
        try:
            words = shlex.split(command or "")
        except ValueError:  # a quote that is not closed
            continue
        path = shutil.which(words[0]) if words else None
        if path is not None:
            return [path, *words[1:]]
    return None


def _obtained(compiler: list[str], flags: tuple[str, ...]) -> Library:
    """Returns the library from the cache, or builds it; a folder that cannot be written is fine."""
    has_threads = "-fopenmp" in flags
    kept: Path | None = None
    with suppress(OSError, SourceError):
        kept = cache_folder() / "kernels" / f"{_key(compiler, flags)}.so"
        if kept.is_file():
            return Library(kept, has_threads=has_threads)
    with tempfile.TemporaryDirectory() as scratch:
        built = _built(compiler, flags, folder=Path(scratch))
        found = Library(built, has_threads=has_threads)
        if kept is not None:
            with suppress(OSError):
                _keep(built, kept)
    return found


def _key(compiler: list[str], flags: tuple[str, ...]) -> str:
    """Returns a digest of source, compiler, flags and, for ``-march=native``, the processor."""
    status = Path(compiler[0]).stat()
    described = (_SOURCE, compiler, flags, status.st_size, status.st_mtime_ns, _processor())
    return hashlib.sha256(repr(described).encode()).hexdigest()[:32]


def _processor() -> str:
    """Returns the instructions of this processor: folders may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return platform.machine() + (told[0] if told else platform.processor())


def _built(compiler: list[str], flags: tuple[str, ...], *, folder: Path) -> Path:
    source, target = folder / "dropout.c", folder / "dropout.so"
    source.write_text(_SOURCE)
    command = [*compiler, *flags, "-o", str(target), str(source)]
    subprocess.run(
        command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S
    )
    return target


def _keep(built: Path, kept: Path) -> None:
    """Copies a built file into the cache whole, whoever else does so."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=kept.parent, prefix=".partial-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(built.read_bytes())
    Path(partial).replace(kept)
