"""Cutting the clients of a listening socket, and nothing else that the process has open."""

import os
import socket
from pathlib import Path

import pytest

from nbd_server.client_sockets import ClientSockets

LIMIT_S = 10.0


def listener(address: str | tuple[str, int], family: int) -> socket.socket:
    made = socket.socket(family)
    made.bind(address)
    made.listen()
    return made


def connected(listening: socket.socket, to: str | None = None) -> tuple[socket.socket, socket.socket]:
    """The client's end and the server's end."""
    address = listening.getsockname()
    client = socket.socket(listening.family)
    client.settimeout(LIMIT_S)
    client.connect((to, address[1]) if to else address)
    accepted, _ = listening.accept()
    return client, accepted


def is_cut(client: socket.socket, accepted: socket.socket) -> bool:
    """After a cut both ends read the end at once; an open connection carries a byte each way."""
    client.setblocking(False)
    try:
        if client.recv(1) == b"":
            return accepted.recv(1) == b""
    except BlockingIOError:
        client.settimeout(LIMIT_S)
        client.send(b"x")
        assert accepted.recv(1) == b"x"
    return False


@pytest.mark.parametrize(
    ("bound", "family", "to"),
    [
        ("127.0.0.1", socket.AF_INET, None),
        ("0.0.0.0", socket.AF_INET, "127.0.0.2"),
        ("::1", socket.AF_INET6, None),
        ("::", socket.AF_INET6, "::1"),
        ("::", socket.AF_INET6, "::ffff:127.0.0.1"),
        ("", socket.AF_UNIX, None),
    ],
)
def test_all_clients_are_cut_and_nothing_else(bound: str, family: int, to: str | None, tmp_path: Path) -> None:
    address = (bound, 0) if bound else str(tmp_path / "nbd.sock")
    with listener(address, family) as nbd:
        clients = ClientSockets()
        other_address = (bound, 0) if bound else str(tmp_path / "control.sock")
        with listener(other_address, family) as other:
            pairs = [connected(nbd, to) for _ in range(3)]
            strangers = [connected(other, to), socket.socketpair()]
            before = len(os.listdir("/proc/self/fd"))
            clients.cut()
            assert len(os.listdir("/proc/self/fd")) == before
            assert all(is_cut(*pair) for pair in pairs)
            assert not any(is_cut(*pair) for pair in strangers)
            later = connected(nbd, to)  # the listening socket is as it was
            assert not is_cut(*later)
            for end in (*(end for pair in (*pairs, *strangers, later) for end in pair),):
                end.close()
            clients.cut()


def test_answers_that_were_sent_before_the_cut_still_arrive(tmp_path: Path) -> None:
    with listener(str(tmp_path / "nbd.sock"), socket.AF_UNIX) as nbd:
        clients = ClientSockets()
        client, accepted = connected(nbd)
        with client, accepted:
            accepted.send(b"answer")
            clients.cut()
            assert client.recv(100) == b"answer"
            assert client.recv(100) == b""
            with pytest.raises(BrokenPipeError):
                accepted.send(b"late")
