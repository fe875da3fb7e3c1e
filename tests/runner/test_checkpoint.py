import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loracle.errors import NonFiniteError, RunFolderError
from loracle.records import files as durable
from loracle.runner import checkpoint
from loracle.runner.checkpoint import Snapshot, load_latest, save_checkpoint


def snapshot(step: int, *, seed: int = 0) -> Snapshot:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return Snapshot(
        step=step,
        tensors={
            "adapter.q_proj.lora_A": torch.randn(4, 8, generator=generator),
            "adapter.q_proj.lora_B": torch.randn(8, 4, generator=generator).bfloat16(),
            "optimizer.q_proj.lora_A.step": torch.tensor(step),
        },
        state={"digest": "abc", "clock_s": 1.5 * step, "streams": ["order", 3]},
    )


def assert_equal(found: Snapshot | None, expected: Snapshot) -> None:
    assert found is not None
    assert found.step == expected.step
    assert found.state == expected.state
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name


def steps(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_notice(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)]
)
def test_every_bit_comes_back_also_of_nan_and_negative_zero(tmp_path, dtype, bits):
    info = torch.iinfo(bits)
    pattern = torch.randint(info.min, info.max, (64, 33), dtype=bits)
    pattern[0, 0] = info.min  # -0.0
    saved = Snapshot(step=3, tensors={"a": pattern.view(dtype)}, state={})
    save_checkpoint(tmp_path, saved, keep=1)
    found = load_latest(tmp_path, notice=no_notice)
    assert found is not None
    assert torch.equal(found.tensors["a"].view(bits), pattern)


def test_integers_scalars_views_and_gradients_come_back(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "count": torch.tensor(2**60 + 1),
        "transposed": base.T,
        "trained": torch.nn.Parameter(base + 1),
        "empty": torch.zeros(0, 4),
    }
    save_checkpoint(tmp_path, Snapshot(step=0, tensors=tensors, state={"x": None}), keep=1)
    found = load_latest(tmp_path, notice=no_notice)
    assert_equal(found, Snapshot(step=0, tensors=tensors, state={"x": None}))
    assert found is not None
    assert not found.tensors["trained"].requires_grad


def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (20, 40, 60, 80):
        path = save_checkpoint(folder, snapshot(step), keep=2)
        assert path == folder / f"step-{step:08d}"
    assert steps(folder) == ["step-00000060", "step-00000080"]
    assert_equal(load_latest(folder, notice=no_notice), snapshot(80))


def test_the_files_of_one_that_is_not_kept_are_written_over_and_none_is_removed(tmp_path):
    """A synced folder keeps what is removed in a bin; earlier contents of a file do not count."""

    def files():
        return {path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}

    for step in (20, 40):
        save_checkpoint(tmp_path, snapshot(step), keep=2)
    before = files()
    for step in (60, 80, 100):
        save_checkpoint(tmp_path, snapshot(step), keep=2)
        assert files() == before
        assert_equal(load_latest(tmp_path, notice=no_notice), snapshot(step))
    assert steps(tmp_path) == ["step-00000080", "step-00000100"]


def test_while_files_are_written_over_the_other_checkpoint_is_there(tmp_path, monkeypatch):
    for step in (20, 40):
        save_checkpoint(tmp_path, snapshot(step), keep=2)
    seen = []
    real = durable.write_synced

    def watched(path, content):
        seen.append(load_latest(tmp_path, notice=lambda text: None))
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_synced", watched)
    save_checkpoint(tmp_path, snapshot(60), keep=2)
    assert [found.step for found in seen] == [40, 40, 40]


def test_a_smaller_checkpoint_leaves_nothing_of_the_larger_one_it_was_written_over(tmp_path):
    large = snapshot(20)
    save_checkpoint(tmp_path, Snapshot(20, large.tensors, large.state, {"a.jsonl": b"x"}), keep=2)
    save_checkpoint(tmp_path, snapshot(40), keep=2)
    small = Snapshot(60, {"a": torch.zeros(2)})
    path = save_checkpoint(tmp_path, small, keep=2)
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "state.json",
        "state.safetensors",
    ]
    assert_equal(load_latest(tmp_path, notice=no_notice), small)


def test_no_checkpoint_is_none(tmp_path):
    assert load_latest(tmp_path / "absent", notice=no_notice) is None
    assert load_latest(tmp_path, notice=no_notice) is None


def truncate(path):
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path):
    file = path / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def other_state(path):
    file = path / "state.json"
    file.write_text(file.read_text().replace("60", "61"))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncate, "state.safetensors is not what was written"),
        (flip_a_bit, "state.safetensors is not what was written"),
        (other_state, "state.json is not what was written"),
        (lambda path: (path / "state.json").unlink(), "state.json: No such file"),
        (lambda path: (path / "state.safetensors").unlink(), "state.safetensors: No such file"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json: No such file"),
        (lambda path: (path / "manifest.json").write_text(""), "manifest.json is not JSON"),
        (lambda path: (path / "manifest.json").write_text("[]"), "is not a JSON object"),
        (lambda path: (path / "manifest.json").write_text("{}"), "is not what was written"),
    ],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(tmp_path, harm, words):
    save_checkpoint(tmp_path, snapshot(40), keep=2)
    harm(save_checkpoint(tmp_path, snapshot(60), keep=2))
    notices: list[str] = []
    assert_equal(load_latest(tmp_path, notice=notices.append), snapshot(40))
    assert len(notices) == 1
    assert notices[0].startswith("step-00000060: damaged checkpoint (")
    assert words in notices[0]
    assert "\n" not in notices[0]


