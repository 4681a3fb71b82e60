"""Who may attach: one client at a time, on as many connections as it likes, until its last connection is drained.

This lease is anonymous and never durable: it begins with a client's first connection and ends with its last. A client
is what the caller names it (a process on a unix socket, an address on TCP). A connection counts until `leave` is
called, which nbdkit's close callback does after the last request of the connection has returned, so a new client never
overlaps a request of the former one (invariant drain-before-next). A client that comes while another holds the volume
waits a moment: clients hang up without waiting for the server, and the next is often there before the last is drained.
"""

import errno as codes

from mirror.core.errors import OperatorError
from mirror.core.limits import ATTACH_WAIT_S
from mirror.runtime import Runtime


class Refused(OperatorError):
    """Another client holds the volume."""

    default_errno = codes.EBUSY


class Lease:
    """Thread-safe. `shared` lifts the rule and leaves only the counting."""

    def __init__(self, runtime: Runtime, shared: bool = False) -> None:
        self._shared = shared
        self._changed = runtime.condition()
        self._attached: dict[str, set[object]] = {}

    def admit(self, client: str, connection: object) -> None:
        """Let `connection` of `client` in, waiting up to ATTACH_WAIT_S for another client to go; else Refused."""
        with self._changed:
            if not self._shared and not self._changed.wait_for(lambda: self._free_for(client), ATTACH_WAIT_S):
                raise Refused(f"another client is attached: {self._holders()}", remedy="detach that client first")
            self._attached.setdefault(client, set()).add(connection)

    def leave(self, client: str, connection: object) -> bool:
        """No request of `connection` runs any more. True when it was the last of all.

        Unknown connections are a bug of the caller's.
        """
        with self._changed:
            connections = self._attached[client]
            connections.remove(connection)
            if not connections:
                del self._attached[client]
                self._changed.notify_all()
            return not self._attached

    def clients(self) -> dict[str, int]:
        """The number of connections of each attached client."""
        with self._changed:
            return {client: len(connections) for client, connections in self._attached.items()}

    def _free_for(self, client: str) -> bool:
        return not self._attached or client in self._attached

    def _holders(self) -> str:
        return ", ".join(
            f"{client} with {len(connections)} connection{'s' if len(connections) != 1 else ''}"
            for client, connections in self._attached.items()
        )
