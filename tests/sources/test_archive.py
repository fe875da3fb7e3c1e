from __future__ import annotations

import contextlib
import io
import random
import stat
import tarfile
import zipfile

import pytest

from loracle.errors import SourceError
from loracle.sources import archive as archive_module
from loracle.sources.archive import extract_member


@pytest.fixture
def make_tar(tmp_path):
    def make(*members: tarfile.TarInfo, name="thing-1.0.tar.gz"):
        path = tmp_path / name
        with tarfile.open(path, "w:gz") as opened:
            for member in members:
                opened.addfile(member, io.BytesIO(b"x" * member.size))
        return path

    return make


def plain(name: str, size: int = 3) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_the_leading_folder_of_an_sdist_is_implied(make_tar, tmp_path):
    made = make_tar(plain("thing-1.0/data/a.json", 5), plain("thing-1.0/data/b.json", 4))
    extract_member(made, member="data/b.json", destination=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"xxxx"


def test_an_sdist_can_be_a_zip(tmp_path):
    path = tmp_path / "thing-1.0.zip"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("thing-1.0/a.json", b"[]")
    extract_member(path, member="a.json", destination=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"[]"


@pytest.mark.parametrize(
    "member",
    [
        special("thing-1.0/a.json", tarfile.SYMTYPE, "/etc/passwd"),
        special("thing-1.0/a.json", tarfile.LNKTYPE, "thing-1.0/b"),
        special("thing-1.0/a.json", tarfile.CHRTYPE),
        special("thing-1.0/a.json", tarfile.FIFOTYPE),
        special("thing-1.0/a.json", tarfile.DIRTYPE),
    ],
)
def test_links_devices_and_folders_are_refused(make_tar, tmp_path, fails, member):
    made = make_tar(plain("thing-1.0/b"), member)
    message = fails(extract_member, made, member="a.json", destination=tmp_path / "out")
    assert message == (
        "thing-1.0.tar.gz: 'a.json': is a link, folder, device or encrypted; must be a plain file"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../etc/passwd", "./etc/passwd"])
def test_names_that_lead_out_of_the_archive_are_refused(make_tar, tmp_path, fails, name):
    member = name.partition("/")[2]
    message = fails(
        extract_member, make_tar(plain(name)), member=member, destination=tmp_path / "o"
    )
    assert "path leads outside the archive" in message
    assert not (tmp_path / "o").exists()


def test_a_link_inside_a_wheel_is_refused(tmp_path, fails):
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    link = zipfile.ZipInfo("a.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr(link, "/etc/passwd")
    assert "must be a plain file" in fails(
        extract_member, path, member="a.json", destination=tmp_path / "out"
    )


def test_an_encrypted_member_is_refused(tmp_path, fails):
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("a.json", "[]")
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    assert "must be a plain file" in fails(
        extract_member, path, member="a.json", destination=tmp_path / "out"
    )


def test_a_member_over_the_limit_is_refused_before_it_is_written(
    make_tar, tmp_path, fails, monkeypatch
):
    monkeypatch.setattr(archive_module, "MEMBER_LIMIT_BYTES", 10)
    made = make_tar(plain("t/ten", 10), plain("t/eleven", 11))
    extract_member(made, member="ten", destination=tmp_path / "ten")
    message = fails(extract_member, made, member="eleven", destination=tmp_path / "eleven")
    assert "unpacks to more than the limit" in message
    assert not (tmp_path / "eleven").exists()


def test_a_header_that_lies_about_the_size_does_not_get_past_the_limit(
    tmp_path, fails, monkeypatch
):
    monkeypatch.setattr(archive_module, "MEMBER_LIMIT_BYTES", 10)
    message = fails(archive_module._copy, io.BytesIO(b"x" * 99), tmp_path / "out", where="t: 'a'")
    assert message.startswith("t: 'a': unpacks to more than the limit")


def test_a_missing_member_names_the_nearest(make_tar, tmp_path, fails):
    made = make_tar(plain("thing-1.0/data/alpaca.json"))
    message = fails(extract_member, made, member="data/alpacca.json", destination=tmp_path / "out")
    assert message.endswith("among the 1 in the archive; did you mean 'data/alpaca.json'?")


def test_a_name_that_two_members_have_is_refused(make_tar, tmp_path, fails):
    made = make_tar(plain("t/a.json"), plain("t/a.json"))
    assert "holds 2 files with that name" in fails(
        extract_member, made, member="a.json", destination=tmp_path / "out"
    )


@pytest.mark.parametrize("content", [b"not an archive", b"", b"\x1f\x8b\x08\x00garbage"])
def test_a_broken_archive_is_one_line(tmp_path, fails, content):
    path = tmp_path / "thing-1.0.tar.gz"
    path.write_bytes(content)
    assert "not a readable wheel or sdist" in fails(
        extract_member, path, member="a.json", destination=tmp_path / "out"
    )


def test_an_archive_cut_short_is_one_line(make_tar, tmp_path, fails):
    path = tmp_path / "thing-1.0.tar.gz"
    member = plain("t/a.json", 50_000)
    with tarfile.open(path, "w:gz") as opened:
        opened.addfile(member, io.BytesIO(random.Random(0).randbytes(50_000)))
    path.write_bytes(path.read_bytes()[:20_000])
    assert "not a readable wheel or sdist" in fails(
        extract_member, path, member="a.json", destination=tmp_path / "out"
    )


def _archive(kind: str) -> bytes:
    """An archive that holds t/a.json, made as ``kind`` says."""
    content, file = random.Random(0).randbytes(300), io.BytesIO()
    if kind.startswith("w"):
        with tarfile.open(fileobj=file, mode=kind) as opened:
            member = tarfile.TarInfo("t/a.json")
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    else:
        with zipfile.ZipFile(file, "w", getattr(zipfile, kind)) as opened:
            opened.writestr("t/a.json", content)
            opened.writestr("t/\N{LATIN SMALL LETTER E WITH ACUTE}", "")
    return file.getvalue()


@pytest.mark.parametrize(
    "kind", ["w:", "w:gz", "w:bz2", "w:xz", "ZIP_STORED", "ZIP_DEFLATED", "ZIP_BZIP2", "ZIP_LZMA"]
)
def test_whatever_bytes_an_archive_holds_it_is_one_line_or_a_file(tmp_path, kind):
    sound, chance = _archive(kind), random.Random(1)
    for number in range(120):
        raw = bytearray(sound)
        for _ in range(chance.choice((1, 1, 2, 8))):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(raw[: chance.choice((len(raw), chance.randrange(len(raw))))])
        with contextlib.suppress(SourceError):
            extract_member(path, member="a.json", destination=tmp_path / f"{number}.out")
