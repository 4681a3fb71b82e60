"""`nbdmirror verify` on real processes: what a flipped byte leads to, no false alarm under load, exit statuses."""

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.clients import fio
from tests.integration.cluster import NBDMIRROR, PEER_LOST, Cluster, Replica, assert_equal_copies
from tests.integration.processes import wait_for

MIB = 1 << 20
SIZE_BYTES = 64 * MIB
# What a replica says of copies that differ.
DIFFER = "copies differ|verify stopped"


def flip(replica: Replica, offset: int) -> None:
    with replica.data_path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))


def verify(replica: Replica, *options: object, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    return replica.command("verify", *options, check=False, timeout_s=timeout_s)


def suspects(replica: Replica) -> list[list[int]]:
    status: Any = replica.peek()
    ranges: list[list[int]] = status["suspects"]["ranges"]
    return ranges


def filled(a: Replica) -> None:
    with a.client() as client:
        for at in range(0, SIZE_BYTES, 4 * MIB):
            client.pwrite(bytes([at // MIB + 1]) * 4 * MIB, at)
        client.flush()


@pytest.mark.parametrize("flipped", ["a", "b"])
def test_a_flipped_byte_from_finding_to_repair(cluster: Cluster, flipped: str) -> None:
    a, b = cluster.pair()
    a.allow(DIFFER)
    filled(a)
    equal = verify(a)
    assert (equal.returncode, equal.stdout) == (0, "equal: 64 MiB compared\n"), equal
    flip(a if flipped == "a" else b, 5 * MIB + 77)
    # From either side: the secondary passes it on.
    differs = verify(b)
    assert differs.returncode == 1, differs
    assert f"differs: offset {5 * MIB}, length 4096" in differs.stdout
    for replica in (a, b):
        status = replica.status()
        assert status["suspects"] == {"bytes": 4096, "ranges": [[5 * MIB, 4096]], "more": False}
        assert status["last_verify"]["result"] == "differs"
        assert any("suspect" in warning for warning in status["warnings"])
    repaired = verify(a, "--suspects", "--repair", "--from", "secondary" if flipped == "a" else "primary")
    assert repaired.returncode == 0, repaired
    assert "repaired" in repaired.stdout
    assert suspects(a) == suspects(b) == []
    assert_equal_copies(a, b)
    with a.client() as client:
        assert client.pread(4096, 5 * MIB) == bytes([5]) * 4096


def test_equal_and_still_suspect_says_what_clears_it(cluster: Cluster) -> None:
    a, b = cluster.pair()
    a.allow(DIFFER)
    # There and back again: no client wrote, and nobody said who is right.
    for _ in range(2):
        flip(b, 5 * MIB)
        verify(a)
    clear = f"verify {b.directory} --suspects --repair --from primary"
    plain = verify(b)
    assert (plain.returncode, plain.stdout) == (0, "equal: 64 MiB compared\n")
    assert "4 KiB stay listed as suspects" in plain.stderr
    assert clear in plain.stderr
    for options in ((), ("--suspects",)):
        done = verify(b, "--json", *options)
        told = json.loads(done.stdout)
        assert (done.returncode, told["result"], told["error"]) == (0, "equal", None)
        assert told["suspects"] == {"bytes": 4096, "ranges": [[5 * MIB, 4096]], "more": False}
        assert clear in told["remedy"]
    repaired = verify(b, "--suspects", "--repair", "--from", "primary")
    assert (repaired.returncode, repaired.stdout, repaired.stderr) == (0, "equal: 4 KiB compared (the suspects)\n", "")
    assert verify(b).stderr == ""
    assert verify(b, "--suspects").stdout.startswith("no block is suspect")


def test_exit_statuses_of_what_can_not_be_done(cluster: Cluster) -> None:
    a, b = cluster.pair()
    for words in (["--repair"], ["--from", "primary"], ["--repair", "--from", "left"], ["--rate", "none"]):
        assert verify(a, *words).returncode == 2
    a.allow(PEER_LOST)
    b.allow(PEER_LOST)
    b.stop()
    a.wait_status(connection="Connecting")
    lost = verify(a)
    assert lost.returncode == 3
    assert "not connected" in lost.stderr
    told = json.loads(verify(a, "--json").stdout)
    assert "not connected" in told["error"]
    assert told["remedy"] == "verify when it is back"
    assert verify(b).returncode == 3, "nothing serves it"


def test_a_peer_lost_in_the_middle_and_the_rest_later(cluster: Cluster) -> None:
    a, b = cluster.pair()
    filled(a)
    flip(b, 0)
    a.allow(PEER_LOST, DIFFER)
    b.allow(PEER_LOST)
    with subprocess.Popen(
        [NBDMIRROR, "verify", a.directory, "--rate", "4M"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: suspects(a), 20.0, "the flipped byte to be found")
        a.wait_status(verify__done_bytes=lambda done: (done or 0) >= 2 * MIB)
        b.kill()
        out, err = process.communicate(timeout=30)
    assert process.returncode == 3, err
    assert "the next verify begins there" in err
    assert "offset 0, length 4096" in out
    b.serve()
    a.wait_in_step()
    # Below the place where it ended, and equal when it was compared.
    flip(b, MIB)
    rest = verify(a)
    assert "goes once round the whole volume" in rest.stdout
    assert rest.returncode == 1, rest
    assert f"differs: offset {MIB}, length 4096" in rest.stdout
    assert "64 MiB compared, 8 KiB differ" in rest.stdout
    # The client writes the whole block again.
    with a.client() as client:
        for offset in (0, MIB):
            client.pwrite(b"new" + bytes(4093), offset)
        client.flush()
    a.wait_status(suspects__bytes=0)
    b.wait_status(suspects__bytes=0)
    assert verify(a).returncode == 0


def test_ctrl_c_stops_it_and_it_goes_on(cluster: Cluster) -> None:
    a, _ = cluster.pair()
    a.allow(DIFFER)
    with subprocess.Popen(
        [NBDMIRROR, "verify", a.directory, "--rate", "4M", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        a.wait_status(verify__done_bytes=lambda done: (done or 0) > 0)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 3
    assert "stopped" in err
    assert json.loads(out)["error"] == "stopped"
    status = a.status()
    assert status["verify"] is None
    assert status["last_verify"]["result"] == "stopped"
    assert 0 < status["last_verify"]["checked_bytes"] < SIZE_BYTES
    on = verify(a)
    assert "goes on at" in on.stdout
    assert "equal: 64 MiB compared" in on.stdout
    assert re.match("equal: 64 MiB compared", verify(a).stdout)


def test_over_a_restart_it_goes_once_round(cluster: Cluster) -> None:
    a, _ = cluster.pair()
    a.allow(DIFFER)
    verify(a, "--background", "--rate", "8M")
    a.wait_status(verify__done_bytes=lambda done: (done or 0) >= 2 * MIB)
    assert "the next verify begins there" in verify(a, "--stop").stdout
    a.stop()
    a.serve("--primary")
    a.wait_in_step()
    verify(a, "--background", "--rate", "8M")
    running = a.wait_status(verify=lambda run: run is not None)["verify"]
    assert (running["total_bytes"], running["resumed_bytes"]) == (SIZE_BYTES, 0)
    assert running["begin"] >= 2 * MIB
    assert "once round from" in a.command("status").stdout
    stopped = verify(a, "--stop", "--json")
    assert (stopped.returncode, json.loads(stopped.stdout)["state"]) == (0, "stopped")
    result = json.loads(verify(a, "--json").stdout)
    assert (result["result"], result["resumed_bytes"] + result["done_bytes"]) == ("equal", SIZE_BYTES)
    assert a.status()["last_verify"]["checked_bytes"] == SIZE_BYTES


def test_in_the_background_the_status_tells(cluster: Cluster) -> None:
    a, b = cluster.pair()
    done = verify(a, "--background", "--rate", "20M")
    assert done.returncode == 0
    running = a.wait_status(verify=lambda run: run is not None)
    assert running["verify"]["total_bytes"] == SIZE_BYTES
    assert re.search("verify .* of 64 MiB", a.command("status").stdout)
    twice = verify(b)
    assert twice.returncode == 3
    assert "running already" in twice.stderr
    ended = a.wait_status(20.0, verify=None)
    assert ended["last_verify"]["result"] == "equal"
    assert "equal, 64 MiB compared" in b.command("status").stdout
    result = json.loads(verify(a, "--json").stdout)
    assert (result["result"], result["error"], result["remedy"]) == ("equal", None, None)
    assert json.loads(verify(a, "--json", "--background").stdout)["state"] in ("running", "done")
    a.wait_status(20.0, verify=None)


def test_no_false_alarm_under_fio(cluster: Cluster, tmp_path: Path) -> None:
    a, b = cluster.pair()
    filled(a)
    options = ("--rw=randrw", "--bs=1k-128k", "--bs_unaligned=1", "--iodepth=16", "--time_based", "--runtime=5")
    with subprocess.Popen(
        ["fio", "--name=load", "--ioengine=nbd", f"--uri={a.uri}", f"--size={SIZE_BYTES}", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    ) as load:
        rounds = 0
        while load.poll() is None and rounds < 20:
            done = verify(a, "--restart")
            assert done.returncode == 0, done
            rounds += 1
        assert load.wait(60) == 0
    assert rounds >= 2
    assert suspects(a) == suspects(b) == []
    fio(a.uri, "--rw=write", "--bs=1M", f"--size={SIZE_BYTES}")
    assert verify(a).returncode == 0
    assert_equal_copies(a, b)


def test_the_proof_after_a_reconnect_finds_a_flip_that_nobody_asked_about(cluster: Cluster) -> None:
    a, b = cluster.pair()
    with a.client() as client:
        client.pwrite(b"x" * 4096, 20 * MIB)
        client.flush()
    a.wait_status(proof__state="proven")
    b.wait_status(proof__state="proven")
    a.stop()
    b.stop()
    flip(b, 20 * MIB + 5)
    b.launch()
    a.launch("--primary")
    a.allow(DIFFER)
    for replica in (b, a):
        replica.wait_ready()
    a.wait_in_step()
    for replica in (a, b):
        status = replica.wait_status(suspects__bytes=4096, proof__state="proven")
        assert status["suspects"]["ranges"] == [[20 * MIB, 4096]]
        assert status["disk"] == "UpToDate", "it blocks nobody"
    # Durable, whoever serves next, also when nothing does.
    b.stop()
    assert b.status()["suspects"]["bytes"] == 4096
