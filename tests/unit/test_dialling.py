"""Dialling a host that is silent (a cut link) takes long; what comes from there meanwhile must not wait for it, nor be
forgotten by it. And a stop waits for no peer that has fallen silent in a handshake."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror import peer
from mirror.core import backoff
from mirror.core.errors import LinkLost
from mirror.link import Listener, Stream
from mirror.runtime import Runtime
from nbd_server.volume import Volume
from tests.pair import (
    PATIENCE_S,
    create,
    cut_until_in_step,
    free_port,
    pair,
    peer_of,
    serve,
    session_of,
    stop,
    wait_ended,
    wait_until,
)

Pair = tuple[Volume, Volume]


class Dialled:
    """What comes of dialling one address, from the first attempt on."""

    def __init__(self, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.attempts = 0
        self.stream: Stream | None = None
        self.answered, self.changed = threading.Event(), threading.Condition()
        # None: that nobody is there.
        self.leads_to: tuple[str, int] | None = None
        self._address = address
        self._really = peer.dial
        monkeypatch.setattr(peer, "dial", self._dial)

    def _dial(self, address: tuple[str, int], timeout_s: float) -> Stream:
        if address != self._address:
            return self._really(address, timeout_s)
        with self.changed:
            self.attempts += 1
            self.changed.notify_all()
        self.answered.wait()
        if self.leads_to is None:
            raise LinkLost("nobody is there")
        self.stream = self._really(self.leads_to, timeout_s)
        return self.stream

    def wait_attempts(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.attempts >= count, PATIENCE_S)


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dialled]:
    silent = Dialled(("127.0.0.1", free_port()), monkeypatch)
    yield silent
    silent.answered.set()


@pytest.fixture
def replicas(tmp_path: Path, dialled: Dialled) -> Iterator[Pair]:
    """The secondary dials the other address, where nobody answers yet; the primary dials it."""
    listen_a, listen_b = free_port(), free_port()
    with pair(tmp_path, ports=(listen_a, listen_b, listen_b, dialled._address[1])) as both:
        try:
            dialled.wait_attempts(1)
            yield both
        finally:
            dialled.answered.set()


def test_a_session_ends_while_its_replica_dials(replicas: Pair, dialled: Dialled) -> None:
    """It is cleaned up at once: the next one can begin, and a stop is in order."""
    first, second = replicas
    cut_until_in_step(first, second)
    session = session_of(second)
    assert stop(first)
    wait_ended(second, session)
    assert second.stop(5.0)
    assert dialled.attempts == 1


def test_what_failed_while_it_dialled_is_not_tried_at_once(
    replicas: Pair, dialled: Dialled, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = replicas
    monkeypatch.setattr(backoff, "PLAN_RETRY_FIRST_S", 3600.0)
    monkeypatch.setattr(backoff, "PLAN_RETRY_MAX_S", 3600.0)
    monkeypatch.setattr(peer_of(first), "_may_dial", lambda: False)
    shaken: list[object] = []
    monkeypatch.setattr(peer_of(second), "_shake_hands_as_dialler", shaken.append)
    session = session_of(second)
    session.disk_trouble = True
    session.end("its disk refused something")
    wait_ended(second, session)
    dialled.leads_to = peer_of(first).settings.listen
    dialled.answered.set()
    wait_until(lambda: dialled.stream is not None and dialled.stream.fileno() < 0)
    assert not shaken
    assert dialled.attempts == 1


def test_after_a_session_it_dials_at_once(replicas: Pair, dialled: Dialled, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the peer could not be reached before."""
    first, second = replicas
    monkeypatch.setattr(peer, "REDIAL_FIRST_S", 3600.0)
    monkeypatch.setattr(peer, "REDIAL_MAX_S", 3600.0)
    dialled.answered.set()
    wait_until(lambda: peer_of(second)._redial_delay_s > 1000.0)
    monkeypatch.setattr(peer_of(first), "_may_dial", lambda: False)
    session_of(second).end("a cut, for the test")
    dialled.wait_attempts(2)


def test_a_stop_ends_a_handshake_with_a_peer_that_fell_silent(tmp_path: Path) -> None:
    port, asked = free_port(), threading.Event()
    heard: list[Stream] = []

    def hear(stream: Stream, *_: Any) -> None:
        heard.append(stream)
        asked.set()

    mute = Listener(Runtime(), ("127.0.0.1", port), hear, lambda *_: None)
    try:
        create(tmp_path / "b", free_port(), port)
        volume = serve(tmp_path / "b")
        assert asked.wait(PATIENCE_S)
        assert stop(volume)
    finally:
        mute.close()
        for stream in heard:
            stream.close()
