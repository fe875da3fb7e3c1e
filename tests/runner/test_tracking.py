import getpass
import gzip
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from loracle.runner import tracking
from loracle.runner.tracking import has_key, open_tracker

OWN = {"WANDB_BASE_URL": "https://own.example"}
KEY = "a" * 40


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No key, no mode, no home of a user."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tracking, "_INIT_TIMEOUT_S", 1.0)


@pytest.fixture
def fresh_wandb(monkeypatch):
    """W&B as in a new process: it reads its environment once."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def no_notice(text):
    raise AssertionError(text)


def start(folder, *, mode="offline", config=None, notice=no_notice):
    return open_tracker(
        mode=mode, project="loracle", name="demo", config=config or {}, folder=folder, notice=notice
    )


def records(path):
    """Returns the records of a W&B file: LevelDB's log format, blocks of 32 KiB, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts, found = path.read_bytes(), 7, b"", []
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def session_files(folder):
    return sorted((folder / "wandb").glob("*run-*/*.wandb"))


def history(path):
    """Returns the logged rows; W&B's service may write them a moment after the run is finished."""
    give_up = time.monotonic() + 10
    while not (rows := logged_rows(path)) and time.monotonic() < give_up:
        time.sleep(0.1)
    return rows


def logged_rows(path):
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


def test_disabled_does_nothing_and_does_not_load_wandb(tmp_path):
    code = (
        "import sys; from pathlib import Path; from loracle.runner.tracking import open_tracker\n"
        "t = open_tracker(mode='disabled', project='p', name='n', config={},"
        f" folder=Path({str(tmp_path)!r}), notice=print)\n"
        "t.log({'loss': 1.0}, step=1); t.summarize({'a': 1}); t.finish(0)\n"
        "assert t.mode == 'disabled' and 'wandb' not in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b""
    assert not (tmp_path / "wandb").exists()


def test_an_offline_folder_holds_the_curves_the_config_and_the_summary(folder, capfd):
    tracker = start(folder, config={"lora": {"rank": 16}, "model": "path:/home/someone/base"})
    losses = [2.5, 2.25, 2.0, 1.875]
    for step, loss in enumerate(losses, 1):
        tracker.log({"train": {"loss_nats_per_token": loss}, "skipped": None}, step=step)
    tracker.log({"eval": {"perplexity": 4.5}}, step=4)
    tracker.summarize({"quality": {"tuned": {"bleu": 21.5, "chrf": None}}})
    tracker.finish(0)

    [path] = session_files(folder)
    assert history(path) == [
        *({"train.loss_nats_per_token": loss, "step": s} for s, loss in enumerate(losses, 1)),
        {"eval.perplexity": 4.5, "step": 4},
    ]
    found = {record.WhichOneof("record_type"): record for record in records(path)}
    config = {item.key: item.value_json for item in found["run"].run.config.update}
    assert json.loads(config["lora"]) == {"rank": 16}
    assert json.loads(config["model"]) == "path:base"
    summaries = [r.summary for r in records(path) if r.WhichOneof("record_type") == "summary"]
    summarized = {item.key: item.value_json for s in summaries for item in s.update}
    assert json.loads(summarized["quality.tuned.bleu"]) == 21.5
    assert "quality.tuned.chrf" not in summarized
    metrics = [r.metric for r in records(path) if r.WhichOneof("record_type") == "metric"]
    assert {(m.name or m.glob_name) for m in metrics} == {"step", "*"}
    assert found["exit"].exit.exit_code == 0
    assert capfd.readouterr() == ("", "")


def test_nothing_tracked_names_a_person_or_a_place(folder):
    tracker = start(folder, config={"data": {"source": "path:/srv/someone/data.json"}})
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish(0)
    [path] = session_files(folder)
    text = "\n".join(str(record) for record in records(path))
    assert 'project: "loracle"' in text
    for private in (str(Path.cwd()), str(folder), str(Path.home()), sys.executable, "/srv/someone"):
        assert private not in text
    for private in (getpass.getuser(), socket.gethostname()):
        assert not re.search(rf"\b{re.escape(private)}\b", text)
    left = {file.name for file in folder.rglob("*") if file.is_file()}
    assert left == {"run_id.txt", path.name}, "W&B's own logs hold paths"


def test_a_resumed_run_goes_on_with_its_id_and_may_repeat_steps(folder):
    for first, last in ((1, 3), (2, 4)):
        tracker = start(folder)
        for step in range(first, last + 1):
            tracker.log({"loss": 1 / step}, step=step)
        tracker.finish(0)
    files = session_files(folder)
    assert len(files) == 2
    ids = {r.run.run_id for f in files for r in records(f) if r.WhichOneof("record_type") == "run"}
    assert ids == {(folder / "wandb" / "run_id.txt").read_text().strip()}
    logged = [row for path in files for row in history(path)]
    assert [row["step"] for row in logged] == [1, 2, 3, 2, 3, 4]
    assert {row["step"]: row["loss"] for row in logged} == {s: 1 / s for s in range(1, 5)}


def test_two_runs_of_one_process_are_tracked_apart(tmp_path):
    trackers = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trackers.append(start(tmp_path / name))
    for value, tracker in enumerate(trackers):
        tracker.log({"loss": value}, step=1)
    for tracker in trackers:
        tracker.finish(0)
    for value, name in enumerate("ab"):
        [path] = session_files(tmp_path / name)
        assert history(path) == [{"loss": value, "step": 1}]


def test_what_wandb_reads_from_the_environment_is_put_back(folder, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "false")
    monkeypatch.delenv("WANDB_CACHE_DIR", raising=False)
    start(folder).finish(0)
    assert os.environ["WANDB_SILENT"] == "false"
    assert "WANDB_CACHE_DIR" not in os.environ
    assert "WANDB_SERVICE" not in os.environ
    assert not (Path.home() / ".cache").exists()


@pytest.mark.parametrize(
    ("environment", "netrc", "expected"),
    [
        ({}, None, False),
        ({"WANDB_API_KEY": KEY}, None, True),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, None, True),
        ({"WANDB_BASE_URL": "not a url"}, None, False),
        ({}, f"machine api.wandb.ai login user password {KEY}\n", True),
        (OWN, f"machine own.example login user password {KEY}\n", True),
        (OWN, f"machine api.wandb.ai login user password {KEY}\n", False),
        ({}, f"machine github.com login user password {KEY}\n", False),
        ({}, "machine\n", False),
    ],
)
def test_a_key_is_found_without_asking(
    monkeypatch, tmp_path, fresh_wandb, capfd, environment, netrc, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "home" / ".netrc").write_text(netrc)
        (tmp_path / "home" / ".netrc").chmod(0o600)
    assert has_key() is expected
    assert "WANDB_SERVICE" not in os.environ
    assert capfd.readouterr() == ("", "")


