"""The flush of a commit that is sent behind its write: what it stands for, and what becomes of it otherwise."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror.core.errors import DeviceError
from mirror.core.limits import COMMITS_MIN, DATA_STREAMS
from mirror.core.wire import MessageType
from mirror.link import Stream
from nbd_server.volume import Volume
from tests.pair import assert_equal_copies, pair, peer_of, session_of, wait_ended, wait_in_step

DATA = memoryview(b"\x5a" * 4096)
PATIENCE_S = 20.0


@pytest.fixture
def committing(tmp_path: Path) -> Iterator[tuple[Volume, Volume]]:
    """Two in step, whose client flushes after each write, and nothing is compared beside it."""
    with pair(tmp_path) as (first, second):
        peer_of(first).verifier.proof.end()
        with first._primary.request_alone(0, first.size_bytes):
            pass
        for number in range(COMMITS_MIN):
            commit(first, number)
        yield first, second


def commit(volume: Volume, number: int) -> None:
    volume.write(DATA, number * 4096, False)
    volume.flush()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the peer from now on, a system call each."""
    calls: list[str] = []
    send, send_requests = Stream.send, Stream.send_requests
    asks = (MessageType.WRITE, MessageType.FLUSH)

    def sent(stream: Stream, kind: MessageType, *rest: Any, **more: Any) -> None:
        if kind in asks:
            calls.append(kind.name)
        send(stream, kind, *rest, **more)

    def sent_together(stream: Stream, requests: Any) -> None:
        calls.append("+".join(request.kind.name for request in requests))
        send_requests(stream, requests)

    monkeypatch.setattr(Stream, "send", sent)
    monkeypatch.setattr(Stream, "send_requests", sent_together)
    return calls


def free_streams(volume: Volume) -> int:
    return len(session_of(volume)._free)


def test_a_commit_asks_the_peer_once(committing: tuple[Volume, Volume], asked: list[str]) -> None:
    first, second = committing
    flushes = count_flushes(second)
    commit(first, 1)
    commit(first, 2)
    assert asked == ["WRITE+FLUSH"] * 2
    assert len(flushes) == 2
    assert free_streams(first) == DATA_STREAMS


def count_flushes(volume: Volume) -> list[bytes]:
    """What the volume's copy holds at its beginning when each flush begins, from now on."""
    store, found = volume._replica.store, []
    flush = store.flush

    def counted() -> None:
        found.append(store.read(64 * 1024, 0))
        flush()

    store.flush = counted  # type: ignore[method-assign]
    return found


def test_it_does_not_stand_for_what_was_written_since(committing: tuple[Volume, Volume], asked: list[str]) -> None:
    first, second = committing
    flushed = count_flushes(second)
    first.write(DATA, 4096, False)
    first.write(DATA, 8 * 4096, False)
    first.flush()
    assert asked == ["WRITE+FLUSH", "WRITE", "FLUSH"]
    assert flushed[-1][8 * 4096 : 9 * 4096] == DATA
    assert free_streams(first) == DATA_STREAMS


def test_nor_for_what_was_under_way_when_it_was_sent(committing: tuple[Volume, Volume], asked: list[str]) -> None:
    """It may be applied behind it: a stream lent, to a resync or a client, or a parked write that is still open."""
    first, _ = committing
    session = session_of(first)
    for lend, give_back in (
        (session.borrow, session.give_back),
        (session.borrow_sync, session.give_back_sync),
    ):
        stream = lend()
        commit(first, 1)
        give_back(stream)
    number = session.parked.take()
    commit(first, 1)
    session.parked.over(number)
    assert asked == ["WRITE", "FLUSH"] * 3
    commit(first, 1)
    assert asked[6:] == ["WRITE+FLUSH"]


def test_the_write_is_answered_while_the_peer_still_flushes(committing: tuple[Volume, Volume]) -> None:
    first, second = committing
    store, may_end = second._replica.store, threading.Event()
    flush = store.flush

    def slow() -> None:
        assert may_end.wait(PATIENCE_S)
        flush()

    store.flush = slow  # type: ignore[method-assign]
    first.write(DATA, 4096, False)
    flushing = threading.Thread(target=first.flush)
    flushing.start()
    flushing.join(0.05)
    assert flushing.is_alive(), "the flush ended before the peer's"
    may_end.set()
    flushing.join(PATIENCE_S)
    assert not flushing.is_alive()


def test_an_answer_that_nobody_asked_for_is_taken(committing: tuple[Volume, Volume]) -> None:
    """Or the peer would seem to owe it, and after disk_timeout_s the session would end."""
    first, _ = committing
    session = session_of(first)
    first.write(DATA, 4096, False)
    assert free_streams(first) == DATA_STREAMS - 1
    for _ in range(100):
        if free_streams(first) == DATA_STREAMS:
            break
        session.rest(0.1)
    assert free_streams(first) == DATA_STREAMS
    assert not any(stream.owed for stream in session.outgoing)
    assert not session.ended


def test_a_peer_that_answers_late_is_asked_as_ever(committing: tuple[Volume, Volume], asked: list[str]) -> None:
    """An older release would answer the write behind the flush."""
    first, _ = committing
    session_of(first).peer_answers_first = False
    commit(first, 1)
    assert asked == ["WRITE", "FLUSH"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("flushes", [True, False])
def test_a_peer_whose_disk_refuses_it_drops_out(committing: tuple[Volume, Volume], flushes: bool) -> None:
    """The write is answered by then; the client's flush, if there is one, is by this side alone."""
    first, second = committing
    session = session_of(first)

    def refuse() -> None:
        raise DeviceError("data", "flush", 5, "Input/output error")

    second._replica.store.flush = refuse  # type: ignore[method-assign]
    first.write(DATA, 4096, False)
    if flushes:
        first.flush()
    wait_ended(first, session)
    assert first._replica.dirty.is_dirty(4096, 4096)
    first.flush()


def test_a_session_that_ends_between_the_two(committing: tuple[Volume, Volume]) -> None:
    first, second = committing
    session = session_of(first)
    first.write(DATA, 4096, False)
    session.end("a cut, for the test")
    first.flush()
    wait_ended(first, session)
    wait_in_step(first)
    wait_in_step(second)
    assert_equal_copies(first, second)
