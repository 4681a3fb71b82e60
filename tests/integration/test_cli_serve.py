"""`nbdmirror serve` as a process: its sockets, its child, its signals, and what it leaves behind (nothing)."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.cluster import NBDMIRROR, Cluster, Replica, nbdmirror
from tests.integration.processes import free_port, process_state, run, signal_quietly, wait_for, wait_gone


def files(replica: Replica) -> list[str]:
    return sorted(path.name for path in replica.directory.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_it_and_nothing_is_left(cluster: Cluster, number: signal.Signals) -> None:
    a = cluster.standalone().serve()
    nbdkit = a.nbdkit_pid
    with a.client() as client:
        client.pwrite(b"x" * 4096, 0)
        signal_quietly(a.pid, number)
        assert a.process is not None
        assert a.process.wait(5) == 0
    wait_gone(nbdkit, 1)
    assert files(a) == ["data", "lock", "meta", "parked", "suspects", "unproven", "volume.toml"]
    assert "stopped, clean" in a.log()
    assert not any("not stopped" in warning for warning in a.status()["warnings"])


def test_it_stops_while_it_is_starting(cluster: Cluster) -> None:
    """It waits for a peer that never comes."""
    a, _ = cluster.created_pair(wait_for_peer_s=60.0)
    a.allow("not clean")
    a.launch("--primary")
    wait_for((a.directory / "control.sock").exists, 5, "the control socket")
    assert a.stop() < 5


def test_the_first_lines_name_role_and_uri(cluster: Cluster) -> None:
    a = cluster.standalone(name="name-1").serve()
    a.wait_log(f"name-1: primary, serving NBD clients at {a.uri.replace('+', '[+]').replace('?', '[?]')}")


def test_sockets_belong_to_the_owner_alone(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    for name in ("nbd.sock", "control.sock"):
        assert stat.S_IMODE((a.directory / name).stat().st_mode) == 0o600


def test_what_a_killed_server_left_is_in_nobodys_way(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    a.kill()
    assert "nbd.sock" in files(a)
    a.serve()
    with a.client() as client:
        assert client.get_size() == 64 << 20


def test_a_second_server_may_follow_at_once_on_a_killed_parent(cluster: Cluster) -> None:
    """nbdkit notices the death of its parent and ends; the next server waits for that instead of failing."""
    a = cluster.standalone().serve()
    a.wait_log("primary, serving")
    nbdkit = a.nbdkit_pid
    signal_quietly(a.pid, signal.SIGKILL)
    assert a.process is not None
    a.process.wait(5)
    a.launch()
    wait_gone(nbdkit, 3)
    wait_for(lambda: a.log().count("primary, serving") == 2, 5, "the second server")


def test_clients_wait_while_nbdkit_is_started_again(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    a.allow("nbdkit was killed by SIGKILL")
    with a.client() as client:
        client.pwrite(b"y" * 4096, 8192)
    a.kill_nbdkit()
    with a.client() as client:  # no retry: the connection is taken by the next nbdkit
        assert client.pread(4096, 8192) == b"y" * 4096


def test_an_nbdkit_told_to_end_by_others_is_started_again(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    a.allow("nbdkit ended", "server shut down")
    a.wait_log("primary, serving")
    old = a.nbdkit_pid
    signal_quietly(old, signal.SIGTERM)
    wait_for(lambda: [pid for pid in a.nbdkit_pids() if pid != old], 5, "another nbdkit")
    assert a.wait_status(role="primary")


def test_a_hung_nbdkit_does_not_hold_up_a_stop(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    a.allow("stopped, not clean")
    nbdkit = a.nbdkit_pid
    signal_quietly(nbdkit, signal.SIGSTOP)
    wait_for(lambda: process_state(nbdkit) == "T", 5, "nbdkit to stand still")
    begin = time.monotonic()
    a.terminate()
    assert a.process is not None
    assert a.process.wait(5.5) == 0
    assert time.monotonic() - begin < 5
    wait_gone(nbdkit, 1)
    assert "stopped, not clean" in a.log()


# -- where clients come in


def test_a_unix_socket_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    a = cluster.standalone()
    path = tmp_path / "elsewhere.sock"
    a.serve("--nbd", f"unix:{path}")
    assert run(["nbdinfo", "--size", f"nbd+unix:///vol?socket={path}"]).stdout == f"{64 << 20}\n"
    a.stop()
    assert not path.exists()


def test_an_endpoint_of_volume_toml(cluster: Cluster) -> None:
    a = cluster.standalone()
    port = free_port()
    a.configure(nbd=f"tcp:127.0.0.1:{port}")
    a.serve()
    assert run(["nbdinfo", "--size", f"nbd://127.0.0.1:{port}/vol"]).stdout == f"{64 << 20}\n"


def test_a_directory_too_deep_for_a_socket(cluster: Cluster, tmp_path: Path) -> None:
    a = cluster.replica("d" * 120)
    a.create("1M")
    refused = a.serve_fails()
    assert "107" in refused.stderr
    assert "--nbd" in refused.stderr
    path = tmp_path / "short.sock"
    a.launch("--nbd", f"unix:{path}")
    wait_for(lambda: "primary, serving" in a.log(), 10, "the server")
    assert run(["nbdinfo", "--size", f"nbd+unix:///vol?socket={path}"]).stdout == f"{1 << 20}\n"
    assert a.status()["role"] == "primary"


@pytest.mark.parametrize("endpoint", ["foo", "unix:", "tcp:", "tcp:127.0.0.1:0", "tcp:::1:5", "udp:127.0.0.1:5"])
def test_an_endpoint_that_is_none_is_wrong_usage(tmp_path: Path, endpoint: str) -> None:
    done = nbdmirror("serve", tmp_path, "--nbd", endpoint, check=False)
    assert done.returncode == 2
    assert "--nbd" in done.stderr


def test_a_socket_that_another_server_listens_on(cluster: Cluster, tmp_path: Path) -> None:
    a = cluster.standalone()
    path = tmp_path / "taken.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        refused = a.serve_fails("--nbd", f"unix:{path}")
    assert str(path) in refused.stderr
    assert "another server" in refused.stderr
    assert path.exists()


def test_a_file_where_the_socket_should_be(cluster: Cluster, tmp_path: Path) -> None:
    a = cluster.standalone()
    path = tmp_path / "letter"
    path.write_text("dear")
    assert "is not a socket" in a.serve_fails("--nbd", f"unix:{path}").stderr
    assert path.read_text() == "dear"
    assert "No such file" in a.serve_fails("--nbd", f"unix:{tmp_path}/none/x.sock").stderr


def test_an_address_of_another_machine(cluster: Cluster) -> None:
    a = cluster.standalone()
    a.allow("--insecure")
    refused = a.serve_fails("--nbd", "tcp:192.0.2.1:10809", "--insecure")
    assert "192.0.2.1" in refused.stderr
    assert "an address of this machine" in refused.stderr


# -- nbdkit itself


def test_no_usable_nbdkit_is_said(cluster: Cluster, tmp_path: Path) -> None:
    a = cluster.standalone()
    old = tmp_path / "bin" / "nbdkit"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho nbdkit 1.32.5\n")
    old.chmod(0o755)

    def serve(**environment: str) -> str:
        done = subprocess.run(
            [*run_words(a)], env={**os.environ, **environment}, capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode == 1
        return done.stderr

    assert "/none is not a program" in serve(NBDMIRROR_NBDKIT="/none")
    too_old = serve(NBDMIRROR_NBDKIT="", XDG_CACHE_HOME=str(tmp_path), PATH=f"{old.parent}:{os.environ['PATH']}")
    for words in (str(old), "1.32.5", "1.42", "make setup"):
        assert words in too_old
    assert "ended with exit status 3 before the volume was ready" in serve(NBDMIRROR_NBDKIT=broken(tmp_path))


def test_nothing_of_the_users_own_runs_in_the_server(cluster: Cluster, tmp_path: Path) -> None:
    packages = tmp_path / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    packages.mkdir(parents=True)
    trace = tmp_path / "trace"
    (packages / "usercustomize.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    a = cluster.standalone()
    a.runs_under("env", f"PYTHONUSERBASE={tmp_path}")
    a.serve()
    assert not trace.exists()


def run_words(replica: Replica) -> list[str]:
    return [str(NBDMIRROR), "serve", str(replica.directory)]


def broken(directory: Path) -> str:
    """An nbdkit that ends at once."""
    path = directory / "broken"
    path.write_text("#!/bin/sh\nexit 3\n")
    path.chmod(0o755)
    return str(path)
