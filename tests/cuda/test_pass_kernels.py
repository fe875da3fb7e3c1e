"""The kernels between the products: stock's numbers by Triton's interpreter, and what they replace.

Needs Triton, which a CUDA build of PyTorch brings along, and no GPU.
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm

from loracle.config.files import load_config
from loracle.forecast.meta_base import fake_tensors, meta_adapter, meta_base
from loracle.forecast.trace import synthetic_examples, trace_step
from loracle.model.inventory import inventory_from_architecture
from loracle.model.layers import (
    adapter_precision,
    agreement,
    fast_parts,
    gate,
    norm,
    ops,
    rotation,
)
from loracle.model.layers.agreement import disagreement, drawn
from loracle.placement import resolve_placement

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads it when it is imported: those that are interpreted run in a process of their own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="not interpreted")
compiled = pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="no compiler of Triton's")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Largest relative error against fp64: half a unit in the last place for each of three roundings.
WITHIN = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 1e-6}
OPERATORS = (
    "rms_norm", "rms_norm_backward", "silu_gate", "silu_gate_backward", "rotate", "parts",
)  # fmt: skip


def round_bf16_to_nearest(monkeypatch):
    """The interpreter of Triton 3.8 cuts fp32 off to bf16, where a GPU rounds to nearest even."""
    from triton.runtime import interpreter

    converted = interpreter._convert_float

    def nearest(given, source, target, mode):
        if (source, target) != (interpreter.tl.float32, interpreter.tl.bfloat16):
            return converted(given, source, target, mode)
        return torch.from_numpy(given.copy()).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


@pytest.fixture
def on_cpu(monkeypatch):
    """Runs the operators on CPU tensors, by Triton's interpreter."""
    round_bf16_to_nearest(monkeypatch)
    for user in (norm, gate, rotation, adapter_precision):
        monkeypatch.setattr(user, "has_kernels", lambda _device: True)
    library = torch.library.Library("loracle", "IMPL")
    for name in OPERATORS:
        library.impl(name, getattr(ops, f"_{name}"), "CPU")
    yield
    library._destroy()


def like(dtype):
    return torch.empty(0, dtype=dtype)


def outcomes(candidate, exact, inputs):
    """Yields outputs and gradients beside those in fp64 of the same numbers."""
    mine = agreement._outcome(candidate, inputs)
    wide = [tensor.double() for tensor in inputs]
    leaves = [tensor.requires_grad_() for tensor in wide]
    result = exact(*leaves)
    outs = (result,) if isinstance(result, torch.Tensor) else result
    grads = [
        drawn(*out.shape, like=like(tensor.dtype), seed=9 + i).double()
        for i, (out, tensor) in enumerate(zip(outs, mine, strict=False))
    ]
    yield from zip(mine, [*outs, *torch.autograd.grad(outs, leaves, grads)], strict=True)


def assert_near_exact(candidate, exact, inputs):
    for mine, expected in outcomes(candidate, exact, inputs):
        gap = (mine.double() - expected).norm() / expected.norm()
        assert gap <= WITHIN[mine.dtype]


def llama_norm(features, dtype):
    torch.manual_seed(0)
    stock = LlamaRMSNorm(features, eps=1e-5).requires_grad_(False)
    nn.init.normal_(stock.weight, mean=1.0, std=0.2)
    return stock.to(dtype)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [48, 64])
def test_the_norm_is_stock_and_near_exact(on_cpu, dtype, features):
    stock = llama_norm(features, dtype)
    x = drawn(2, 7, features, like=like(dtype), scale=3)
    fused = partial(norm.fused_rms_norm, weight=stock.weight, epsilon=1e-5)
    assert disagreement(fused, stock, [x]) is None

    def exact(x):
        return norm.rms_norm(x, weight=stock.weight.double(), epsilon=1e-5)

    assert_near_exact(fused, exact, [x])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_is_stock_and_near_exact(on_cpu, dtype):
    inputs = [drawn(5, 300, like=like(dtype), seed=seed, scale=3) for seed in range(2)]
    assert disagreement(gate.fused_gated, gate.gated, inputs) is None
    assert_near_exact(gate.fused_gated, gate.gated, inputs)


