"""Tars of strangers: what is honest is unpacked to the byte, everything else is refused and writes nothing outside."""

import gzip
import io
import os
import tarfile

import pytest

from hba.atlas import hub
from hba.atlas.hub import unpack
from hba.errors import InputError


def member(name, data=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def make(path, *members, mode="w", format=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def place(tmp_path):
    """A folder with the archive's folder and, beside it, a file that no archive may touch."""
    (tmp_path / "victim").write_text("whole")
    yield tmp_path
    assert (tmp_path / "victim").read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} <= {"victim", "out", "a.tar", "a.tar.gz", "elsewhere"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_honest_archive(place, mode, format):
    long = "/".join(["folder" * 8] * 3) + "/clip.mp4"
    big = os.urandom(300_000)
    archive = make(
        place / "a.tar",
        member("videos", kind=tarfile.DIRTYPE),
        member("./videos/a.mp4", b"one"),
        member("empty.wav"),
        member(long, big),
        member("videos/b.mp4", kind=tarfile.SYMTYPE, link="a.mp4"),
        member("audios/c.wav", kind=tarfile.SYMTYPE, link="../videos/a.mp4"),
        member("d.wav", kind=tarfile.LNKTYPE, link="videos/a.mp4"),
        member("._junk", b"x" * 3000),
        member("videos/.DS_Store", b"y"),
        mode=mode,
        format=format,
    )
    assert unpack(archive, place / "out") == 6
    found = {p.relative_to(place / "out").as_posix(): p.read_bytes() for p in (place / "out").rglob("*") if p.is_file()}
    same = dict.fromkeys(("videos/a.mp4", "videos/b.mp4", "audios/c.wav", "d.wav"), b"one")
    assert found == same | {"empty.wav": b"", long: big}
    assert not [path for path in (place / "out").rglob("*") if path.is_symlink()]
    assert unpack(archive, place / "out") == 6  # a torn one is done again over what is there


REFUSED = {
    "parent": member("../victim", b"gone"),
    "inner parent": member("videos/../../victim", b"gone"),
    "absolute": member("/{place}/victim", b"gone"),
    "backslash": member("..\\victim", b"gone"),
    "drive": member("C:/victim", b"gone"),
    "link out": member("v", kind=tarfile.SYMTYPE, link="../victim"),
    "link to absolute": member("v", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    "hard link out": member("v", kind=tarfile.LNKTYPE, link="../victim"),
    "hard link to absolute": member("v", kind=tarfile.LNKTYPE, link="/etc/passwd"),
    "link to nothing": member("v", kind=tarfile.SYMTYPE, link="later"),
    "link to a folder": member("v", kind=tarfile.SYMTYPE, link="."),
    "character device": member("v", kind=tarfile.CHRTYPE),
    "block device": member("v", kind=tarfile.BLKTYPE),
    "pipe": member("v", kind=tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(place, name):
    info, data = REFUSED[name]
    info.name = info.name.replace("/{place}", str(place))
    archive = make(place / "a.tar", member("good", b"1"), (info, data))
    with pytest.raises(InputError, match=r"leads|device or a pipe") as caught:
        unpack(archive, place / "out")
    assert "a.tar" in str(caught.value)
    assert [path.name for path in (place / "out").iterdir()] == ["good"]


def test_links_that_were_there_before_lead_nobody_out(place):
    (place / "out").mkdir()
    (place / "elsewhere").mkdir()
    (place / "out" / "videos").symlink_to(place / "elsewhere")
    (place / "out" / "v").symlink_to(place / "victim")
    with pytest.raises(InputError, match="leads outside"):
        unpack(make(place / "a.tar", member("videos/a.mp4", b"1")), place / "out")
    assert not list((place / "elsewhere").iterdir())
    unpack(make(place / "a.tar", member("v", b"1")), place / "out")
    assert (place / "out" / "v").read_bytes() == b"1"  # the link was replaced, not followed


def test_file_in_the_way_of_a_folder(place):
    archive = make(place / "a.tar", member("a", b"1"), member("a/b", b"2"))
    with pytest.raises(InputError, match="as a file and as a folder"):
        unpack(archive, place / "out")


def test_bombs(place, monkeypatch):
    zeros = make(place / "a.tar.gz", *[member(f"{i}", bytes(1 << 20)) for i in range(8)], mode="w:gz")
    with pytest.raises(InputError, match="more than is plausible"):
        unpack(zeros, place / "out", max_bytes=3 << 20)
    assert sum(path.stat().st_size for path in (place / "out").iterdir()) == 3 << 20

    huge, _ = member("huge")
    huge.size = 1 << 40
    (place / "a.tar").write_bytes(huge.tobuf() + bytes(1024))
    with pytest.raises(InputError, match="more than is plausible"):
        unpack(place / "a.tar", place / "out")

    header = tarfile.TarInfo("pax")  # Python reads the whole of an extended header into memory
    header.type, header.size = tarfile.XHDTYPE, 1 << 32
    with gzip.open(place / "a.tar.gz", "wb") as packed:
        packed.write(header.tobuf())
        for _ in range(40):
            packed.write(bytes(1 << 20))
    with pytest.raises(InputError, match="header is larger"):
        unpack(place / "a.tar.gz", place / "out")


@pytest.mark.parametrize("packed", [False, True])
def test_cut_off_anywhere_or_corrupt(place, packed):
    """No prefix of an archive and no archive with a broken header is taken for whole."""
    mode, name = ("w:gz", "a.tar.gz") if packed else ("w", "a.tar")
    data = make(place / name, *[member(f"{i}", os.urandom(700)) for i in range(5)], mode=mode).read_bytes()
    whole = 5 * (512 + 1024) + 512 if not packed else len(data)
    for size in range(0, whole, 97):
        (place / name).write_bytes(data[:size])
        with pytest.raises(InputError, match=r"damaged|cut off"):
            unpack(place / name, place / "out")
    if not packed:
        for block in range(5):
            at = block * 1536 + 3
            (place / name).write_bytes(data[:at] + b"\xff" + data[at + 1 :])
            with pytest.raises(InputError, match="damaged"):
                unpack(place / name, place / "out")


def test_ratio_of_an_honest_archive_is_never_refused(place):
    """Media hardly compress; the default limit leaves room for a gibibyte at least."""
    assert hub.MIN_TOTAL_BYTES >= 1 << 30
    archive = make(place / "a.tar.gz", member("silence.wav", bytes(8 << 20)), mode="w:gz")
    assert archive.stat().st_size < 100_000
    assert unpack(archive, place / "out") == 1
