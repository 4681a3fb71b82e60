"""A plan that failed is not tried again at full speed, says why and when, and ends when the reason is gone."""

import errno
import random
import re
from pathlib import Path
from typing import Any

from tests.integration.cluster import PEER_LOST, Cluster
from tests.integration.fault_disk import FaultDisk
from tests.integration.processes import wait_for

MIB = 1 << 20
DISK = PEER_LOST + "|disk|space|full|fail|error|inconsistent|sync|backing|not clean|alone|promot|primary"


def tried(log: str) -> int:
    return len(re.findall("the resync stopped", log))


def test_a_resync_that_stops_is_tried_ever_later_until_somebody_says_connect(
    cluster: Cluster, rng: random.Random, tmp_path: Path
) -> None:
    disk = FaultDisk(tmp_path, 64 * MIB)
    cluster.at_end(disk.close)
    a, b = cluster.created_pair("64M", options_b=("--backing", disk.path))
    for replica in (a, b):
        replica.allow(DISK)
    b.serve()
    a.serve("--primary")
    a.wait_in_step()
    assert a.status()["retry"] is None
    b.command("disconnect")
    with a.client() as client:
        client.pwrite(rng.randbytes(MIB), 0)
        client.flush()

    # Full: the secondary can't take what it lacks, again and again.
    disk.fail(write_errno=errno.ENOSPC)
    b.command("connect", check=False)
    waits = []
    for failures in (1, 2, 3):
        seen = a.wait_status(30.0, retry=lambda retry, least=failures: retry and retry["failures"] >= least)["retry"]
        assert "resync stopped" in seen["reason"] or "disk" in seen["reason"]
        waits.append(seen["next_try_in_s"])
    assert tried(a.log()) <= a.status()["retry"]["failures"], "each try is counted"
    assert max(waits) > 2.0, "the third wait is longer than the first one can be"
    text = a.command("status").stdout
    assert re.search(r"retry +the plan failed \d+ times, next try in", text)

    # There is room again; nobody has to wait for the next try. Either side may say so.
    disk.fail()
    b.command("connect")
    for replica in (a, b):
        replica.wait_in_step()
        assert replica.status()["retry"] is None


def test_an_unreachable_peer_is_no_failed_plan(cluster: Cluster) -> None:
    a, b = cluster.pair()
    for replica in (a, b):
        replica.allow(DISK)
    b.kill()
    a.wait_status(connection="Connecting")

    def dialled_often() -> dict[str, Any] | None:
        status = a.peek()
        return status if status is not None and status["retry"] is None else None

    wait_for(dialled_often, 5.0, "a status without a failed plan")
    b.serve()
    a.wait_in_step(5.0)
    assert a.status()["retry"] is None