def angles(tokens, size, dtype, *, sequences=1):
    return [drawn(sequences, tokens, size, like=like(dtype), seed=seed) for seed in (3, 4)]


def heads(count, tokens, size, dtype, *, sequences=1):
    """As projections give them: token by token in memory."""
    return drawn(sequences, tokens, count, size, like=like(dtype), seed=count).transpose(1, 2)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "sequences"), [(16, 1), (20, 3)])
def test_the_rotation_is_stock_and_near_exact(on_cpu, dtype, size, sequences):
    q, k = (heads(n, 9, size, dtype, sequences=sequences) for n in (6, 2))
    cos, sin = angles(9, size, dtype, sequences=sequences)

    def fused(q, k):
        return rotation.fused_rotated(q, k, cos, sin)

    def stock(q, k):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)

    assert disagreement(fused, stock, [q, k]) is None
    assert_near_exact(
        fused, lambda q, k: rotation.rotated(q, k, cos.double(), sin.double()), [q, k]
    )
    mine, own = agreement._outcome(fused, [q, k]), agreement._outcome(stock, [q, k])
    if dtype != torch.float32:
        assert all(torch.equal(one, other) for one, other in zip(mine, own, strict=True))
    assert mine[0].transpose(1, 2).is_contiguous()


@interpreted
def test_parts_are_those_of_the_plain_code(on_cpu):
    z = drawn(5, 24, like=like(torch.float32))
    for dtype, scheme in adapter_precision._SCHEMES.items():
        given = (list(scheme.z), scheme.raised, scheme.lifted, 3, 1 / scheme.a_raised)
        slots, raised, lifted, terms, falls = given
        expected = adapter_precision.parts(
            z, like=like(dtype), slots=slots, raised=raised, lifted=lifted, terms=terms, falls=falls
        )
        assert torch.equal(torch.ops.loracle.parts(z, *given, dtype), expected)


def tiny_llama(**changed):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **changed,
    )  # fmt: skip
    torch.manual_seed(0)
    return modeling_llama.LlamaForCausalLM(config).eval().requires_grad_(False)


def loss_and_gradient(model, ids):
    states = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=states, labels=ids).loss
    loss.backward()
    return loss.item(), states.grad


@interpreted
def test_a_whole_model_computes_as_before(on_cpu):
    model, ids = tiny_llama(), torch.arange(3, 20)[None]
    loss, gradient = loss_and_gradient(model, ids)
    rope, mlp = [model.model.layers[0].self_attn.forward, model.model.layers[0].mlp.forward]
    assert fast_parts.install_fast_parts(model) == ()
    assert rope != model.model.layers[0].self_attn.forward
    assert mlp != model.model.layers[0].mlp.forward
    found, fast = loss_and_gradient(model, ids)
    assert found == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(fast, gradient, rtol=1e-4, atol=1e-7)


@interpreted
def test_other_arithmetic_stays_as_it_is_and_needs_no_notice(on_cpu):
    notices = []
    gemma = GemmaRMSNorm(16).requires_grad_(False)
    nn.init.normal_(gemma.weight, std=0.1)
    assert norm.install_fast_norms(gemma, notice=notices.append) == 0
    config = LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act="gelu")
    mlp = LlamaMLP(config)
    assert gate.install_fused_gates(mlp.requires_grad_(False), notice=notices.append) == 0
    assert notices == []


