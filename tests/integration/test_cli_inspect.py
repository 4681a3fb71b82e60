"""`nbdmirror inspect`: sound metadata is told in words, damage is named with exit status 1, nothing is ever changed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, nbdmirror

RECORD = 4096
RING_AT = 2 * RECORD
MAP_AT = RING_AT + 64 * RECORD


def make(directory: Path) -> Path:
    nbdmirror("create", directory, "--name", "vol", "--size", "64M")
    return directory


def scribble(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"scribble")


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()}


def test_a_sound_replica(tmp_path: Path) -> None:
    replica = make(tmp_path / "a")
    before = contents(replica)
    done = nbdmirror("inspect", replica)
    for words in ("vol, 64 MiB (67108864 bytes)", "first copy", "UpToDate", "1024", "all records are sound"):
        assert words in done.stdout
    assert done.stderr == ""
    assert contents(replica) == before


def _truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "first superblock": (lambda replica: scribble(replica / "meta", 100), "first copy of the superblock"),
    "second superblock": (lambda replica: scribble(replica / "meta", RECORD + 100), "second copy of the superblock"),
    "log record": (lambda replica: scribble(replica / "meta", RING_AT + 7 * RECORD), "activity log"),
    "map page": (lambda replica: scribble(replica / "meta", MAP_AT + 50), "page 0 of the dirty map"),
    "short metadata": (lambda replica: _truncate(replica / "meta", RING_AT + 100), "truncated"),
    "empty metadata": (lambda replica: _truncate(replica / "meta", 0), "superblock"),
    "short data": (lambda replica: _truncate(replica / "data", 4096), "truncated"),
    "no data": (lambda replica: (replica / "data").unlink(), "No such file"),
    "no suspects": (lambda replica: (replica / "suspects").unlink(), "suspects: it is missing"),
    "no unproven": (lambda replica: (replica / "unproven").unlink(), "unproven: it is missing"),
    "suspects": (lambda replica: scribble(replica / "suspects", 100), "page 0 of the suspects"),
    "unproven": (lambda replica: scribble(replica / "unproven", 100), "page 0 of the unproven extents"),
    "configuration": (lambda replica: (replica / "volume.toml").write_text("x"), "volume.toml"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    damage, words = DAMAGES[case]
    replica = make(tmp_path / "a")
    damage(replica)
    before = contents(replica)
    done = nbdmirror("inspect", replica, check=False)
    assert done.returncode == 1, done
    assert "DAMAGED" in done.stdout
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(replica) == before


def test_missing_maps_are_named_until_a_start_makes_them(cluster: Cluster) -> None:
    a = cluster.standalone()
    a.allow("missing")
    for name in ("suspects", "unproven"):
        (a.directory / name).unlink()
    done = a.command("inspect", check=False)
    assert done.returncode == 1
    for words in ("which blocks were found different is forgotten", "all of the volume is compared"):
        assert words in done.stderr
        assert any(words in warning for warning in a.status()["warnings"])
    a.serve()
    a.stop()
    assert "all records are sound" in a.command("inspect").stdout


def test_both_superblocks_damaged_says_what_can_be_done(tmp_path: Path) -> None:
    replica = make(tmp_path / "a")
    scribble(replica / "meta", 100)
    scribble(replica / "meta", RECORD + 100)
    for verb in ("inspect", "status", "serve"):
        done = nbdmirror(verb, replica, check=False)
        assert done.returncode == 1, done
        assert "both copies of the superblock are damaged" in done.stdout + done.stderr
        assert "create --join" in done.stderr


def test_while_it_is_served(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    done = a.command("inspect")
    assert "being served" in done.stderr
    assert "established" in done.stdout
