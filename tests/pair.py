"""Two replicas of one volume in this process, on real files and a real loopback, without nbdkit.

For tests that must reach into a live session (a bit flipped in a queue), or that record what two replicas say.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli.create import Wish, make_replica
from mirror.core.states import ConnectionState, DiskState, Role
from mirror.peer import Peer
from mirror.runtime import Runtime
from mirror.session import Session
from nbd_server.config import Address, Config
from nbd_server.volume import StartOptions, Volume

PATIENCE_S = 20.0
SIZE_BYTES = 8 << 20


class HeldOperation:
    """A disk one of whose operations ("write", "flush") takes until it is `released`."""

    def __init__(self, volume: Volume, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.released = threading.Event(), threading.Event()
        self._carry_out = getattr(volume._replica.store, name)
        monkeypatch.setattr(volume._replica.store, name, self)

    def __call__(self, *arguments: Any) -> None:
        self.begun.set()
        assert self.released.wait(PATIENCE_S)
        self._carry_out(*arguments)


_given: set[int] = set()


def free_port() -> int:
    """One that is free now, and that this process was not given before."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in _given:
            _given.add(port)
            return port


def peer_of(volume: Volume) -> Peer:
    assert volume._peer is not None
    return volume._peer


def session_of(volume: Volume) -> Session:
    session = peer_of(volume).session
    assert session is not None
    return session


def wait_until(condition: Callable[[], Any]) -> None:
    """Look now and then: not all of it tells anybody."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it does not come")


def wait_in_step(volume: Volume) -> None:
    """Until there is a session, and both copies are known to be good."""
    peer = peer_of(volume)

    def in_step() -> bool:
        session = peer.session
        return (
            session is not None
            and not session.ended
            and peer.state is ConnectionState.CONNECTED
            and session.peer.disk is DiskState.UP_TO_DATE
            and volume._replica.superblock.disk is DiskState.UP_TO_DATE
        )

    with peer.changed:
        assert peer.changed.wait_for(in_step, PATIENCE_S), peer.reason


def wait_ended(volume: Volume, session: Session) -> str:
    """Until this session is over and cleaned up; why it ended."""
    peer = peer_of(volume)
    with peer.changed:
        assert peer.changed.wait_for(lambda: session.ended and peer.session is not session, PATIENCE_S)
    return session.reason


def cut(volume: Volume) -> None:
    """End its session; all that it did on this side is over, and noted."""
    session = session_of(volume)
    session.end("a cut, for the test")
    wait_ended(volume, session)


def cut_until_in_step(first: Volume, second: Volume) -> None:
    """End the session; the next one has its handshake, and the resync that follows from it."""
    cut(first)
    wait_in_step(first)
    wait_in_step(second)


def assert_equal_copies(first: Volume, second: Volume) -> None:
    """To the byte; of volumes of SIZE_BYTES."""
    one, other = (volume._replica.store.read(SIZE_BYTES, 0) for volume in (first, second))
    assert one == other


def create(
    directory: Path, listen: int, peer: int, protocol: Any = "C", size_bytes: int = SIZE_BYTES, **more: Any
) -> Config:
    addresses = Address("127.0.0.1", listen), Address("127.0.0.1", peer)
    config = Config("vol", protocol, *addresses, wait_for_peer_s=5.0, **more)
    make_replica(directory, config, Wish(size_bytes, keep_data=False, force=False, join=False))
    return config


def serve(directory: Path, primary: bool = False) -> Volume:
    volume = Volume.open(directory, StartOptions(primary=primary), Runtime(), lambda: None)
    volume.start()
    return volume


def stop(volume: Volume) -> bool:
    """Stop it, and wait until the last session's sockets are closed: a stop itself does not wait so long."""
    clean = volume.stop(5.0)
    for thread in (peer_of(volume)._cleaner, peer_of(volume)._dialler):
        assert thread is not None
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    return clean


@contextmanager
def pair(
    directory: Path,
    protocol: str = "C",
    ports: tuple[int, int, int, int] | None = None,
    size_bytes: int = SIZE_BYTES,
    **more: Any,
) -> Iterator[tuple[Volume, Volume]]:
    """A primary and its secondary, in step. `ports`: where each listens and where each finds the other.

    `more` of their configuration.
    """
    listen_a, listen_b = free_port(), free_port()
    ports = ports or (listen_a, listen_b, listen_b, listen_a)
    for name, listen, peer in (("a", ports[0], ports[2]), ("b", ports[1], ports[3])):
        create(directory / name, listen, peer, protocol, size_bytes, **more)
    second = serve(directory / "b")
    try:
        first = serve(directory / "a", primary=True)
        try:
            wait_in_step(first)
            wait_in_step(second)
            assert first._replica.role is Role.PRIMARY
            yield first, second
        finally:
            stop(first)
    finally:
        stop(second)
