"""What a card does, as one JSON object: for test_card.py, in a process on a pretended card."""

import json
import multiprocessing

import answers
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def doubled(x, y, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


def tries(attempt):
    """Returns the error's first line, or None."""
    try:
        attempt()
    except (RuntimeError, ValueError, triton.TritonError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def in_a_fork():
    process = multiprocessing.get_context("fork").Process(target=lambda: torch.ones(1).cuda())
    process.start()
    process.join()
    return process.exitcode


def of_another_card():
    """Loads a kernel that was compiled for another major version."""
    capability = 90 if torch.cuda.get_device_capability()[0] < 9 else 80
    types = {"x": "*fp32", "y": "*fp32", "n": "i32", "SIZE": "constexpr"}
    source = ASTSource(doubled, types, constexprs={"SIZE": 128})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    utils = triton.runtime.driver.active.utils
    return lambda: utils.load_binary("doubled", compiled.asm["cubin"], 0, 0)


def replayed():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = (x + 1) @ square
        doubled[(4,)](x, y, 4096, SIZE=1024)
    answers.forget()
    graph.replay()
    del z
    return answers.counts()


def waits_in_capture():
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        (x + 1).sum().item()


x, y = torch.ones(64, 64, device="cuda"), torch.ones(64, 64, device="cuda")
square = torch.ones(64, 64, device="cuda")
answers.forget()
for _ in range(3):
    doubled[(4,)](x, y, 4096, SIZE=1024)
found = {
    "name": torch.cuda.get_device_name(),
    "capability": torch.cuda.get_device_capability(),
    "triton": answers.kernels().get("doubled"),
    "pointer of the host": tries(lambda: doubled[(1,)](torch.ones(8), y, 8, SIZE=1024)),
    "of another card": tries(of_another_card()),
    "graph": replayed(),
    "wait in capture": tries(waits_in_capture),
}
answers.forget()
x.sum().item()
found["waits"] = dict(answers.waits)
answers.forget()
torch.mm(torch.ones(8, 16, device="cuda"), torch.ones(16, 4, device="cuda"))
found["flop"] = answers.counts()["flop"]
free, total = torch.cuda.mem_get_info()
found |= {"free": free, "total": total, "fork": in_a_fork()}
kept = torch.empty(free // 2, dtype=torch.uint8, device="cuda")
found["too much"] = tries(lambda: torch.empty(free, dtype=torch.uint8, device="cuda"))
print(json.dumps(found))