def test_contents_that_no_version_wrote_are_damage(tmp_path):
    path = save_checkpoint(tmp_path, snapshot(60), keep=1)
    (path / "state.json").write_text('{"steps": 60}')
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = checkpoint._fingerprint(b'{"steps": 60}')
    (path / "manifest.json").write_text(json.dumps(manifest))
    notices: list[str] = []
    assert load_latest(tmp_path, notice=notices.append) is None
    assert "KeyError behind a valid manifest" in notices[0]


def test_a_half_written_checkpoint_is_noticed_and_removed_by_the_next_save(tmp_path):
    save_checkpoint(tmp_path, snapshot(40), keep=2)
    half = tmp_path / "step-00000060.4242.tmp"
    shutil.copytree(tmp_path / "step-00000040", half)
    (half / "manifest.json").unlink()
    notices: list[str] = []
    assert_equal(load_latest(tmp_path, notice=notices.append), snapshot(40))
    assert notices == ["step-00000060.4242.tmp: half-written checkpoint, ignored"]
    save_checkpoint(tmp_path, snapshot(60), keep=2)
    assert steps(tmp_path) == ["step-00000040", "step-00000060"]


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    save_checkpoint(tmp_path, snapshot(20), keep=3)
    truncate(save_checkpoint(tmp_path, snapshot(40), keep=3))
    save_checkpoint(tmp_path, snapshot(50), keep=2)
    assert steps(tmp_path) == ["step-00000020", "step-00000050"]


def test_a_damaged_later_checkpoint_does_not_outlive_a_resumed_run(tmp_path):
    save_checkpoint(tmp_path, snapshot(40), keep=2)
    truncate(save_checkpoint(tmp_path, snapshot(60), keep=2))
    save_checkpoint(tmp_path, snapshot(50), keep=1)
    assert steps(tmp_path) == ["step-00000050"]


def test_a_step_saved_again_replaces_the_damaged_one(tmp_path):
    truncate(save_checkpoint(tmp_path, snapshot(60), keep=1))
    save_checkpoint(tmp_path, snapshot(60, seed=1), keep=1)
    assert steps(tmp_path) == ["step-00000060"]
    assert_equal(load_latest(tmp_path, notice=no_notice), snapshot(60, seed=1))


def test_between_two_saves_of_a_step_the_first_is_there(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, snapshot(60), keep=1)
    (tmp_path / "step-00000060.old").mkdir()  # left by a save that was killed here

    class KilledError(BaseException):
        pass

    real = type(tmp_path).rename

    def killed_at_the_last_rename(self, target):
        if self.name.endswith(".tmp") and not str(target).endswith(".tmp"):
            raise KilledError
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "rename", killed_at_the_last_rename)
        with pytest.raises(KilledError):
            save_checkpoint(tmp_path, snapshot(60, seed=1), keep=1)
    assert_equal(load_latest(tmp_path, notice=lambda text: None), snapshot(60))
    save_checkpoint(tmp_path, snapshot(60, seed=2), keep=1)
    assert steps(tmp_path) == ["step-00000060"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "manifest.json"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, file):
    save_checkpoint(tmp_path, snapshot(40), keep=1)
    real = durable.write_synced

    def full(path, content):
        if path.name == file:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(RunFolderError, match="step-00000060: cannot be written: the disk is full"):
        save_checkpoint(tmp_path, snapshot(60), keep=1)
    assert steps(tmp_path) == ["step-00000040"]
    assert_equal(load_latest(tmp_path, notice=no_notice), snapshot(40))


def test_older_checkpoints_outlive_a_failure_before_the_new_one_has_its_name(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, snapshot(40), keep=1)

    def fails(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "sync_folder", fails)
    with pytest.raises(RunFolderError, match="Input/output error"):
        save_checkpoint(tmp_path, snapshot(60), keep=1)
    assert_equal(load_latest(tmp_path, notice=no_notice), snapshot(40))


def test_state_that_is_not_finite_is_not_saved(tmp_path):
    save_checkpoint(tmp_path, snapshot(40), keep=1)
    with pytest.raises(NonFiniteError, match="loss is nan"):
        save_checkpoint(tmp_path, Snapshot(60, tensors={}, state={"loss": float("nan")}), keep=1)
    assert_equal(load_latest(tmp_path, notice=lambda text: None), snapshot(40))


# One process that imports torch once and forks what is killed: eight kills in a few seconds.
KILLER = """
import itertools, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import assert_equal, snapshot
from loracle.runner.checkpoint import load_latest, save_checkpoint

folder, moments, resumed = Path(sys.argv[1]), random.Random(0), 0
for _ in range(8):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for step in itertools.count(resumed + 1):
            # Every other step is saved twice, so that replacing is killed too.
            for _ in range(1 + step % 2):
                save_checkpoint(folder, snapshot(step), keep=2)
                os.write(writing, b"%d " % step)
    os.close(writing)
    time.sleep(moments.uniform(0.05, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(reading, "rb") as pipe:
        saved = max([resumed, *map(int, pipe.read().split())])
    found = load_latest(folder, notice=lambda text: None)
    assert (found.step if found else 0) in (saved, saved + 1), (found, saved)
    if found:
        assert_equal(found, snapshot(found.step))
        resumed = found.step
print(resumed)
"""


def test_killed_at_any_moment_a_complete_checkpoint_is_there(tmp_path):
    command = [sys.executable, "-c", KILLER, str(tmp_path), str(Path(__file__).parent)]
    killer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killer.returncode == 0, killer.stderr
    assert int(killer.stdout) > 8
