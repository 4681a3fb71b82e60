"""A wire that takes its time: relays TCP connections, and holds up what they say in both directions."""

import contextlib
import socket
import threading

from tests.integration.processes import free_port

# What lies in the wire itself, or whoever sends would believe all of it to have arrived.
BUFFER_BYTES = 1 << 16


class SlowWire:
    """What connects to `port` reaches `target_port` of this machine; what it says arrives `delay_s` later.

    With `bytes_per_s` no connection is faster than that.
    """

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self.delay_s = 0.0
        self.bytes_per_s = 0.0
        self._target_port = target_port
        self._ends = threading.Event()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                far = socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._sockets += [near, far]
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            for one, other in ((near, far), (far, near)):
                thread = threading.Thread(target=self._relay, args=(one, other))
                self._threads.append(thread)
                thread.start()

    def _relay(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := one.recv(1 << 16):
                held_s = self.delay_s + (len(part) / self.bytes_per_s if self.bytes_per_s else 0.0)
                if held_s:
                    self._ends.wait(held_s)
                other.sendall(part)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._ends.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for end in self._sockets:
            end.close()
