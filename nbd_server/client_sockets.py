"""The sockets of nbdkit's clients, so that all of them can be cut when this replica stops being primary.

nbdkit tells nobody which descriptor a connection has, and closes it before it calls the plugin's close, when the number
may already belong to another. So nothing is remembered: a cut looks at all sockets of the process and knows a client's
by the local address, which is the one that nbdkit listens on. Each is examined and shut down through a duplicate, whose
number nobody can reuse meanwhile. Connections that are still in their handshake are cut with the others.

`nbdkit_disconnect` alone lost: it works only inside a request of the connection that it cuts, and an idle connection
never comes by.
"""

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator

_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_ANY_ADDRESS = ("0.0.0.0", "::")


class ClientSockets:
    """Make it after nbdkit has bound its sockets and before anything else in the process listens."""

    def __init__(self) -> None:
        self._addresses = [
            (listening.family, listening.getsockname()) for listening in _sockets() if _is_listening(listening)
        ]

    def cut(self) -> None:
        """Shut every client connection down, both ways. Requests that nbdkit has read already are still carried out,
        but their answers go nowhere. Never blocks; any thread may call it."""
        for candidate in _sockets():
            with contextlib.suppress(OSError):  # the client hung up first
                if self._is_client(candidate):
                    candidate.shutdown(socket.SHUT_RDWR)

    def _is_client(self, candidate: socket.socket) -> bool:
        if _is_listening(candidate):
            return False
        own = candidate.getsockname()
        for family, bound in self._addresses:
            if candidate.family != family:
                continue
            if own == bound or (family != socket.AF_UNIX and own[1] == bound[1] and bound[0] in _ANY_ADDRESS):
                return True
        return False


def _is_listening(candidate: socket.socket) -> bool:
    return bool(candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _sockets() -> Iterator[socket.socket]:
    """A duplicate of every socket of this process, each closed when the next one is asked for."""
    for number in os.listdir("/proc/self/fd"):
        try:
            # Only sockets are duplicated: closing a descriptor of a file drops the process's POSIX locks on that file.
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{number}").st_mode):
                continue
            duplicate = fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError:  # closed meanwhile
            continue
        try:
            found = socket.socket(fileno=duplicate)
        except OSError:  # the number was reused for something else meanwhile
            os.close(duplicate)
            continue
        with found:
            if found.family in _FAMILIES:
                yield found
