"""The flush of a commit that is sent behind its write: what it stands for, and what becomes of it otherwise."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror.compare import Comparer
from mirror.core.errors import DeviceError, ProtocolError
from mirror.core.limits import COMMITS_ALIKE_MIN, DATA_STREAMS, EXTENT_BYTES, SYNC_STREAMS
from mirror.core.parked import ParkedNumbers
from mirror.core.wire import MessageType
from mirror.flush import AHEAD
from mirror.link import Stream
from mirror.peer import Peer
from mirror.proof import Proof
from nbd_server.volume import Volume
from tests.pair import (
    PATIENCE_S,
    HeldOperation,
    assert_equal_copies,
    cut_until_in_step,
    pair,
    peer_of,
    session_of,
    wait_ended,
    wait_in_step,
)

DATA = memoryview(b"\x5a" * 4096)


@pytest.fixture
def committing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Volume, Volume]]:
    """Two in step, whose client flushes after each write, and nothing is compared beside it."""
    monkeypatch.setattr(Proof, "due", property(lambda _: False))
    with pair(tmp_path, size_bytes=16 * EXTENT_BYTES) as (first, second):
        for number in range(COMMITS_ALIKE_MIN):
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


def test_nor_for_what_a_resync_or_a_comparison_began_since(committing: tuple[Volume, Volume], asked: list[str]) -> None:
    first, _ = committing
    session = session_of(first)
    first.write(DATA, 4096, False)
    session.give_back_sync(session.borrow_sync())
    first.flush()
    assert asked == ["WRITE+FLUSH", "FLUSH"]


def test_none_is_sent_beside_what_is_under_way(committing: tuple[Volume, Volume], asked: list[str]) -> None:
    """That may be applied behind it: a stream is lent, to a resync or a client."""
    first, _ = committing
    session = session_of(first)
    for lend, give_back in (
        (session.borrow, session.give_back),
        (session.borrow_sync, session.give_back_sync),
    ):
        stream = lend()
        commit(first, 1)
        give_back(stream)
    assert asked == ["WRITE", "FLUSH"] * 2
    commit(first, 1)
    assert asked[4:] == ["WRITE+FLUSH"]


def test_news_of_parked_writes_go_with_a_flush_that_is_waited_for(
    committing: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that begins while a flush ahead is on its way does not wait for that one, which so must say nothing."""
    first, second = committing
    session, parked = session_of(first), peer_of(second)._parking.writes
    # The peer is told by flushes alone.
    monkeypatch.setattr(ParkedNumbers, "notice", lambda _: None)
    # Not the next one, which may have been logged ahead.
    first.write(DATA, 9 * EXTENT_BYTES, False)
    assert len(parked) == 1
    assert AHEAD.payload == b""
    stream = session.borrow()
    assert not session.only_one_lent()
    first.flush()
    assert not parked
    assert session.only_one_lent()
    number = session.parked.take()
    assert not session.only_one_lent()
    session.parked.over(number)
    assert not session.only_one_lent()
    commit(first, 1)
    assert session.only_one_lent()
    session.give_back(stream)


@pytest.mark.parametrize(("length", "fua"), [(128 * 1024, False), (4096, True)])
def test_only_behind_small_writes_that_wait_for_no_disk(
    committing: tuple[Volume, Volume], asked: list[str], length: int, fua: bool
) -> None:
    first, _ = committing
    first.write(memoryview(bytes(length)), 0, fua)
    first.flush()
    assert asked == ["WRITE", "FLUSH"]


def test_behind_the_last_write_of_a_commit(committing: tuple[Volume, Volume], asked: list[str]) -> None:
    first, _ = committing
    for _ in range(COMMITS_ALIKE_MIN + 1):
        asked.clear()
        first.write(DATA, 4096, False)
        first.write(DATA, 8192, False)
        first.flush()
    assert asked == ["WRITE", "WRITE+FLUSH"]


def test_the_write_is_answered_while_the_peer_still_flushes(
    committing: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = committing
    held = HeldOperation(second, "flush", monkeypatch)
    first.write(DATA, 4096, False)
    flushing = threading.Thread(target=first.flush)
    flushing.start()
    flushing.join(0.05)
    assert flushing.is_alive(), "the flush ended before the peer's"
    held.released.set()
    flushing.join(PATIENCE_S)
    assert not flushing.is_alive()


def test_an_answer_that_nobody_asked_for_is_no_debt(
    committing: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or after disk_timeout_s the session would end; one that does not come is one, as ever."""
    first, second = committing
    session, held = session_of(first), HeldOperation(second, "flush", monkeypatch)
    first.write(DATA, 4096, False)
    (stream,) = session._flushed_ahead
    number = -1 - session.outgoing.index(stream)
    session.check_answers()
    assert number in session._progress
    held.released.set()
    for _ in range(100):
        if stream.has_more:
            break
        session.rest(0.1)
    session.check_answers()
    assert stream.owed
    assert number not in session._progress
    # The next round takes it, whatever that covers.
    first.write(DATA, 8192, False)
    first.flush()
    assert not stream.owed
    assert free_streams(first) == DATA_STREAMS


def test_a_peer_that_answers_late_is_asked_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older release would answer the write behind the flush."""
    features = Peer._features
    with pair(tmp_path) as (first, second):
        assert session_of(first).peer_answers_first
        older = peer_of(second)
        monkeypatch.setattr(
            Peer,
            "_features",
            lambda peer: {
                name: value for name, value in features(peer).items() if peer is not older or name != "answers_first"
            },
        )
        cut_until_in_step(first, second)
        assert not session_of(first).peer_answers_first
        for number in range(COMMITS_ALIKE_MIN + 1):
            commit(first, number)
        assert not session_of(first)._flushed_ahead
        first.write(DATA, 4096, False)
        assert not session_of(first)._flushed_ahead


def test_a_comparison_keeps_no_stream_but_one_that_owes_an_answer(
    committing: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = committing
    session = session_of(first)
    comparer = Comparer(first._primary, session)
    comparer.compare(0, 4096)
    assert len(session._sync_free) == SYNC_STREAMS
    monkeypatch.setattr(comparer, "_answer", lambda *_: b"")
    with pytest.raises(ProtocolError):
        comparer.compare(0, 4096)
    assert len(session._sync_free) == SYNC_STREAMS - 1


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
    assert wait_ended(first, session) == "the peer could not flush its disk"
    assert session.disk_trouble
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
