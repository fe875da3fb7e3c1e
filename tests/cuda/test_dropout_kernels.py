"""Triton's kernels of dropout and adapters: interpreted on a CPU, and compiled for pretended cards.

The interpreter compares bits and products with plain PyTorch; each card's own compiler and the
pretended driver say whether a kernel can be built and launched there, and how many are.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")

LAUNCHES = """
import json, warnings
import torch
from loracle.model.layers import masked
from loracle.model.layers.dropout import DropoutStream, threshold_of
from loracle.model.layers.fused import fused_product
from loracle.model.layers.lora import Route
import answers

warnings.simplefilter("error")
dtypes = [torch.float16, torch.float32]
dtypes += [torch.bfloat16] if torch.cuda.get_device_capability() >= (8, 0) else []
told = {}
for dtype in dtypes:
    for rank in (1, 16, 64, 256):
        for features in (4096, 301):
            x = torch.zeros(4096, features, dtype=dtype, device="cuda", requires_grad=True)
            assert masked.multiplies_in_one_pass(x, rank=rank), (dtype, rank, features)
            weight = torch.zeros(512, features, dtype=dtype, device="cuda")
            a = torch.zeros(rank, features, device="cuda", requires_grad=True)
            b = torch.zeros(512, rank, device="cuda", requires_grad=True)
            each = DropoutStream(threshold_of(0.1), 0, 0, (0,), (4096,))
            def step():
                route = Route("a", 0, None, each)
                out = fused_product(x, weight, None, "m", (route,), (1.0,), a, b)
                torch.autograd.grad(out, (x, a, b), out)
            step()
            answers.forget()
            step()
            told[f"{dtype} {rank} {features}"] = answers.counts()["launches"]
assert not masked.multiplies_in_one_pass(x, rank=257)
print(json.dumps(told))
"""


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not here")


@needs_triton
def test_interpreted_kernels_compute_what_plain_pytorch_does():
    tests = Path(__file__).with_name("interpreted_dropout.py")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]


@needs_triton
@pytest.mark.skipif(not RUN.exists(), reason="the pretended card is not here")
@pytest.mark.parametrize("card", ["t4", "l4", "a100", "h100"])
def test_every_kernel_is_built_and_launched_on_every_card(card):
    ran = subprocess.run(
        [sys.executable, RUN, "--quiet", card, "python", "-c", LAUNCHES],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    # The frozen product and its gradient, six kernels, and at most two sums of parts.
    assert all(8 <= launches <= 10 for launches in told.values()), told
