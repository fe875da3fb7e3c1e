"""When memory runs out the step is taken again in smaller passes, and no figure changes."""

from types import SimpleNamespace

import pytest
import torch

from loracle.engine import latency, out_of_memory
from loracle.engine.evaluate import score_examples
from loracle.engine.out_of_memory import (
    PassBudget,
    largest_pass,
    memory_faults,
)
from loracle.engine.train import train_bundle
from loracle.errors import OutOfMemory
from loracle.model.base import FrozenBase
from loracle.model.faults import is_out_of_memory
from loracle.runner import audit
from runs_fixture import load, settings
from tiny_engine import attach, examples_of, tiny_base, tiny_plan, tiny_run

EXAMPLES = examples_of(11, longest=17)


NO_ROOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def small_memory(monkeypatch, *, tokens, error=NO_ROOM):
    """Passes of more than so many tokens do not fit; returns the sizes that were tried."""
    tried = []
    real = FrozenBase.token_nll

    def limited(self, row, **more):
        tried.append(row.num_tokens)
        nll = real(self, row, **more)
        if row.num_tokens > tokens:
            raise error
        return nll

    monkeypatch.setattr(FrozenBase, "token_nll", limited)
    return tried


def trained(*, micro_batch_tokens, steps=3, halved=lambda *_: None):
    base = tiny_base()
    adapter = attach(base, tiny_plan(), spread_b=None)
    run = tiny_run(base, adapter, EXAMPLES, dropout=0.1, batch_size=7, max_steps=steps)
    bundle = train_bundle(base, [run], micro_batch_tokens=micro_batch_tokens, halved=halved)
    losses = [record.loss_nats_per_token for (record,) in bundle]
    return losses, {name: p.detach().clone() for name, p in adapter.parameters.items()}


def test_the_step_is_taken_again_and_ends_with_the_bits_of_the_smaller_passes(monkeypatch):
    events = []
    with monkeypatch.context() as patched:
        tried = small_memory(patched, tokens=40)
        losses, tensors = trained(
            micro_batch_tokens=1000, halved=lambda *event: events.append(event)
        )
    assert max(tried) > 40
    assert len(events) >= 1
    assert events[0][0] == 1000
    smallest = events[-1][1]
    wanted_losses, expected = trained(micro_batch_tokens=smallest)
    assert losses == wanted_losses
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_sequence_that_does_not_fit_by_itself_is_an_error_that_says_what_helps(monkeypatch):
    small_memory(monkeypatch, tokens=5)
    with pytest.raises(OutOfMemory, match=r"^step 1: a sequence of \d+ tokens by itself needs"):
        trained(micro_batch_tokens=1000)


def test_other_errors_are_not_taken_for_it(monkeypatch):
    small_memory(monkeypatch, tokens=20, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trained(micro_batch_tokens=1000)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "cudaErrorMemoryAllocation",
        "NVML_ERROR_OUT_OF_MEMORY",
        "GET was unable to find an engine to execute this computation",
        "std::bad_alloc",
    ],
)
def test_what_drivers_and_libraries_say_counts(message):
    for kind in (RuntimeError, torch.AcceleratorError):
        assert is_out_of_memory(kind(message))


def test_other_errors_of_a_gpu_do_not_count():
    for message in (
        "CUDA error: device-side assert triggered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle)`",
        "CUDA error: an illegal memory access was encountered",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    ):
        assert not is_out_of_memory(RuntimeError(message))


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as result:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(result.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("expected all tensors on one device"))


def test_the_remedy_is_said():
    with (
        pytest.raises(OutOfMemory, match=r"^run-1: out of memory; lower it$"),
        memory_faults("run-1", remedy="lower it"),
    ):
        raise NO_ROOM


def test_halving_starts_from_the_largest_pass_there_was():
    budget = PassBudget(10_000)
    answers = iter([torch.OutOfMemoryError(), torch.OutOfMemoryError(), "done"])
    seen = []

    def attempt(tokens):
        seen.append(tokens)
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    lengths = [10, 10, 10, 10]
    assert budget.fit(attempt, lengths=lengths, undo=lambda: None, where="here") == "done"
    assert seen == [10_000, 20, 10]
    assert [largest_pass(lengths, budget=tokens) for tokens in seen] == [40, 20, 10]


def full_for(monkeypatch, *, target, name, failures):
    """Makes the first calls of a function raise."""
    real, calls = getattr(target, name), []

    def limited(*args, **kwargs):
        calls.append(name)
        if len(calls) <= failures:
            raise NO_ROOM
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, limited)
    return calls


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch, "zeros_like"),
        (torch.nn.utils, "clip_grads_with_norm_"),
        (torch.optim.AdamW, "step"),
        (torch.amp.GradScaler, "unscale_"),
    ],
)
def test_an_update_that_does_not_fit_is_tried_again_and_changes_no_bit(monkeypatch, target, name):
    wanted_losses, expected = trained(micro_batch_tokens=1000)
    calls = full_for(monkeypatch, target=target, name=name, failures=1)
    losses, tensors = trained(micro_batch_tokens=1000)
    assert len(calls) > 1
    assert losses == wanted_losses
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_moments_of_which_one_did_not_fit_are_made_anew(monkeypatch):
    wanted_losses, expected = trained(micro_batch_tokens=1000)
    real, calls = torch.zeros_like, []

    def every_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise NO_ROOM
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", every_second)
    losses, tensors = trained(micro_batch_tokens=1000)
    assert losses == wanted_losses
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_an_update_that_never_fits_is_an_error_that_says_what_helps(monkeypatch):
    full_for(monkeypatch, target=torch.optim.AdamW, name="step", failures=9)
    with pytest.raises(OutOfMemory, match=r"^step 1: the update of the trained weights .*rank"):
        trained(micro_batch_tokens=1000)


