"""The control socket: commands to a live server and its status, one JSON line each way over DIR/control.sock (0600).

Request: {"command": "promote", "force": false}; reply: {"ok": true, "result": {...}} or
{"ok": false, "error": {"message": "...", "remedy": "..."}}. A connection may carry several requests, one after another.

Both ends reach the socket through a descriptor of the directory (/proc/self/fd/N/control.sock), so that a directory
whose path is too long for a unix socket can still be controlled. HTTP and gRPC lost: nothing here needs a library, and
a person can speak this with socat.
"""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mirror.core.errors import MirrorError, OperatorError
from mirror.core.limits import ACCEPT_PAUSE_S
from mirror.runtime import Runtime, Thread
from nbd_server import hold

FILE_NAME = "control.sock"

# A request is a command and two or three words; a reply (a status, a dump of threads) some tens of KiB at most.
REQUEST_BYTES_MAX = 64 * 1024
REPLY_BYTES_MAX = 4 * 1024 * 1024
# Commands that may wait at a time, such as a switch while others ask for the status; more get a refusal.
CONNECTIONS_MAX = 32
# Whoever connects and says nothing makes room again after this time.
IDLE_S = 30.0
# What `stop` gives commands that are under way.
STOP_S = 1.0
# A server that is starting (or being started again) answers after a moment: how often a client looks.
RETRY_S = 0.05

log = logging.getLogger(__name__)

Handler = Callable[[dict[str, Any]], dict[str, Any]]


class NotServing(OperatorError):
    """Nothing serves this replica."""


class ServerSilent(OperatorError):
    """Something serves this replica but gave no answer in time."""


class CommandRefused(OperatorError):
    """The server answered, and the answer is no."""


