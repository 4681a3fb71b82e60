"""Where NBD clients come in: the listening socket, made by nbdkit's parent and inherited by nbdkit.

A unix socket's file belongs to its owner alone (0600). What a killed server left behind is removed; a file that is no
socket, or one that somebody listens on, never is.
"""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from mirror.core.errors import OperatorError
from mirror.core.limits import UNIX_PATH_BYTES_MAX
from nbd_server.config import Endpoint, TcpEndpoint, UnixEndpoint

# Clients that connect while nbdkit is being started again wait here.
LISTEN_BACKLOG = 128


def check_socket_path(endpoint: Endpoint) -> None:
    """Raises OperatorError for a unix socket that no client could name."""
    if not isinstance(endpoint, UnixEndpoint):
        return
    length = len(os.fsencode(endpoint.path))
    if length > UNIX_PATH_BYTES_MAX:
        raise OperatorError(
            f"the path of the NBD socket has {length} bytes, and a unix socket's may have {UNIX_PATH_BYTES_MAX}: "
            f"{endpoint.path}",
            remedy="serve with --nbd unix:/a/shorter/path (or `nbd` in volume.toml), or with --nbd tcp:127.0.0.1:10809",
        )


@contextlib.contextmanager
def listen(endpoint: Endpoint) -> Iterator[socket.socket]:
    """The listening socket; a unix socket's file is removed in the end."""
    with contextlib.ExitStack() as cleanup:
        if isinstance(endpoint, UnixEndpoint):
            yield _listen_at_path(endpoint.path, cleanup)
        else:
            yield _listen_at_port(endpoint, cleanup)


def _listen_at_path(path: Path, cleanup: contextlib.ExitStack) -> socket.socket:
    _remove_leftover(path)
    listener = cleanup.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        raise OperatorError(
            f"can't make the NBD socket {path}: {error.strerror}",
            remedy="serve with --nbd unix:PATH, where PATH is in a directory that you may write to",
        ) from None
    finally:
        os.umask(mask)
    cleanup.callback(_remove_if_same, path, path.lstat())
    return listener


def _remove_leftover(path: Path) -> None:
    """A socket file that nobody listens on is what a killed server left; anything else is not ours to remove."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # nothing there, or bind will say what is wrong
    if not stat.S_ISSOCK(mode):
        raise OperatorError(
            f"{path} exists and is not a socket", remedy="remove it, or choose another path with --nbd unix:PATH"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:  # EAGAIN: a server whose queue is full
                raise OperatorError(
                    f"can't use the NBD socket {path}: {error.strerror}", remedy="choose another with --nbd unix:PATH"
                ) from None
    raise OperatorError(
        f"another server listens on the NBD socket {path}",
        remedy="stop it (ss -xlp shows it), or choose another path with --nbd unix:PATH",
    )


def _remove_if_same(path: Path, about: os.stat_result) -> None:
    with contextlib.suppress(OSError):
        now = path.lstat()
        if (now.st_dev, now.st_ino) == (about.st_dev, about.st_ino):
            path.unlink()


def _listen_at_port(endpoint: TcpEndpoint, cleanup: contextlib.ExitStack) -> socket.socket:
    host, port = endpoint.address
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = cleanup.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        remedies = {
            errno.EADDRINUSE: "stop what uses that port (ss -ltnp shows it), or choose another with --nbd",
            errno.EADDRNOTAVAIL: "choose an address of this machine (ip addr shows them)",
            errno.EACCES: "choose a port from 1024 on",
        }
        raise OperatorError(
            f"can't listen for NBD clients at {endpoint}: {error.strerror or error}",
            remedy=remedies.get(error.errno or 0, "choose another address with --nbd tcp:ADDRESS:PORT"),
        ) from None
    return listener
