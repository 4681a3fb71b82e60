"""A slow link is no slow disk: what is on its way for longer than `disk_timeout_s` ends no session while it moves."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mirror.core.limits import MIB
from nbd_server.volume import Volume
from tests.integration.slow_wire import SlowWire
from tests.pair import PATIENCE_S, free_port, pair, session_of, wait_ended

# So much takes three times as long as a disk is given.
MESSAGE_BYTES = 6 * MIB
DISK_TIMEOUT_S = 1.0
BYTES_PER_S = 2.0 * MIB


@contextmanager
def far_apart(directory: Path, protocol: str) -> Iterator[tuple[Volume, Volume]]:
    ports = free_port(), free_port()
    wires = [SlowWire(port) for port in ports]
    try:
        among = (*ports, wires[1].port, wires[0].port)
        with pair(directory, protocol, among, disk_timeout_s=DISK_TIMEOUT_S) as both:
            for wire in wires:
                wire.bytes_per_s = BYTES_PER_S
            yield both
    finally:
        for wire in wires:
            wire.close()


def content_of(volume: Volume, offset: int, length: int) -> bytes:
    return bytes(volume._replica.store.read(length, offset))


def test_one_large_request(tmp_path: Path) -> None:
    data = bytes(range(256)) * (MESSAGE_BYTES // 256)
    with far_apart(tmp_path, "C") as (first, second):
        session = session_of(first)
        first.write(memoryview(data), 0, False)
        assert (session.ended, session.reason) == (False, "")
        assert content_of(second, 0, len(data)) == data


def test_what_gathers_under_protocol_a(tmp_path: Path) -> None:
    """Sent in one go, and nobody looks for an answer before all of it is."""
    data = b"\xa5" * (96 * 1024)
    with far_apart(tmp_path, "A") as (first, second):
        session = session_of(first)
        count = MESSAGE_BYTES // len(data)
        for number in range(count):
            first.write(memoryview(data), number * len(data), False)
        first.flush()
        assert (session.ended, session.reason) == (False, "")
        assert content_of(second, 0, count * len(data)) == data * count


def test_a_disk_that_takes_all_and_answers_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with far_apart(tmp_path, "C") as (first, second):
        session, answers = session_of(first), threading.Event()
        really = second._replica.store.write

        def write(data: memoryview, offset: int, *how: bool) -> None:
            assert answers.wait(PATIENCE_S)
            really(data, offset, *how)

        monkeypatch.setattr(second._replica.store, "write", write)
        first.write(memoryview(bytes(MIB)), 0, False)
        answers.set()
        assert "disk_timeout_s" in wait_ended(first, session)