def test_scores_do_not_depend_on_memory(monkeypatch):
    base = tiny_base()
    expected = score_examples(base, EXAMPLES, adapter=None, batch_tokens=1000)
    small_memory(monkeypatch, tokens=30)
    result = score_examples(base, EXAMPLES, adapter=None, batch_tokens=1000)
    for candidate, reference in zip(result, expected, strict=True):
        assert candidate.nll_sum_nats == pytest.approx(reference.nll_sum_nats, rel=1e-6)


SHORT = settings(
    train__max_steps=4, measure__latency_trials=0, checkpoint__every_steps=1, eval__every_steps=0
)


def test_a_run_records_it_and_goes_on(place, tmp_path, monkeypatch):
    steps, tried = settings(train__micro_batch_tokens=100_000), []
    real = FrozenBase.token_nll

    def once(self, row, **more):
        nll = real(self, row, **more)
        # The first pass of a run is over a few tokens, to see that every module takes part.
        if nll.requires_grad and row.num_tokens > 32 and not tried:
            tried.append(row.num_tokens)
            raise NO_ROOM
        return nll

    with monkeypatch.context() as patched:
        patched.setattr(FrozenBase, "token_nll", once)
        outcome = place.baseline("--out", tmp_path / "cut", *SHORT, *steps)
    assert outcome.code == 0, outcome.err
    assert "step 1: out of memory; passes of" in outcome.err
    (event,) = load(tmp_path / "cut" / "environment.json")["engine"]["micro_batch_halved"]
    assert event == {"step": 1, "from_tokens": 100_000, "to_tokens": tried[0] // 2}
    small = settings(train__micro_batch_tokens=event["to_tokens"])
    outcome = place.baseline("--out", tmp_path / "small", *SHORT, *small)
    assert outcome.code == 0, outcome.err
    cut, small = (
        load(tmp_path / name / "result.json")["adapter_sha256"] for name in ("cut", "small")
    )
    assert cut == small


def test_a_run_that_cannot_fit_fails_and_says_why(place, tmp_path, monkeypatch):
    small_memory(monkeypatch, tokens=13)
    outcome = place.baseline("--out", tmp_path / "run", *SHORT)
    assert outcome.code == 1
    assert "OutOfMemory: " in outcome.err
    assert "by itself needs more memory than there is" in outcome.err
    assert load(tmp_path / "run" / "status.json")["status"] == "failed"


def no_room(*_args, **_kwargs):
    raise NO_ROOM


def test_latency_that_does_not_fit_is_not_measured_and_the_run_is_completed(
    place, tmp_path, monkeypatch
):
    monkeypatch.setattr(latency, "_decode_s", no_room)
    outcome = place.baseline("--out", tmp_path / "run", *SHORT, measure__latency_trials=1)
    assert outcome.code == 0, outcome.err
    assert "latency: out of memory, not measured; lower measure.latency_new_tokens" in outcome.err
    measured = load(tmp_path / "run" / "result.json")["efficiency"]["latency_ms_per_token"]
    assert measured == {"base": None, "unmerged": None, "merged": None}


def test_an_audit_that_does_not_fit_says_what_helps_and_goes_on_later(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(audit, "stock_nll_sums", no_room)
        outcome = place.baseline("--out", tmp_path / "run", *SHORT)
    assert outcome.code == 1
    assert "run: audit: out of memory; it scores one example at a time" in outcome.err
    assert "--resume, which keeps the training" in outcome.err
    outcome = place.baseline("--out", tmp_path / "run", *SHORT, "--resume")
    assert outcome.code == 0, outcome.err


def test_a_base_that_does_not_fit_is_told_from_a_step_that_does_not(place, tmp_path, monkeypatch):
    small_memory(monkeypatch, tokens=5)
    outcome = place.baseline("--out", tmp_path / "run", *SHORT)
    assert outcome.code == 1
    assert "out of memory; its weights do not fit; `loracle plan` says what does" in outcome.err


@pytest.mark.parametrize(("allowed_mib", "is_enough"), [(None, True), (4096, True), (1040, False)])
def test_an_address_space_that_is_nearly_used_is_said_before_libraries_abort(
    monkeypatch, allowed_mib, is_enough
):
    infinite = out_of_memory.resource.RLIM_INFINITY
    allowed = infinite if allowed_mib is None else allowed_mib << 20
    used = SimpleNamespace(memory_info=lambda: SimpleNamespace(vms=1024 << 20))
    monkeypatch.setattr(out_of_memory.resource, "getrlimit", lambda _: (allowed, infinite))
    monkeypatch.setattr(out_of_memory.psutil, "Process", lambda: used)
    if is_enough:
        out_of_memory.require_address_space("a")
        return
    with pytest.raises(OutOfMemory, match=r"^a: out of memory: 16 MiB are left of the 1040 MiB"):
        out_of_memory.require_address_space("a")
