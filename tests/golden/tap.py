"""A TCP relay between two replicas that keeps what was said, connection by connection and direction by direction."""

import contextlib
import socket
import threading

PIECE_BYTES = 64 * 1024


class Connection:
    """What went through one connection: from the side that dialled, and back to it."""

    def __init__(self) -> None:
        self.there = bytearray()
        self.back = bytearray()


class Tap:
    """Listens at `port` and passes everything on to `target_port`; keeps connections in the order of their coming."""

    def __init__(self, target_port: int) -> None:
        self.connections: list[Connection] = []
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target_port))
            except OSError:
                near.close()
                continue
            kept = Connection()
            self.connections.append(kept)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [near, far]
            for source, target, into in ((near, far, kept.there), (far, near, kept.back)):
                thread = threading.Thread(target=_relay, args=(source, target, into))
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        """Both replicas have hung up, or are hung up on now."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()


def _relay(source: socket.socket, target: socket.socket, into: bytearray) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(PIECE_BYTES):
            into += piece
            target.sendall(piece)
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