def test_a_netrc_file_of_another_name_counts(monkeypatch, tmp_path, fresh_wandb):
    named = tmp_path / "secrets"
    named.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    named.chmod(0o600)
    monkeypatch.setenv("NETRC", str(named))
    assert has_key()


def test_auto_without_a_key_is_offline(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked the user"))
    tracker = start(folder, mode="auto")
    assert tracker.mode == "offline"
    tracker.finish(0)


@pytest.mark.parametrize(
    ("mode", "variable", "expected"),
    [("auto", "disabled", "disabled"), ("auto", "dryrun", "offline"),
     ("offline", "disabled", "offline"), ("disabled", "online", "disabled")],
)  # fmt: skip
def test_auto_follows_wandb_mode_and_any_other_mode_overrides_it(
    folder, monkeypatch, mode, variable, expected
):
    monkeypatch.setenv("WANDB_MODE", variable)
    tracker = start(folder, mode=mode)
    assert tracker.mode == expected
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish(0)
    assert len(session_files(folder)) == (0 if expected == "disabled" else 1)


class Server(BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs."""

    seen: list[tuple[str, str]]
    run_exists = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.seen.append((self.path, body.decode()))
        answer = json.dumps(self.answer(body) if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def answer(self, body):
        request = json.loads(body)
        project = {"id": "p", "name": "loracle", "entity": {"id": "e", "name": "team"}}
        if "upsertBucket" in request["query"]:
            bucket = {"id": "b", "name": request["variables"]["name"], "displayName": "demo",
                      "config": "{}", "historyLineCount": 0, "project": project}  # fmt: skip
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in request["query"]:
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}}
        return {"data": {"model": {**project, "bucket": None}}}

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {"seen": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", handler.seen
    running.shutdown()
    running.server_close()
    thread.join()


def test_with_a_key_the_curves_reach_the_server_and_nothing_private_does(
    folder, server, monkeypatch, fresh_wandb, capfd
):
    address, seen = server
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker = start(folder, mode="auto")
    assert tracker.mode == "online"
    for step in (1, 2, 3):
        tracker.log({"loss": 1 / step}, step=step)
    tracker.finish(0)

    streamed = [json.loads(body) for path, body in seen if path.endswith("/file_stream")]
    lines = [
        json.loads(line)
        for chunk in streamed
        for line in chunk.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
    ]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    sent = "\n".join(body for _, body in seen)
    for private in (str(Path.cwd()), str(folder), str(Path.home()), sys.executable):
        assert private not in sent
    for private in (getpass.getuser(), socket.gethostname()):
        assert not re.search(rf"\b{re.escape(private)}\b", sent)
    assert capfd.readouterr() == ("", "")


def test_without_a_route_to_the_server_tracking_is_offline_and_says_so(
    folder, monkeypatch, fresh_wandb, capfd
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", nobody)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    notices: list[str] = []
    tracker = start(folder, mode="auto", notice=notices.append)
    assert tracker.mode == "offline"
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish(0)
    assert len(notices) == 1
    assert "tracking offline ('wandb sync' uploads it later)" in notices[0]
    assert "\n" not in notices[0]
    [path] = session_files(folder)
    assert history(path) == [{"loss": 1.0, "step": 1}]
    first_id = (folder / "wandb" / "run_id.txt").read_text().strip()

    again = start(folder, mode="online", notice=notices.append)
    again.finish(0)
    assert f"('wandb sync --id {first_id}' uploads it later)" in notices[1]
    assert (folder / "wandb" / "run_id.txt").read_text().strip() == first_id
    assert capfd.readouterr() == ("", "")


def test_a_tracker_that_dies_costs_one_notice(folder, monkeypatch):
    notices: list[str] = []
    tracker = start(folder, notice=notices.append)
    tracker.log({"loss": 1.0}, step=1)

    def dies(row):
        raise ConnectionResetError("Connection\nlost")

    monkeypatch.setattr(tracker._run, "log", dies)
    for step in range(2, 30):
        tracker.log({"loss": 1.0}, step=step)
    tracker.summarize({"a": 1})
    tracker.finish(0)
    assert len(notices) == 1
    assert notices[0].startswith("W&B: ConnectionResetError Connection lost; tracking is off")


def test_a_killed_service_costs_one_notice_and_no_run(tmp_path):
    code = (
        "import os, sys, psutil; from pathlib import Path\n"
        "from loracle.runner.tracking import open_tracker\n"
        "t = open_tracker(mode='offline', project='p', name='n', config={},"
        " folder=Path(sys.argv[1]), notice=lambda text: print('NOTICE', text))\n"
        "t.log({'loss': 1.0}, step=1)\n"
        "[child.kill() for child in psutil.Process().children()]\n"
        "psutil.wait_procs(psutil.Process().children())\n"
        "for step in range(2, 200): t.log({'loss': 1.0}, step=step)\n"
        "t.finish(0); print('done')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[-1] == "done"
    assert [line.startswith("NOTICE W&B: ") for line in lines[:-1]] == [True]


def test_a_wandb_that_cannot_start_costs_one_notice(folder, monkeypatch):
    import wandb

    def broken(**words):
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    notices: list[str] = []
    tracker = start(folder, notice=notices.append)
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish(1)
    assert tracker.mode == "disabled"
    assert notices == ["W&B: RuntimeError no service; this run is recorded locally only"]


def test_ctrl_c_does_not_end_tracking(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from loracle.runner.tracking import open_tracker\n"
        "signal.signal(signal.SIGINT, lambda *words: None)\n"
        "t = open_tracker(mode='offline', project='p', name='n', config={},"
        " folder=Path(sys.argv[1]), notice=print)\n"
        "os.killpg(os.getpgrp(), signal.SIGINT)\n"
        "t.log({'loss': 0.5}, step=1); t.finish(130)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, start_new_session=True
    )
    assert done.stdout == done.stderr == ""
    [path] = session_files(tmp_path)
    assert history(path) == [{"loss": 0.5, "step": 1}]


def test_a_run_killed_leaves_no_service_behind(tmp_path):
    code = (
        "import os, sys, psutil; from pathlib import Path\n"
        "from loracle.runner.tracking import open_tracker\n"
        "open_tracker(mode='offline', project='p', name='n', config={},"
        " folder=Path(sys.argv[1]), notice=print)\n"
        "print(*[child.pid for child in psutil.Process().children()], flush=True)\n"
        "input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdin is not None
    with run.stdout, run.stdin:
        children = [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert children
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
