"""What differs, and the plan, before anything is done: `diff`, `connect --dry-run`, and `plan` in the status."""

import json
import random
from typing import Any

from tests.integration.cluster import PEER_LOST, Cluster, Replica, assert_equal_copies, write
from tests.integration.processes import free_port
from tests.integration.test_cli_usage import on_terminal

MIB = 1 << 20
SPLIT = PEER_LOST + "|split.brain|discard|promot|primary|outdated|policy|alone"


def split(cluster: Cluster, rng: random.Random) -> tuple[Replica, Replica]:
    """Both primary; own blocks at 10 MiB (a) and 20 MiB (b), both changed 1 MiB at 30 MiB, b half a MiB more."""
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(SPLIT)
    a.command("disconnect")
    b.wait_status(disk="Outdated")
    b.promote("--force")
    write(a, rng.randbytes(MIB), 10 * MIB)
    write(b, rng.randbytes(MIB), 20 * MIB)
    write(a, rng.randbytes(MIB), 30 * MIB)
    write(b, rng.randbytes(3 * MIB // 2), 30 * MIB)
    return a, b


def diff(replica: Replica, *options: object) -> tuple[int, dict[str, Any]]:
    done = replica.command("diff", "--json", *options, check=False)
    return done.returncode, json.loads(done.stdout)


RANGES = [
    (10 * MIB, MIB, "own", "peer"),
    (20 * MIB, MIB, "peer", "own"),
    (30 * MIB, MIB, "both", "both"),
    (31 * MIB, MIB // 2, "peer", "own"),
]


def test_a_split_brain_is_listed_before_anybody_discards_anything(cluster: Cluster, rng: random.Random) -> None:
    a, b = split(cluster, rng)
    # Disconnected by the operator, refused as split brain, primary or not: it is told all the same.
    for connected in (False, True):
        if connected:
            a.command("connect", check=False)
            for replica in (a, b):
                replica.wait_log("split.brain")
        for replica, who in ((a, 2), (b, 3)):
            code, found = diff(replica)
            assert code == 1
            assert found["complete"]
            listed = [(one["offset"], one["length"], one["changed_by"]) for one in found["ranges"]]
            assert listed == [(row[0], row[1], row[who]) for row in RANGES]
            assert found["range_count"] == len(RANGES)
        found = diff(a)[1]
        assert (found["own_bytes"], found["peer_bytes"], found["both_bytes"]) == (MIB, 3 * MIB // 2, MIB)
    assert a.status()["role"] == b.status()["role"] == "primary"

    few = diff(a, "--limit", 1)[1]
    assert (len(few["ranges"]), few["range_count"], few["own_bytes"]) == (1, 4, MIB)
    plain = a.command("diff", check=False)
    assert plain.stdout.splitlines() == [f"{offset} {length} {who}" for offset, length, who, _ in RANGES]
    assert "4 ranges" in plain.stderr
    shown = on_terminal("diff", str(a.directory)).decode()
    assert "offset" in shown
    assert "the peer" in shown

    # What was listed is what then travels.
    b.demote()
    b.command("connect", "--discard-my-data")
    b.wait_in_step()
    a.wait_in_step()
    assert a.status()["last_resync"]["dirty_bytes"] == 7 * MIB // 2
    # Either side says so, not the sum of both maps.
    assert [replica.status()["plan"]["bytes"] for replica in (a, b)] == [7 * MIB // 2] * 2
    assert_equal_copies(a, b)
    assert diff(a)[0] == diff(b)[0] == 0
    assert "nothing differs" in a.command("diff").stderr


def test_suspects_differ_too(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(PEER_LOST + "|copies differ")
    for offset in (5 * MIB, 7 * MIB, 7 * MIB + 4096):
        with b.data_path.open("r+b") as file:
            file.seek(offset)
            file.write(b"flip")
    assert a.command("verify", check=False).returncode == 1
    listed = [{"offset": 5 * MIB, "length": 4096}, {"offset": 7 * MIB, "length": 8192}]
    for replica in (a, b):
        code, found = diff(replica)
        assert (code, found["complete"], found["range_count"]) == (1, True, 0)
        assert (found["suspect_bytes"], found["suspect_ranges"], found["suspect_range_count"]) == (12288, listed, 2)
        plain = replica.command("diff", check=False)
        assert plain.returncode == 1
        assert plain.stdout.splitlines() == [f"{5 * MIB} 4096 suspect", f"{7 * MIB} 8192 suspect"]
        assert "12 KiB are suspect, 2 ranges" in plain.stderr
        assert f"verify {replica.directory} --suspects --repair --from primary" in plain.stderr
        assert "nothing differs" not in plain.stderr
    few = diff(a, "--limit", 1)[1]
    assert (few["suspect_ranges"], few["suspect_range_count"]) == (listed[:1], 2)
    assert "suspect" in on_terminal("diff", str(a.directory)).decode()
    # Apart, beside what was changed since; the peer can be asked, then it can't, then nothing serves.
    a.command("disconnect")
    write(a, rng.randbytes(MIB), 10 * MIB)
    code, found = diff(a)
    assert (code, found["own_bytes"], found["suspect_bytes"]) == (1, MIB, 12288)
    b.stop()
    assert diff(a)[1]["suspect_ranges"] == listed
    code, found = diff(b)
    assert (code, found["suspect_ranges"]) == (3, listed)
    b.serve()
    a.command("connect")
    a.wait_in_step()
    a.command("verify", "--repair", "--from", "primary")
    assert diff(a)[0] == 0
    assert "nothing differs" in a.command("diff").stderr


def test_without_the_peer_own_changes_are_told_and_said_to_be_half_of_it(cluster: Cluster, rng: random.Random) -> None:
    a, b = split(cluster, rng)
    b.stop()
    for served in (True, False):
        if not served:
            a.stop()
        code, found = diff(a)
        assert code == 3
        assert not found["complete"]
        assert found["unknown"]
        assert (found["own_bytes"], found["peer_bytes"], found["both_bytes"]) == (2 * MIB, None, None)
        assert [(one["offset"], one["length"]) for one in found["ranges"]] == [(10 * MIB, MIB), (30 * MIB, MIB)]
        assert "not the whole difference" in a.command("diff", check=False).stderr


def test_where_the_maps_do_not_reach_back_it_says_so(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.created_pair()
    for replica in (a, b):
        replica.allow(SPLIT, "no answer|differ")
        replica.configure(wait_for_peer_s=0.1)
        replica.serve("--primary")
        write(replica, rng.randbytes(MIB), 0)
        replica.stop()
    a.serve()
    b.serve()
    code, found = diff(a)
    assert code == 3
    assert "different volumes" in found["unknown"]
    for replica in (a, b):
        assert "nothing differs" not in replica.command("diff", check=False).stderr


def test_diff_of_what_is_no_mirrored_replica_can_not_be_told(cluster: Cluster) -> None:
    a = cluster.standalone()
    done = a.command("diff", check=False)
    assert done.returncode == 3
    assert "stands alone" in done.stderr
    assert a.command("diff", "--limit", "-1", check=False).returncode == 2


def plan(replica: Replica, *options: str) -> dict[str, Any]:
    found = json.loads(replica.command("connect", "--dry-run", "--json", *options).stdout)
    assert isinstance(found, dict)
    return found


def superblock(replica: Replica) -> bytes:
    with (replica.directory / "meta").open("rb") as file:
        return file.read(64 * 1024)


def test_the_plan_before_the_act(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(SPLIT)
    shown = plan(a)
    assert (shown["connected"], shown["rule"], shown["bytes"]) == (True, "adopt-fresh", 0)
    assert a.status()["plan"]["rule"] == "adopt-fresh"
    a.command("disconnect")
    write(a, rng.randbytes(2 * MIB), 0)

    before = superblock(a), superblock(b)
    for replica, action, direction in (
        (a, "send the changed blocks", "to the peer"),
        (b, "receive the changed blocks", "from the peer"),
    ):
        shown = plan(replica)
        assert (shown["rule"], shown["action"], shown["direction"]) == ("behind", action, direction)
        assert (shown["bytes"], shown["expected_s"]) == (2 * MIB, None), "no resync was measured yet"
    assert "disconnected by its operator" in plan(b)["hindrance"]
    assert plan(a)["hindrance"] is None
    text = a.command("connect", "--dry-run").stdout
    for word in ("behind", "to the peer", "at most 2 MiB", "unknown", "this replica moved on alone"):
        assert word in text
    assert (superblock(a), superblock(b)) == before, "nothing durable changed"
    assert a.status()["connection"] == "Standalone", "and nothing was connected"

    a.command("connect")
    a.wait_in_step()
    for replica, direction in ((a, "to the peer"), (b, "from the peer")):
        chosen = replica.status()["plan"]
        assert (chosen["rule"], chosen["direction"]) == ("behind", direction)
    assert a.status()["plan"]["bytes"] == 2 * MIB
    assert "behind: resync to the peer, at most 2 MiB" in a.command("status").stdout

    # The next one is measured by the last one.
    a.command("disconnect")
    write(a, rng.randbytes(MIB), 0)
    assert plan(a)["expected_s"] is not None


def test_a_small_resync_does_not_make_the_measured_speed_forgotten(cluster: Cluster, rng: random.Random) -> None:
    a, b = cluster.pair("128M")
    for replica in (a, b):
        replica.allow(SPLIT)
    for size_bytes in (80 * MIB, 4096):
        a.command("disconnect")
        for offset in range(0, size_bytes, 8 * MIB):
            write(a, rng.randbytes(min(size_bytes, 8 * MIB)), offset)
        a.command("connect")
        a.wait_in_step()
        seen = [replica.status() for replica in (a, b)]
        assert [one["last_resync"]["dirty_bytes"] for one in seen] == [size_bytes] * 2
        speeds = {one["last_resync"]["bytes_per_s"] for one in seen}
        if size_bytes > 4096:
            measured = speeds
    assert speeds == measured
    assert seen[0]["activity_log"]["bytes_per_s"] == min(*speeds, 400 * MIB)


def test_the_plan_of_a_split_brain_and_of_discarding(cluster: Cluster, rng: random.Random) -> None:
    a, b = split(cluster, rng)
    b.demote()
    before = superblock(a), superblock(b)
    shown = plan(b)
    assert (shown["rule"], shown["action"]) == ("split-brain", "stay apart: split brain")
    assert shown["direction"] is shown["bytes"] is shown["expected_s"] is None
    assert "--discard-my-data" in shown["remedy"]
    shown = plan(b, "--discard-my-data")
    assert (shown["rule"], shown["direction"], shown["bytes"]) == ("discard-bitmap", "from the peer", 7 * MIB // 2)
    assert plan(a, "--discard-my-data")["rule"] == "discard-on-primary"
    assert (superblock(a), superblock(b)) == before
    assert plan(b)["rule"] == "split-brain", "the word of a dry run is forgotten at once"


def test_a_dry_run_without_a_peer_says_why(cluster: Cluster) -> None:
    a = cluster.replica("a")
    a.create("1M", "--listen", f"tcp://127.0.0.1:{free_port()}", "--peer", f"tcp://127.0.0.1:{free_port()}")
    a.serve()
    done = a.command("connect", "--dry-run", check=False)
    assert done.returncode == 1
    assert "can't reach the peer" in done.stderr
    assert a.command("connect", "--json", check=False).returncode == 2
