"""`nbdmirror destroy` asks, removes only files that nbdmirror made, and never while the replica is served."""

import subprocess
from pathlib import Path

from tests.integration.cluster import NBDMIRROR, Cluster, nbdmirror


def make(directory: Path) -> Path:
    nbdmirror("create", directory, "--name", "vol", "--size", "1M")
    return directory


def answer(directory: Path, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [NBDMIRROR, "destroy", directory], input=text, capture_output=True, text=True, timeout=20, check=False
    )


def test_it_asks_and_takes_only_yes(tmp_path: Path) -> None:
    replica = make(tmp_path / "a")
    for text in ("n\n", "\n", ""):
        done = answer(replica, text)
        assert done.returncode == 1, done
        assert "--yes" in done.stderr
        assert nbdmirror("status", replica).returncode == 0
    assert answer(replica, "y\n").returncode == 0
    assert not replica.exists()


def test_what_it_did_not_make_stays(tmp_path: Path) -> None:
    replica = make(tmp_path / "a")
    (replica / "letter").write_text("dear")
    done = nbdmirror("destroy", replica, "--yes")
    assert "letter" in done.stderr
    assert [path.name for path in replica.iterdir()] == ["letter"]


def test_what_is_no_replica_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not yours")
    for directory, why in (
        (tmp_path, "is not a replica"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "data", "is not a replica"),
    ):
        done = nbdmirror("destroy", directory, "--yes", check=False)
        assert done.returncode == 1
        assert why in done.stderr
    assert (tmp_path / "data").read_text() == "not yours"


def test_a_replica_with_a_broken_configuration_can_go(tmp_path: Path) -> None:
    replica = make(tmp_path / "a")
    (replica / "volume.toml").write_text("no toml")
    assert nbdmirror("destroy", replica, "--yes").returncode == 0
    assert not replica.exists()


def test_it_is_refused_while_served(cluster: Cluster) -> None:
    a = cluster.standalone("1M").serve()
    done = a.command("destroy", "--yes", check=False)
    assert done.returncode == 1
    assert f"served, by process {a.pid}" in done.stderr
    assert a.status()["role"] == "primary"
    a.stop()
    assert a.command("destroy", "--yes").returncode == 0
