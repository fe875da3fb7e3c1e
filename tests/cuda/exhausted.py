"""python exhausted.py leak|cublas|optimizer - a card that is full, or used over many steps.

Prints one JSON object; test_steps.py runs each in a process of its own.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch


def leak():
    """Bytes allocated after each step of a bundle whose lengths differ from step to step."""
    steps = _steps(runs=4, batch=2, tokens=128, steps=26)
    return {"allocated": [torch.cuda.memory_allocated() for _ in steps]}


def cublas():
    """Whether a card without room for cuBLAS counts as one without memory."""
    from loracle.model.faults import is_out_of_memory

    x = torch.ones(8, 8, device="cuda")
    runtime = torch.cuda.cudart()
    free = torch.cuda.mem_get_info()[0]
    from ctypes import CDLL, byref, c_size_t, c_void_p

    taken = c_void_p()
    assert not CDLL(None).cudaMalloc(byref(taken), c_size_t(free - (1 << 20))), runtime
    try:
        x @ x
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0], "recognised": is_out_of_memory(error)}
    return {"error": None, "recognised": None}


def optimizer():
    """How a step ends whose passes fit and whose optimizer does not."""
    try:
        for _ in _steps(rank=256, batch=1, tokens=16, dropout=0.0):
            return {"error": None}
    except Exception as error:  # noqa: BLE001 - its kind is what is asked
        return {"error": type(error).__name__, "text": str(error)[:200]}


def _steps(**case):
    from step import Case, _folder, _our_steps

    with tempfile.TemporaryDirectory() as folder:
        yield from _our_steps(Case(**case), _folder(Path(folder), layers=1))


if __name__ == "__main__":
    print(json.dumps({"leak": leak, "cublas": cublas, "optimizer": optimizer}[sys.argv[1]]()))
