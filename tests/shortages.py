"""A system that is short of something for a moment, played to whoever accepts connections."""

import errno
import socket
from collections.abc import Callable

import pytest

from mirror.core.errors import OperatorError
from mirror.runtime import Runtime, Thread


def refuse_descriptors_then_a_thread(monkeypatch: pytest.MonkeyPatch, thread: str) -> None:
    """Two accepts find no descriptor; after those, the first thread of this name can't be started."""
    really_accept, really_spawn = socket.socket.accept, Runtime.spawn
    lacks = ["descriptor", "descriptor", "thread"]

    def accept(self: socket.socket) -> tuple[socket.socket, object]:
        if "descriptor" in lacks:
            lacks.remove("descriptor")
            raise OSError(errno.EMFILE, "Too many open files")
        return really_accept(self)

    def spawn(self: Runtime, name: str, function: Callable[..., None], *arguments: object) -> Thread:
        if name == thread and lacks:
            lacks.clear()
            raise OperatorError("can't start the thread", remedy="allow more")
        return really_spawn(self, name, function, *arguments)

    monkeypatch.setattr(socket.socket, "accept", accept)
    monkeypatch.setattr(Runtime, "spawn", spawn)
