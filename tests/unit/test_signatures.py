"""What a backing holds: by blkid, and by the own table where blkid is missing."""

import os
import subprocess
from pathlib import Path

import pytest

from mirror import signatures
from mirror.core.errors import OperatorError
from mirror.core.limits import MIB


@pytest.fixture(params=["blkid", "table"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "table":
        monkeypatch.setattr(signatures.shutil, "which", lambda name, path: None)
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(32 * MIB)
    return path


def test_nothing_is_found_where_nothing_is(way: str, image: Path) -> None:
    assert signatures.find(image) is None
    image.write_bytes(b"")
    assert signatures.find(image) is None
    image.write_bytes(os.urandom(100))
    assert signatures.find(image) is None


def test_an_ext4_filesystem_is_found(way: str, image: Path) -> None:
    subprocess.run(["/sbin/mkfs.ext4", "-q", image], check=True)
    before = image.read_bytes()
    found = signatures.find(image)
    assert found is not None
    assert "filesystem" in found
    assert "ext4" in found
    assert image.read_bytes() == before


def test_a_swap_area_is_found(way: str, image: Path) -> None:
    image.chmod(0o600)
    subprocess.run(["/sbin/mkswap", image], check=True, capture_output=True)
    assert signatures.find(image) == "a swap area"


@pytest.mark.parametrize("what", sorted({what for _, _, what in signatures._TABLE}))
def test_every_row_of_the_table_is_found(monkeypatch: pytest.MonkeyPatch, image: Path, what: str) -> None:
    monkeypatch.setattr(signatures.shutil, "which", lambda name, path: None)
    for offset, magic, row in signatures._TABLE:
        if row == what:
            with image.open("r+b") as file:
                file.truncate(0)
                file.truncate(32 * MIB)
                os.pwrite(file.fileno(), magic, offset)
            assert signatures.find(image) == what


def test_several_signatures_are_no_answer_but_found(image: Path) -> None:
    subprocess.run(["/sbin/mke2fs", "-q", "-b", "1024", image], check=True)
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), b"hsqs", 0)
    assert signatures.find(image) is not None


@pytest.mark.parametrize("failure", [subprocess.TimeoutExpired("blkid", 1), OSError("no")])
def test_a_blkid_that_does_not_answer_leaves_the_table(
    monkeypatch: pytest.MonkeyPatch, image: Path, failure: Exception
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise failure

    with image.open("r+b") as file:
        os.pwrite(file.fileno(), b"XFSB", 0)
    monkeypatch.setattr(signatures.subprocess, "run", fail)
    assert signatures.find(image) == "a filesystem (xfs)"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"TYPE": "xfs", "USAGE": "filesystem"}, "a filesystem (xfs)"),
        ({"TYPE": "crypto_LUKS", "USAGE": "crypto"}, "encrypted contents (crypto_LUKS)"),
        ({"TYPE": "LVM2_member", "USAGE": "raid"}, "a part of a RAID or a volume group (LVM2_member)"),
        ({"TYPE": "swap", "USAGE": "other"}, "a swap area"),
        ({"PTTYPE": "gpt"}, "a partition table (gpt)"),
        ({}, "a partition table (of an unknown kind)"),
    ],
)
def test_what_blkid_says_is_put_in_words(found: dict[str, str], words: str) -> None:
    assert signatures._in_words(found) == words


def test_what_is_not_there_is_said(way: str, tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="does not exist"):
        signatures.find(tmp_path / "absent")


def test_the_size_is_that_of_a_file_and_of_nothing_else(image: Path, tmp_path: Path) -> None:
    assert signatures.size_of(image) == 32 * MIB
    for other in (tmp_path, tmp_path / "absent", Path("/dev/null")):
        with pytest.raises(OperatorError):
            signatures.size_of(other)
