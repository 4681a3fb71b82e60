"""nbdkit makes new threads for every connection: they cost nothing once they are gone, and little while they live."""

import itertools
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.integration.cluster import Cluster, Replica
from tests.integration.processes import wait_for

BLOCK = 4096
CONNECTIONS = 1000
AT_ONCE = 16
REQUESTS = 32
# What 1 000 connections that leak their thread states leave behind is 80 MiB; what the allocator keeps or not is less
# than a tenth of that.
GROWTH_LIMIT_KIB = 8 * 1024
HANG_UP_LINES = (r"nbdkit: .*(write reply|write data|read request|read data):", "closed by the client|hung up")


class Usage:
    """What nbdkit's process holds right now."""

    def __init__(self, pid: int) -> None:
        status = Path(f"/proc/{pid}/status").read_text()
        self.threads = int(re.findall(r"^Threads:\s+(\d+)", status, re.MULTILINE)[0])
        self.anonymous_kib = int(re.findall(r"^RssAnon:\s+(\d+)", status, re.MULTILINE)[0])
        self.descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        self.page_faults = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def write_blocks(handle: Any, count: int, depth: int) -> None:
    """`count` writes of 4 KiB, `depth` of them on the way at a time."""
    buffer = nbd.Buffer.from_bytearray(bytearray(os.urandom(BLOCK)))
    errors: list[int] = []

    def done(error: Any) -> int:
        errors.extend([error.value] if error.value else [])
        return 1

    for number in range(count):
        while handle.aio_in_flight() >= depth:
            handle.poll(-1)
        handle.aio_pwrite(buffer, number * BLOCK % handle.get_size(), done)
    while handle.aio_in_flight():
        handle.poll(-1)
    assert not errors


def connections(replica: Replica, count: int, rude: bool = False) -> None:
    """`count` connections, AT_ONCE in parallel, each with REQUESTS writes on all of its threads.

    Rude ones hang up with their requests on the way.
    """
    left = iter(range(count))
    take = threading.Lock()
    failures: list[Exception] = []

    def work() -> None:
        while True:
            with take:
                if next(left, None) is None:
                    return
            try:
                handle = replica.connect_client()
                if rude:
                    data = bytearray(BLOCK)
                    for number in range(REQUESTS):
                        handle.aio_pwrite(nbd.Buffer.from_bytearray(data), number * BLOCK)
                    del handle  # closes the socket
                else:
                    write_blocks(handle, REQUESTS, REQUESTS)
                    handle.shutdown()
            except nbd.Error as error:
                failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(AT_ONCE)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def settled(replica: Replica, threads: int) -> Usage:
    """The usage once all threads of all connections have ended."""
    pid = replica.nbdkit_pid
    wait_for(lambda: Usage(pid).threads <= threads, 10.0, f"nbdkit to have {threads} threads again")
    return Usage(pid)


@pytest.mark.parametrize("rude", [False, True], ids=["polite", "rude"])
def test_a_thousand_connections_leave_no_trace(cluster: Cluster, rude: bool) -> None:
    a = cluster.standalone("64M").serve()
    if rude:
        a.allow(*HANG_UP_LINES)
    pid = a.nbdkit_pid
    idle = Usage(pid)
    connections(a, 10 * AT_ONCE, rude)  # what the allocator keeps for AT_ONCE connections at a time
    before = settled(a, idle.threads)
    connections(a, CONNECTIONS, rude)
    after = settled(a, idle.threads)
    assert a.nbdkit_pid == pid
    wait_for(lambda: Usage(pid).descriptors <= idle.descriptors, 10.0, "the descriptors of all connections to close")
    assert after.anonymous_kib - before.anonymous_kib < GROWTH_LIMIT_KIB
    with a.client() as handle:
        handle.flush()


def test_worker_threads_keep_their_python_state(cluster: Cluster) -> None:
    """A thread state made anew at every request is mapped, touched and unmapped: at least one page fault a request."""
    a = cluster.standalone("64M").serve()
    pid = a.nbdkit_pid
    requests = 4000
    for _ in range(2):  # the second connection has new threads, perhaps with the identifiers of the first
        with a.client() as handle:
            write_blocks(handle, requests, AT_ONCE)
            before = Usage(pid)
            write_blocks(handle, requests, AT_ONCE)
            assert Usage(pid).page_faults - before.page_faults < requests / 4


def test_many_connections_of_one_client_at_once(cluster: Cluster) -> None:
    a = cluster.standalone("64M").serve()
    idle = Usage(a.nbdkit_pid)
    handles = [a.connect_client() for _ in range(100)]
    for round_number, handle in itertools.product(range(3), handles):
        handle.pwrite(bytes([round_number + 1]) * BLOCK, handles.index(handle) * BLOCK)
    for number, handle in enumerate(handles):
        assert handles[-1 - number].pread(BLOCK, number * BLOCK) == b"\3" * BLOCK
        assert handle.pread(BLOCK, number * BLOCK) == b"\3" * BLOCK
    for handle in handles:
        handle.shutdown()
    settled(a, idle.threads)


def test_a_signal_dumps_all_threads(cluster: Cluster) -> None:
    a = cluster.standalone("64M").serve()
    with a.client() as handle:
        handle.pwrite(b"x" * BLOCK, 0)
        os.kill(a.nbdkit_pid, signal.SIGUSR1)
        a.wait_log(r"Thread 0x[0-9a-f]+ .*most recent call first")
        assert handle.pread(BLOCK, 0) == b"x" * BLOCK