@interpreted
def test_a_kernel_that_fails_leaves_stock_code_and_says_so(on_cpu, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("ptxas is missing\nat line 1")

    monkeypatch.setattr(norm, "fused_rms_norm", broken)
    monkeypatch.setattr(gate, "fused_gated", broken)
    monkeypatch.setattr(rotation, "fused_rotated", broken)
    model, ids = tiny_llama(), torch.arange(3, 20)[None]
    loss, _ = loss_and_gradient(model, ids)
    notices = fast_parts.install_fast_parts(model)
    assert tuple(line.removesuffix("; it is not used") for line in notices) == (
        "LlamaRMSNorm: the kernel cannot run here (ptxas is missing)",
        "LlamaMLP: the kernel cannot run here (ptxas is missing)",
        "LlamaAttention: the kernel of its rotation cannot run here (ptxas is missing)",
    )
    assert loss_and_gradient(model, ids)[0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(("act", "count"), [("silu", 2), ("gelu_pytorch_tanh", 0)])
def test_without_weights_the_arithmetic_decides_too(act, count):
    """A forecast's model is on the meta device, where numbers cannot be compared."""
    with torch.device("meta"):
        model = tiny_llama(hidden_act=act)
    assert gate.install_fused_gates(model) == count
    assert isinstance(model.model.layers[0].mlp.act_fn, type(ACT2FN[act]))


def test_a_rotation_of_another_order_is_told_apart():
    """Cohere rotates neighbours, not halves."""
    with torch.device("meta"):
        attention = modeling_cohere.CohereAttention(
            modeling_cohere.CohereConfig(
                hidden_size=32, num_attention_heads=4, num_key_value_heads=2
            ),
            layer_idx=0,
        ).requires_grad_(False)
    assert rotation.install_fused_rotations(attention) == 0
    with torch.device("meta"):
        llama = tiny_llama()
    assert rotation.install_fused_rotations(llama) == 2


def test_a_part_that_trains_or_is_on_a_cpu_is_left_alone():
    assert gate.install_fused_gates(tiny_llama()) == 0
    with torch.device("meta"):
        model = tiny_llama().requires_grad_(True)
    assert gate.install_fused_gates(model) == 0
    assert rotation.install_fused_rotations(model) == 0


# Types of the arguments in order, "x" for the dtype of the model; then the compile-time constants.
SIGNATURES = {
    "norm_rows": (["*x", "*x", "*x", "*fp32", "fp32", "i32"], {"BLOCK": 4096}),
    "norm_rows_backward": (["*x", "*x", "*x", "*fp32", "*x", "i32"], {"BLOCK": 4096}),
    "gate_elements": (["*x", "*x", "*x", "i32"], {"BLOCK": 1024}),
    "gate_elements_backward": (["*x", "*x", "*x", "*x", "*x", "i32"], {"BLOCK": 1024}),
    "rotate_tokens": (
        ["*x"] * 6 + ["i32"] * 12,
        {"BACK": True, "Q_ROWS": 32, "K_ROWS": 8, "HALF": 64},
    ),
    "part_elements": (
        ["*fp32", "*x", "i32", "i32", "i32", "fp32", "fp32", "fp32"],
        {"TERMS": 3, "SLOTS": 6, "BLOCK": 1024},
    ),
}


@compiled
@pytest.mark.parametrize("capability", [75, 80, 89, 90])
def test_every_kernel_compiles_without_a_device(capability, monkeypatch, tmp_path):
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from loracle.model.layers import kernels

    dtype = "bf16" if capability >= 80 else "fp16"
    for name, (types, constants) in SIGNATURES.items():
        kernel = getattr(kernels, name)
        arguments = [kind.replace("x", dtype) if kind == "*x" else kind for kind in types]
        arguments += ["constexpr"] * len(constants)
        source = ASTSource(
            fn=kernel,
            signature=dict(zip(kernel.arg_names, arguments, strict=True)),
            constexprs=constants,
        )
        made = build(source, target=GPUTarget("cuda", capability, 32), options=kernels._AS_STOCK)
        assert made.asm["cubin"]


def work_of(layers, *, dropout, examples):
    """Operations of one optimizer step of a small Llama on a GPU with bf16, without weights."""
    architecture = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": layers,
    }  # fmt: skip
    inventory = inventory_from_architecture(architecture)
    plan = resolve_placement("all-linear", inventory=inventory, rank=4, alpha=8)
    base = meta_base(architecture, dtype=torch.bfloat16)
    adapter = meta_adapter(base, plan=plan, dropout=dropout)
    config = load_config("base_config", overrides=[f"lora.dropout={dropout}"])
    with fake_tensors("gpu"):
        lengths = synthetic_examples([(4, 12)] * examples)
        return trace_step(base, adapter=adapter, config=config, examples=lengths).work


def test_operations_of_a_layer_and_pass():
    """Two norms, the gate, rotation and attention are two launches each; residuals stay adds."""
    one, three = (work_of(n, dropout=0.0, examples=2).operations.total() for n in (1, 3))
    # counted (meta trace): with stock norms, MLP, rotation and attention's copies 227
    assert (three - one) / 2 <= 160


@compiled
def test_what_is_interpreted_passes():
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert "passed" in ran.stdout
