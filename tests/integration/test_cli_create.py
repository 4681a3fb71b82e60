"""`nbdmirror create`: what it makes, what it refuses, and that a refusal or an interruption leaves nothing behind."""

import signal
import stat
import subprocess
from pathlib import Path

import pytest

from tests.integration.cluster import NBDMIRROR, Cluster, nbdmirror
from tests.integration.disks import SmallFilesystem
from tests.integration.processes import run, wait_for

MIB = 1 << 20


def create(directory: Path, *options: object, name: str = "vol", size: str = "1M") -> subprocess.CompletedProcess[str]:
    return nbdmirror("create", directory, "--name", name, "--size", size, *options, check=False)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Exit status, and each of the words on stderr, which is no stack."""
    assert done.returncode == code, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr


def test_files_are_private_and_sparse_data_is_complete(tmp_path: Path) -> None:
    replica = tmp_path / "a"
    assert create(replica, size="64M").returncode == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [replica, *replica.iterdir()]}
    files = ("data", "meta", "parked", "suspects", "unproven", "volume.toml")
    assert modes == {"a": 0o700, **dict.fromkeys(files, 0o600)}
    data, metadata = (replica / "data").stat(), (replica / "meta").stat()
    assert (data.st_size, data.st_blocks) == (64 * MIB, 0)
    assert metadata.st_blocks * 512 >= metadata.st_size, "metadata is allocated in full"


@pytest.mark.parametrize(("text", "size_bytes"), [("8192", 8192), ("512MiB", 512 * MIB), ("10G", 10 << 30)])
def test_sizes(tmp_path: Path, text: str, size_bytes: int) -> None:
    assert create(tmp_path / "a", size=text).stderr == ""
    assert (tmp_path / "a" / "data").stat().st_size == size_bytes


@pytest.mark.parametrize(("text", "size_bytes"), [("1", 4096), ("1000000", 1003520)])
def test_a_size_is_rounded_up_and_that_is_said(tmp_path: Path, text: str, size_bytes: int) -> None:
    assert f"rounded up from {text} to {size_bytes}" in create(tmp_path / "a", size=text).stderr
    assert (tmp_path / "a" / "data").stat().st_size == size_bytes


@pytest.mark.parametrize("text", ["0", "-5G", "1.5", "ten"])
def test_a_wrong_size_is_refused(tmp_path: Path, text: str) -> None:
    refused(create(tmp_path / "a", size=text), 2, "--size")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "ä", "n" * 64])
def test_a_wrong_name_is_refused(tmp_path: Path, name: str) -> None:
    refused(create(tmp_path / "a", name=name), 2, "--name")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["V.1_a-b", "n" * 63])
def test_names(tmp_path: Path, name: str) -> None:
    assert create(tmp_path / "a", name=name).returncode == 0
    assert f'name = "{name}"' in (tmp_path / "a" / "volume.toml").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--listen", "tcp://127.0.0.1:7000"], ["--listen needs --peer"]),
        (["--peer", "tcp://127.0.0.1:7000"], ["--peer needs --listen"]),
        (["--listen", "tcp://127.0.0.1:7000", "--peer", "tcp://127.0.0.1:7000"], ["same address"]),
        (["--listen", "127.0.0.1:7000", "--peer", "tcp://127.0.0.1:7001"], ["--listen", "begin with tcp://"]),
        (["--listen", "tcp://127.0.0.1:7000", "--peer", "tcp://127.0.0.1"], ["--peer", "no port"]),
        (["--listen", "tcp://127.0.0.1:70000", "--peer", "tcp://127.0.0.1:1"], ["--listen", "70000"]),
        (["--protocol", "D"], ["--protocol", "'D'", "A, B, C"]),
        (["--keep-data"], ["--backing"]),
        (["--backing", "/dev/null", "--keep-data", "--force"], ["alternatives"]),
        (["--join"], ["--join", "--peer"]),
        (["--wat"], ["--wat"]),
    ],
)
def test_wrong_usage(tmp_path: Path, options: list[str], words: list[str]) -> None:
    refused(create(tmp_path / "a", *options), 2, *words)
    assert list(tmp_path.iterdir()) == []


def test_missing_options_are_named(tmp_path: Path) -> None:
    refused(nbdmirror("create", tmp_path / "a", "--name", "v", check=False), 2, "--size")
    refused(nbdmirror("create", tmp_path / "a", "--size", "1M", check=False), 2, "--name")
    refused(nbdmirror("create", check=False), 2, "DIR")


def test_a_replica_that_is_there_is_not_touched(tmp_path: Path) -> None:
    assert create(tmp_path / "a").returncode == 0
    (tmp_path / "a" / "data").write_bytes(b"precious")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "a").iterdir()}
    refused(create(tmp_path / "a", size="2M"), 1, str(tmp_path / "a"), "is a replica already", "nothing")
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "a").iterdir()} == before


def test_a_directory_with_anything_in_it_is_refused_an_empty_one_is_not(tmp_path: Path) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "letter").write_text("dear")
    refused(create(full), 1, "not empty")
    assert [path.name for path in full.iterdir()] == ["letter"]
    assert create(empty).returncode == 0
    (tmp_path / "file").write_text("x")
    refused(create(tmp_path / "file"), 1, "not a directory")


def test_an_interrupted_create_is_recognised_and_can_be_removed(tmp_path: Path) -> None:
    """kill -9 while the metadata (132 MiB for 4 TiB) is being written."""
    replica = tmp_path / "a"
    killed = subprocess.Popen(
        [NBDMIRROR, "create", replica, "--name", "vol", "--size", "4T"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for((replica / "data").exists, 10, "the data file")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (replica / "volume.toml").exists()
    for verb, options in (("create", ("--name", "vol", "--size", "1M")), ("serve", ()), ("status", ())):
        refused(nbdmirror(verb, replica, *options, check=False), 1, "interrupted", "nbdmirror destroy")
    assert nbdmirror("destroy", replica, "--yes").returncode == 0
    assert create(replica).returncode == 0


def test_no_room_for_the_metadata_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    small = SmallFilesystem(tmp_path / "small", 2 * MIB)
    cluster.at_end(small.close)
    refused(create(small.path / "a", size="1T"), 1, "No space left", "metadata")
    assert list(small.path.iterdir()) == []
    assert create(small.path / "a", size="1G").returncode == 0


def test_a_directory_too_deep_for_a_socket_is_warned_of(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    done = create(deep)
    assert done.returncode == 0
    assert "107" in done.stderr
    assert "--nbd" in done.stderr


def test_addresses_that_are_not_loopback_are_warned_of(tmp_path: Path) -> None:
    done = create(tmp_path / "a", "--listen", "tcp://10.1.2.3:7000", "--peer", "tcp://127.0.0.1:7000")
    assert done.returncode == 0
    assert "10.1.2.3" in done.stderr
    assert "--insecure" in done.stderr


# -- a backing


def test_a_backing_must_be_there_large_enough_and_of_the_right_kind(tmp_path: Path) -> None:
    backing = tmp_path / "disk"
    refused(create(tmp_path / "a", "--backing", backing), 1, str(backing), "No such file")
    refused(create(tmp_path / "a", "--backing", tmp_path), 1, "neither a file nor a block device")
    refused(create(tmp_path / "a", "--backing", "/dev/null"), 1, "neither a file nor a block device")
    backing.write_bytes(bytes(MIB))
    refused(create(tmp_path / "a", "--backing", backing, size="2M"), 1, str(MIB), str(2 * MIB))
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_the_size_of_a_backing_is_taken_and_rounded_down(tmp_path: Path) -> None:
    backing = tmp_path / "disk"
    backing.write_bytes(bytes(3 * 4096 + 5))
    done = nbdmirror("create", tmp_path / "a", "--name", "v", "--backing", backing)
    assert "12288" in done.stderr
    assert f'backing = "{backing}"' in (tmp_path / "a" / "volume.toml").read_text()
    assert not (tmp_path / "a" / "data").exists()
    assert backing.stat().st_size == 3 * 4096 + 5


@pytest.mark.parametrize("option", ["--keep-data", "--force"])
def test_a_filesystem_is_not_taken_without_a_word(tmp_path: Path, option: str) -> None:
    backing = tmp_path / "disk"
    backing.write_bytes(bytes(4 * MIB))
    run(["mke2fs", "-q", "-t", "ext4", backing])
    before = backing.read_bytes()
    refused(create(tmp_path / "a", "--backing", backing, size="4M"), 1, "ext4", "--keep-data", "--force")
    assert not (tmp_path / "a").exists()
    assert create(tmp_path / "a", "--backing", backing, option, size="4M").returncode == 0
    assert backing.read_bytes() == before


def test_destroy_leaves_a_backing(tmp_path: Path) -> None:
    backing = tmp_path / "disk"
    backing.write_bytes(b"x" * MIB)
    assert create(tmp_path / "a", "--backing", backing).returncode == 0
    assert nbdmirror("destroy", tmp_path / "a", "--yes").returncode == 0
    assert not (tmp_path / "a").exists()
    assert backing.read_bytes() == b"x" * MIB
