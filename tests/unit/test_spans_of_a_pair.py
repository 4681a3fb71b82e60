"""Spans on two real replicas in this process: every protocol, an old peer, and what is under way now."""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirror.core import stages
from mirror.core.errors import DeviceError, MirrorError
from mirror.core.stages import APPLY, APPLY_FLUSH, DISK, DURABLE_WRITE, FLUSHES, LINK, PEER_DISK, TOTAL, WRITE
from mirror.core.wire import Flag, MessageType
from mirror.link import Stream
from mirror.primary import Gate
from mirror.running import described
from mirror.spans import BURST_WRITES
from nbd_server.volume import Volume
from tests.pair import PATIENCE_S, cut, pair

DATA = memoryview(b"\x5a" * 4096)


def report(volume: Volume) -> dict[str, Any]:
    return volume._trace.spans.report(time.perf_counter_ns())


def write_some(volume: Volume) -> None:
    for number in range(BURST_WRITES):
        volume.write(DATA, number % 8 * 4096, False)
    volume.write(DATA, 0, True)
    volume.flush()


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_each_stage_has_its_time(tmp_path: Path, protocol: str) -> None:
    with pair(tmp_path, protocol) as (first, second):
        write_some(first)
        own = report(first)
        assert own["writes"]["count"] == BURST_WRITES + 1
        assert {kind: own["stages"][kind][TOTAL]["count"] >= 1 for kind in (WRITE, DURABLE_WRITE, FLUSHES)}
        for entry in own["slowest"]:
            # The peer works beside the own disk; all others follow each other.
            parts_us = sum(us for name, us in entry["stages_us"].items() if name not in (PEER_DISK, LINK))
            assert parts_us <= entry["total_us"] + len(stages.STAGES), entry
        assert own["stages"][WRITE][DISK]["p50_us"] > 0
        assert (own["stages"][WRITE][PEER_DISK]["p50_us"] > 1) == (protocol == "C"), "others do not wait for it"
        assert own["stages"][DURABLE_WRITE][PEER_DISK]["p50_us"] > 1
        cut(second)
        assert report(second)["stages"][APPLY][DISK]["p50_us"] > 0


def test_a_flush_of_the_mirrors_own_is_no_clients(tmp_path: Path) -> None:
    """A resync flushes what it wrote, and who makes room in the log what everybody wrote."""
    with pair(tmp_path) as (first, second):
        first.write(memoryview(bytes(4096)), 0, False)
        first._primary.flushes.run_round()
        first.write(memoryview(bytes(4096)), 0, False)
        first.flush()
        # It answers before it notes: all is noted once its threads have ended.
        cut(second)
        noted = report(second)["stages"]
        assert APPLY in noted
        assert noted[APPLY_FLUSH][TOTAL]["count"] == 1


def test_a_peer_that_does_not_say_what_its_disk_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older release does not know the flag."""
    really = Stream.send

    def send(self: Stream, kind: MessageType, flags: int = 0, *more: Any, **named: Any) -> None:
        really(self, kind, flags & ~Flag.TIMED, *more, **named)

    monkeypatch.setattr(Stream, "send", send)
    with pair(tmp_path) as (first, _):
        write_some(first)
        found = report(first)["stages"][WRITE]
        assert found[PEER_DISK]["p50_us"] < 1
        assert found[LINK]["p50_us"] > 1


def clients_requests(volume: Volume) -> list[dict[str, Any]]:
    return described(volume._replica.under_way, time.perf_counter_ns())


def seen_while_held(volume: Volume, request: Callable[[], None]) -> list[dict[str, Any]]:
    """What is under way while the own disk holds up `request`, which runs in a thread."""
    store = volume._replica.store
    held, go_on = threading.Event(), threading.Event()
    really = store.write

    def write(*arguments: Any) -> None:
        held.set()
        assert go_on.wait(PATIENCE_S)
        really(*arguments)

    store.write = write  # type: ignore[method-assign]
    thread = threading.Thread(target=request)
    thread.start()
    try:
        assert held.wait(PATIENCE_S)
        return clients_requests(volume)
    finally:
        store.write = really  # type: ignore[method-assign]
        go_on.set()
        thread.join(PATIENCE_S)


def test_what_is_under_way(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, _):
        [found] = seen_while_held(first, lambda: first.write(DATA, 8192, False))
        assert (found["kind"], found["offset"], found["length"]) == (WRITE, 8192, 4096)
        assert 0 <= found["age_s"] < PATIENCE_S
        assert clients_requests(first) == []


def test_a_write_that_waits_for_another_one(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, _):
        ticket = first._primary.lock_range(0, 4096)
        thread = threading.Thread(target=first.write, args=(DATA, 0, False))
        thread.start()
        try:
            deadline_s = time.monotonic() + PATIENCE_S
            found: list[tuple[str, str]] = []
            while found != [(WRITE, stages.RANGE)]:
                assert time.monotonic() < deadline_s, found
                found = [(one["kind"], one["waits_for"]) for one in clients_requests(first)]
        finally:
            first._primary.unlock_range(ticket)
            thread.join(PATIENCE_S)


def test_the_peer_tells_what_it_applies(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        # A cold one would be parked.
        first.write(DATA, 0, False)
        first.flush()
        store = second._replica.store
        really, seen = store.write, []

        def write(*arguments: Any) -> None:
            seen.extend(clients_requests(second))
            really(*arguments)

        store.write = write  # type: ignore[method-assign]
        first.write(DATA, 8192, False)
        assert [(one["kind"], one["offset"], one["waits_for"]) for one in seen] == [(APPLY, 8192, DISK)]
        assert clients_requests(second) == []


@pytest.mark.parametrize("request_name", ["write", "zero", "trim", "flush", "read"])
@pytest.mark.parametrize("trouble", [Gate.CLOSED, Gate.CUT, "failed"])
def test_what_is_refused_is_not_under_way(tmp_path: Path, request_name: str, trouble: Gate | str) -> None:
    with pair(tmp_path) as (first, second):
        requests: dict[str, Callable[[], None]] = {
            "write": lambda: first.write(DATA, 0, False),
            "zero": lambda: first.zero(0, 4096, True, False, False),
            "trim": lambda: first.trim(0, 4096, False),
            "flush": first.flush,
            "read": lambda: first.read_into(memoryview(bytearray(4096)), 0),
        }
        if isinstance(trouble, Gate):
            first._primary.set_gate(trouble)
        else:
            second.stop(PATIENCE_S)
            first._replica.fail(DeviceError("data", "write", errno.EIO, "it burns"))
        with pytest.raises(MirrorError):
            requests[request_name]()
        assert clients_requests(first) == []
