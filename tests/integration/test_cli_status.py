"""`nbdmirror status`: documented keys, live and from disk, for people and machines, and a server that is silent."""

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.integration.cluster import NBDMIRROR, Cluster, Replica
from tests.integration.processes import free_port

KEYS: dict[str, Any] = {
    "name": str,
    "size": int,
    "serving": bool,
    "role": (str, type(None)),
    "disk": str,
    "connection": (str, type(None)),
    "peer": dict,
    "protocol": str,
    "generation": str,
    "dirty_bytes": int,
    "plan": (dict, type(None)),
    "retry": (dict, type(None)),
    "resync": (dict, type(None)),
    "last_resync": (dict, type(None)),
    "suspects": dict,
    "proof": (dict, type(None)),
    "verify": (dict, type(None)),
    "last_verify": (dict, type(None)),
    "resize": (dict, type(None)),
    "activity_log": dict,
    "spin": dict,
    "io": (dict, type(None)),
    "latency": (dict, type(None)),
    "compiled": (bool, type(None)),
    "warnings": list,
}


def check_keys(status: dict[str, Any]) -> None:
    assert [key for key, kind in KEYS.items() if not isinstance(status.get(key, ...), kind)] == [], status
    assert sorted(status["peer"]) == ["address", "disk", "role"]
    trade = ["bytes_per_s", "goal_s", "larger", "miss_rate", "reason", "resync_s", "smaller"]
    assert sorted(status["activity_log"]) == sorted([*trade, "extents", "hits", "misses", "used"])


def test_keys_from_disk_and_from_the_server(cluster: Cluster) -> None:
    a = cluster.standalone("64M")
    before = a.status()
    check_keys(before)
    assert (before["name"], before["size"], before["serving"]) == ("vol", 64 << 20, False)
    assert (before["role"], before["connection"], before["disk"]) == (None, None, "UpToDate")
    assert before["peer"] == {"address": None, "role": None, "disk": None}
    a.serve()
    live = a.status()
    check_keys(live)
    assert (live["serving"], live["role"], live["connection"]) == (True, "primary", "Standalone")
    # Its log holds all of the 64 MiB.
    assert (live["activity_log"]["larger"], live["activity_log"]["resync_s"] is None) == (None, False)
    assert sorted(live["latency"]) == ["flush", "write"]
    a.stop()
    after = a.status()
    check_keys(after)
    assert (after["serving"], after["generation"]) == (False, live["generation"])


def test_from_disk_it_changes_nothing(cluster: Cluster) -> None:
    a = cluster.standalone()
    before = {path.name: path.stat().st_mtime_ns for path in a.directory.iterdir()}
    a.status()
    assert {path.name: path.stat().st_mtime_ns for path in a.directory.iterdir()} == before


def test_a_crash_is_seen_from_disk(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    a.kill()
    status = a.status()
    assert status["serving"] is False
    assert any("not stopped in order" in warning for warning in status["warnings"])


def test_a_peer_that_was_never_there(cluster: Cluster) -> None:
    a = cluster.replica("a")
    peer = f"tcp://127.0.0.1:{free_port()}"
    a.create("1M", "--listen", f"tcp://127.0.0.1:{free_port()}", "--peer", peer)
    assert a.status()["peer"] == {"address": peer, "role": None, "disk": None}


def test_for_people_it_is_plain_in_a_pipe(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    page = a.command("status").stdout
    assert "\x1b" not in page
    for words in ("volume", "vol, 64 MiB", "primary", "UpToDate", "warning: "):
        assert words in page


def watch(replica: Replica, *options: str, lines: int = 2) -> list[str]:
    """The first lines of --watch; then Ctrl-C, which is no error."""
    command = [str(NBDMIRROR), "status", str(replica.directory), "--watch", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        found = [watching.stdout.readline() for _ in range(lines)]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 0
        assert watching.stderr.read() == ""
    return found


def test_watch_prints_a_line_each_second_in_a_pipe(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    for line in watch(a):
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S*; vol; primary; UpToDate; Standalone; ", line), line
    for line in watch(a, "--json"):
        check_keys(json.loads(line))


def test_a_server_that_does_not_answer(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    a.freeze()
    done = a.command("status", "--json", check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] in done.stderr
    assert str(a.directory) in done.stderr
    assert f"process {a.pid}" in done.stderr
    assert "within" in done.stderr
    a.thaw()
    assert a.status()["serving"]


def test_commands_without_a_server_say_how_to_start_one(cluster: Cluster, tmp_path: Path) -> None:
    a = cluster.standalone()
    for verb in ("promote", "demote", "switch", "connect", "disconnect"):
        done = a.command(verb, check=False)
        assert done.returncode == 1
        assert "nothing serves" in done.stderr
        assert f"nbdmirror serve {a.directory}" in done.stderr
    assert not (tmp_path / "a" / "lock").exists()