class ControlServer:
    """Answers at DIR/control.sock. `handler` gets each request and returns the result, or raises a MirrorError.

    It runs in a thread of the connection it came by, so a command that takes its time holds up no other.
    """

    def __init__(self, path: Path, handler: Handler, runtime: Runtime) -> None:
        self._path = path
        self._handler = handler
        self._runtime = runtime
        self._socket: socket.socket | None = None
        self._thread: Thread | None = None
        self._changed = runtime.condition()
        self._connections: set[socket.socket] = set()
        self._stopped = False

    def start(self) -> None:
        """Listen. A socket file that is there is a leftover: the caller holds the directory's lock."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _short_path(self._path) as address:
                server.bind(address)
                os.chmod(address, 0o600)
            server.listen(CONNECTIONS_MAX)
        except OSError as error:
            server.close()
            raise OperatorError(
                f"can't listen for commands at {self._path}: {error.strerror or error}",
                remedy="make the directory writable; a filesystem without unix sockets can't hold a replica",
            ) from error
        self._socket = server
        self._thread = self._runtime.spawn("control", self._accept, server)

    def stop(self) -> None:
        """Take no more commands; those under way may still answer for a moment. Removes the socket file."""
        if self._socket is None:
            return
        self._path.unlink(missing_ok=True)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(STOP_S)
        self._socket.close()
        self._socket = None
        with self._changed:
            for connection in self._connections:
                # Those that wait for a request see its end; those that work on one can still send the reply.
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)
            self._changed.wait_for(lambda: not self._connections, STOP_S)

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                with self._changed:
                    # Who waits in the queue would be refused again at once.
                    if self._changed.wait_for(lambda: self._stopped, ACCEPT_PAUSE_S):
                        return
                continue
            try:
                self._take(connection)
            except OperatorError as error:
                with connection, contextlib.suppress(OSError):
                    connection.setblocking(False)
                    connection.send(_line(_error(error.message, error.remedy)))

    def _take(self, connection: socket.socket) -> None:
        """Serve it in a thread of its own. Raises OperatorError."""
        with self._changed:
            if len(self._connections) >= CONNECTIONS_MAX:
                raise OperatorError("too many commands are waiting", remedy="try again in a moment")
            self._runtime.spawn("control-command", self._serve, connection)
            self._connections.add(connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(IDLE_S)
            with connection.makefile("rb") as requests:
                while line := requests.readline(REQUEST_BYTES_MAX + 1):
                    connection.sendall(_line(self._answer(line)))
                    if not line.endswith(b"\n"):
                        return  # too long, or cut: what follows can't be told apart from it
        except OSError:
            pass  # the client has gone; what it asked for was done
        finally:
            with self._changed:
                self._connections.discard(connection)
                self._changed.notify_all()
            connection.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict) or not isinstance(request.get("command"), str):
            return _error("this is not a request", 'send one line like {"command": "status"}')
        try:
            return {"ok": True, "result": self._handler(request)}
        except MirrorError as error:
            return _error(error.message, error.remedy)
        except Exception as error:  # the outermost loop of a command: the server must live on
            log.exception("the command %s failed", request["command"])
            return _error(f"the server failed: {error!r}", "see its log")


def request(directory: Path, command: str, timeout_s: float, **arguments: object) -> dict[str, Any]:
    """Send one command to the server of DIR and return its result.

    Raises NotServing, ServerSilent (no answer within `timeout_s`) or CommandRefused.
    """
    runtime = Runtime()
    deadline = runtime.now_s() + timeout_s
    with _connected(directory, deadline, timeout_s, runtime) as connection:
        try:
            connection.settimeout(max(deadline - runtime.now_s(), RETRY_S))
            with contextlib.suppress(BrokenPipeError):  # refused unread; the reply says why
                connection.sendall(_line({"command": command, **arguments}))
            answer = _receive_line(connection, deadline, runtime)
        except TimeoutError:
            raise _silent(directory, command, timeout_s) from None
        except OSError:
            answer = b""
    if not answer.endswith(b"\n"):
        raise ServerSilent(
            f"the server of {directory} ended while it worked on '{command}'",
            remedy=f"look at its log and at: nbdmirror status {directory}",
        )
    try:
        reply = json.loads(answer)
        if not reply.get("ok"):
            error = reply.get("error", {})
            raise CommandRefused(str(error.get("message", "the server refused")), remedy=str(error.get("remedy", "")))
        result = reply["result"]
        if not isinstance(result, dict):
            raise TypeError("a result is an object")
        return result
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ServerSilent(
            f"what listens at {directory / FILE_NAME} gave no answer that can be read to '{command}'",
            remedy="run the release of nbdmirror that serves it",
        ) from error


@contextlib.contextmanager
def _connected(directory: Path, deadline: float, timeout_s: float, runtime: Runtime) -> Iterator[socket.socket]:
    """A connection to the control socket; waits while a server is starting. Raises NotServing or ServerSilent."""
    pause = runtime.condition()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        while True:
            try:
                connection.settimeout(max(deadline - runtime.now_s(), RETRY_S))
                with _short_path(directory / FILE_NAME) as address:
                    connection.connect(address)
                break
            except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
                if hold.holder(directory) is None:
                    raise _not_serving(directory) from None
            except BlockingIOError:
                pass  # its queue of connections is full
            except TimeoutError:
                raise _silent(directory, "connect", timeout_s) from None
            except OSError as error:
                raise OperatorError(
                    f"can't reach the server of {directory}: {error.strerror}",
                    remedy="run this as the user that runs the server",
                ) from None
            if runtime.now_s() > deadline:
                raise _silent(directory, "connect", timeout_s)
            with pause:
                pause.wait(RETRY_S)
        yield connection


def _receive_line(connection: socket.socket, deadline: float, runtime: Runtime) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n") and len(received) < REPLY_BYTES_MAX:
        connection.settimeout(max(deadline - runtime.now_s(), RETRY_S))
        part = connection.recv(64 * 1024)
        if not part:
            break
        received += part
    return bytes(received)


def _not_serving(directory: Path) -> OperatorError:
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        return NotServing(f"{directory} {what}", remedy="give the directory of a replica")
    return NotServing(f"nothing serves {directory}", remedy=f"start it: nbdmirror serve {directory}")


def _silent(directory: Path, command: str, timeout_s: float) -> ServerSilent:
    pid = hold.holder(directory)
    who = f"the server of {directory}" + (f" (process {pid})" if pid else "")
    what = "does not take commands" if command == "connect" else f"gave no answer to '{command}'"
    return ServerSilent(
        f"{who} {what} within {timeout_s:g} s",
        remedy="it may be starting, stopped (SIGSTOP) or waiting for a disk: look at its log, and try again",
    )


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """The same file by a path that always fits into a socket address."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _error(message: str, remedy: str) -> dict[str, Any]:
    return {"ok": False, "error": {"message": message, "remedy": remedy}}
