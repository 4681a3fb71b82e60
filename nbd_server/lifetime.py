"""One volume in one nbdkit process, from nbdkit's fork to the end of the process; knows nothing of nbdkit itself.

The volume opens and starts in a thread of its own, so that nbdkit accepts clients meanwhile; they wait until the role
is decided. The parent (serve.py) learns of `role`, `ready`, `refused` and `stopped` and sends `stop`, one JSON object
a line over a socket pair. When the parent is gone, the volume is stopped in order all the same. The process always ends
by os._exit: nbdkit would finalize a Python whose threads still run, and would first wait for requests that only the end
releases.
"""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mirror.core.errors import MirrorError, OperatorError
from mirror.core.limits import START_WAIT_S
from mirror.core.states import Role
from mirror.runtime import Runtime
from nbd_server.volume import StartOptions, Volume

PARENT_DESCRIPTOR = "NBDMIRROR_PARENT_FD"
# Whoever stops the parent gives it 5 s. A new parent waits for the nbdkit of a dead one for 3 s (hold.py).
STOP_TIMEOUT_S = 4.0
ORPHAN_STOP_TIMEOUT_S = 1.5
# A disk that no longer answers holds up the volume's own time limit; after this the process ends without it.
STOP_GRACE_S = 0.5

_log = logging.getLogger(__name__)


class Parent:
    """The socket pair to serve.py."""

    def __init__(self, channel: socket.socket, runtime: Runtime) -> None:
        self._channel = channel
        self._lock = runtime.lock()

    def send(self, **message: object) -> None:
        with self._lock, contextlib.suppress(OSError):  # a parent that is gone is noticed by its end of file
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the parent sends, until it is gone."""
        with contextlib.suppress(OSError), self._channel.makefile("rb") as lines:
            for line in lines:
                yield json.loads(line)


class Lifetime:
    """Thread-safe."""

    def __init__(self) -> None:
        self._runtime = Runtime()
        self._changed = self._runtime.condition()
        self._parent: Parent | None = None
        self._volume: Volume | None = None
        self._decided = False
        self._ending = False
        self._stopped_clean: bool | None = None

    def begin(
        self,
        directory: Path,
        options: StartOptions,
        cut_connections: Callable[[], None],
        wait_for_quit: Callable[[], None],
        name_known: Callable[[str], None],
    ) -> None:
        """Start everything that may not exist before nbdkit's fork.

        wait_for_quit: returns when nbdkit itself was told to end; name_known: is told the volume's name.
        """
        descriptor = os.environ.pop(PARENT_DESCRIPTOR, "")
        if descriptor:
            os.set_inheritable(int(descriptor), False)
            self._parent = Parent(socket.socket(fileno=int(descriptor)), self._runtime)
            self._runtime.spawn("parent", self._obey, self._parent)
        self._runtime.spawn("quit", self._stop_after, wait_for_quit)
        self._runtime.spawn("start", self._start, directory, options, cut_connections, name_known)

    def volume(self) -> Volume:
        """The volume, its role decided; OperatorError when that takes too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._decided or self._ending, START_WAIT_S):
                raise OperatorError("the volume is still starting", remedy="try again")
            if self._ending or self._volume is None:
                raise OperatorError("the volume is being stopped")
            return self._volume

    def name(self) -> str:
        """The volume's name; empty when it can't be read."""
        with self._changed:
            self._changed.wait_for(lambda: self._volume or self._ending, START_WAIT_S)
            return self._volume.name if self._volume else ""

    def stop(self, why: str, timeout_s: float) -> NoReturn:
        """Stop the volume, tell the parent, end the process. Whoever comes second waits for that end."""
        with self._changed:
            while self._ending:
                self._changed.wait()
            self._ending = True
            self._changed.notify_all()
        _log.info("stopping: %s", why)
        self._runtime.spawn("stop", self._stop_volume, timeout_s)
        with self._changed:
            self._changed.wait_for(lambda: self._stopped_clean is not None, timeout_s + STOP_GRACE_S)
        self._say(event="stopped", clean=bool(self._stopped_clean))
        os._exit(0)

    def _start(
        self,
        directory: Path,
        options: StartOptions,
        cut_connections: Callable[[], None],
        name_known: Callable[[str], None],
    ) -> None:
        try:
            volume = Volume.open(directory, options, self._runtime, cut_connections, self._tell_role)
            name_known(volume.name)
            with self._changed:
                self._volume = volume
                self._changed.notify_all()
            volume.start()
            role = volume.status()["role"]
        except MirrorError as error:
            self._refuse(error.message, error.remedy)
            return
        except Exception as error:  # noqa: BLE001  the outermost call of this thread
            _log.critical("the start failed on a bug of ours", exc_info=error)
            self._refuse(f"the start failed on a bug of ours: {error!r}", "report it with the log")
            return
        with self._changed:
            if self._ending:
                return
            self._decided = True
            self._changed.notify_all()
        self._say(event="ready", role=role)

    def _tell_role(self, role: Role) -> None:
        self._say(event="role", role=role.value)

    def _refuse(self, message: str, remedy: str) -> None:
        with self._changed:
            if self._ending:  # a stop cut the start short, and tells the parent itself
                return
            self._ending = True
        self._say(event="refused", message=message, remedy=remedy)
        os._exit(1)

    def _stop_volume(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._volume, timeout_s)
            volume = self._volume
        try:
            clean = volume is not None and volume.stop(timeout_s)
        except Exception:  # noqa: BLE001  the outermost call of this thread
            _log.exception("the stop failed")
            clean = False
        with self._changed:
            self._stopped_clean = clean
            self._changed.notify_all()

    def _obey(self, parent: Parent) -> None:
        for message in parent.messages():
            assert message["command"] == "stop", message
            self.stop("the parent asks for it", float(message["timeout_s"]))
        self.stop("the parent process is gone", ORPHAN_STOP_TIMEOUT_S)

    def _stop_after(self, wait_for_quit: Callable[[], None]) -> None:
        wait_for_quit()
        self.stop("nbdkit was told to end", STOP_TIMEOUT_S)

    def _say(self, **message: object) -> None:
        if self._parent is not None:
            self._parent.send(**message)
