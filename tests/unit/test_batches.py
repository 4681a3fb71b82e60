"""What many writers have to send goes together, and whoever waits learns what became of his own."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import mirror.primary
from mirror.batches import SENDERS, Awaited, Batches
from mirror.core.errors import LinkLost
from mirror.core.wire import MessageType, crc32c
from mirror.link import Request
from mirror.runtime import Runtime
from mirror.session import Session
from nbd_server.volume import Volume
from tests.pair import pair, peer_of, session_of, wait_ended, wait_in_step

BLOCK = b"\x5a" * 4096


@pytest.fixture
def volumes(tmp_path: Path) -> Iterator[tuple[Volume, Volume]]:
    with pair(tmp_path) as both:
        # Nothing else uses the streams.
        peer_of(both[0]).verifier.proof.end()
        with both[0]._primary.request_alone(0, both[0].size_bytes):
            pass
        yield both


def awaited(volume: Volume, offset: int, content: bytes = BLOCK) -> Awaited:
    request = Request(MessageType.WRITE, 0, offset, len(content), content, crc32c(content))
    return Awaited(request, volume._runtime.lock())


def batches_of(volume: Volume) -> Batches:
    batches = volume._primary.batches
    assert batches is not None
    return batches


def hold_senders(volume: Volume) -> list[object]:
    """Take all streams, so that senders wait for one with a batch in hand; the streams."""
    session = session_of(volume)
    return [session.borrow() for _ in range(len(session.outgoing))]


def test_what_gathered_goes_in_one_call_and_comes_back_in_one(
    volumes: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = volumes
    session = session_of(first)
    streams = hold_senders(first)
    # One for each sender, which it waits with; the rest gathers.
    held = [awaited(first, number * 4096) for number in range(SENDERS)]
    gathered = [awaited(first, (100 + number) * 4096) for number in range(20)]
    taken = threading.Semaphore(0)
    really_borrow = session.borrow

    def borrow() -> object:
        taken.release()
        return really_borrow()

    monkeypatch.setattr(session, "borrow", borrow)
    for one in held:
        batches_of(first).put(one)
        assert taken.acquire(timeout=10)
    for one in gathered:
        batches_of(first).put(one)
    sent: list[int] = []
    for stream in session.outgoing:
        really_send = stream.send_requests

        def send_requests(requests: list[Request], send: object = really_send) -> None:
            sent.append(len(requests))
            send(requests)  # type: ignore[operator]

        monkeypatch.setattr(stream, "send_requests", send_requests)
    for stream in streams:
        session.give_back(stream)  # type: ignore[arg-type]
    assert all(one.answer().code == 0 for one in (*held, *gathered))
    assert sorted(sent) == [1] * SENDERS + [len(gathered)]
    with open(second._directory / "data", "rb") as data:
        data.seek(100 * 4096)
        assert data.read(20 * 4096) == BLOCK * 20


def test_the_end_of_the_session_reaches_everybody_who_waits(volumes: tuple[Volume, Volume]) -> None:
    first, _ = volumes
    session = session_of(first)
    hold_senders(first)
    waiting = [awaited(first, number * 4096) for number in range(SENDERS + 5)]
    for one in waiting:
        batches_of(first).put(one)
    old = batches_of(first)
    session.end("pulled out")
    for one in waiting:
        with pytest.raises(LinkLost, match="pulled out"):
            one.answer()
    wait_ended(first, session)
    with pytest.raises(LinkLost):
        old.put(awaited(first, 0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_a_sender_lets_nobody_wait_for_ever(
    volumes: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = volumes
    session = session_of(first)

    def fail(_: object) -> None:
        raise OverflowError("a number that does not fit")

    for stream in session.outgoing:
        monkeypatch.setattr(stream, "send_requests", fail)
    waiting = awaited(first, 0)
    batches_of(first).put(waiting)
    assert waiting._done.acquire(timeout=10)
    waiting._done.release()
    with pytest.raises(LinkLost, match="does not fit"):
        waiting.answer()
    wait_ended(first, session)


def test_a_session_that_ends_while_it_is_put_in_place_is_cleaned_up(
    volumes: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = volumes
    primary = first._primary
    really_make = mirror.primary.Batches
    ended: list[Session] = []

    def make(session: Session, runtime: Runtime) -> Batches:
        # As a flush that a stop makes in this moment, when it sees the session and finds its streams broken.
        if primary.session is session and not ended:
            ended.append(session)
            session.end("lost at once")
        return really_make(session, runtime)

    first.disconnect()
    first.write(memoryview(BLOCK), 0, False)
    monkeypatch.setattr(mirror.primary, "Batches", make)
    first.connect(False)
    wait_in_step(first)


def test_a_damaged_payload_ends_the_session_and_is_written_nowhere(volumes: tuple[Volume, Volume]) -> None:
    first, second = volumes
    sessions = session_of(first), session_of(second)
    for volume in volumes:
        peer_of(volume)._wanted = False
    damaged = Awaited(Request(MessageType.WRITE, 0, 0, 4096, BLOCK, crc32c(BLOCK) ^ 1), first._runtime.lock())
    batches_of(first).put(damaged)
    with pytest.raises(LinkLost):
        damaged.answer()
    assert "damaged" in wait_ended(second, sessions[1])
    wait_ended(first, sessions[0])
    assert (second._directory / "data").read_bytes()[:4096] == bytes(4096)


def test_many_writers_at_once_all_arrive(volumes: tuple[Volume, Volume]) -> None:
    first, _ = volumes
    first._primary.crowd = 1

    def write(number: int) -> None:
        for turn in range(50):
            content = bytes([number + 1, turn]) * 2048
            first.write(memoryview(content), (number * 50 + turn) * 4096, False)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert not writer.is_alive()
    contents = [(volume._directory / "data").read_bytes() for volume in volumes]
    assert contents[0] == contents[1]
    assert contents[0][(15 * 50 + 49) * 4096 :][:2] == bytes([16, 49])
