"""Protocol B: a disk of the peer's that is quick costs one message, and one that stalls costs no client its stall."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror import confirmer
from mirror.core.errors import OperatorError
from mirror.core.wire import MessageType
from mirror.link import Stream
from mirror.proof import Proof
from mirror.runtime import Runtime
from nbd_server.volume import Volume
from tests.pair import PATIENCE_S, HeldOperation, assert_equal_copies, pair, session_of

DATA = memoryview(b"\x5a" * 4096)


@pytest.fixture
def mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Volume, Volume]]:
    # Nothing is compared beside it, which would wait for the disk with its range locked.
    monkeypatch.setattr(Proof, "due", property(lambda _: False))
    with pair(tmp_path, "B") as (first, second):
        # A cold one would be parked, and nothing parked is left.
        first.write(DATA, 0, False)
        first.flush()
        yield first, second


@pytest.fixture
def told(mirrored: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch) -> list[MessageType]:
    """What the peer says to writes, from now on."""
    said: list[MessageType] = []
    incoming = session_of(mirrored[1]).incoming
    send = Stream.send

    def noted(stream: Stream, kind: MessageType, *rest: Any, **more: Any) -> None:
        if stream in incoming:
            said.append(kind)
        send(stream, kind, *rest, **more)

    monkeypatch.setattr(Stream, "send", noted)
    return said


def test_a_quick_disk_answers_once(
    mirrored: tuple[Volume, Volume], told: list[MessageType], monkeypatch: pytest.MonkeyPatch
) -> None:
    # However busy the machine is.
    monkeypatch.setattr(confirmer, "LOOK_S", PATIENCE_S)
    for number in range(10):
        mirrored[0].write(DATA, number * 4096, False)
    assert told == [MessageType.ANSWER] * 10


@pytest.mark.parametrize("asleep", [False, True])
def test_a_stall_is_not_the_clients(
    mirrored: tuple[Volume, Volume], told: list[MessageType], monkeypatch: pytest.MonkeyPatch, asleep: bool
) -> None:
    first, second = mirrored
    if asleep:
        monkeypatch.setattr(confirmer, "IDLE_LOOKS", 0)
        first.write(DATA, 0, False)
        told.clear()
    stall = HeldOperation(second, "write", monkeypatch)
    first.write(DATA, 4096, False)
    assert told == [MessageType.RECEIVED]
    # Not applied, so what overlaps it and a flush wait.
    flushing = threading.Thread(target=first.flush)
    flushing.start()
    flushing.join(0.05)
    assert flushing.is_alive()
    stall.released.set()
    flushing.join(PATIENCE_S)
    assert told == [MessageType.RECEIVED, MessageType.ANSWER, MessageType.ANSWER]
    # Whoever stalled may do so again.
    first.write(DATA, 8192, False)
    first.flush()
    assert told[3:] == [MessageType.RECEIVED, MessageType.ANSWER, MessageType.ANSWER]
    assert_equal_copies(first, second)


def test_a_large_write_is_confirmed_before_it_is_carried_out(
    mirrored: tuple[Volume, Volume], told: list[MessageType]
) -> None:
    first, _ = mirrored
    first.write(memoryview(bytes(1 << 20)), 0, False)
    first.flush()
    assert told == [MessageType.RECEIVED, MessageType.ANSWER, MessageType.ANSWER]


class Said:
    """A stream that only notes what is sent on it."""

    def __init__(self) -> None:
        self.kinds: list[MessageType] = []

    def send(self, kind: MessageType) -> None:
        self.kinds.append(kind)


def test_nothing_is_said_of_a_write_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind its answer the word would end the session."""
    monkeypatch.setattr(confirmer, "LOOK_S", 0.001)
    looking = confirmer.Confirmer(Runtime(), "looks")
    ended, pending = Said(), Said()
    looking.begin(ended, 4096)  # type: ignore[arg-type]
    looking.end(ended)  # type: ignore[arg-type]
    looking.begin(pending, 4096)  # type: ignore[arg-type]
    for _ in range(10_000):
        if pending.kinds:
            break
        threading.Event().wait(0.001)
    looking.end(ended)  # type: ignore[arg-type]
    assert pending.kinds == [MessageType.RECEIVED]
    assert not ended.kinds
    looking.close()
    looking.join()


def test_without_a_thread_each_is_confirmed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, stream = Runtime(), Said()

    def refuse(*_: Any) -> None:
        raise OperatorError("no thread")

    monkeypatch.setattr(runtime, "spawn", refuse)
    looking = confirmer.Confirmer(runtime, "looks")
    for _ in range(2):
        looking.begin(stream, 4096)  # type: ignore[arg-type]
        looking.end(stream)  # type: ignore[arg-type]
    assert stream.kinds == [MessageType.RECEIVED] * 2
    looking.close()
    looking.join()
