"""A request of a client: nbdkit's callbacks for them, one call on one of nbdkit's worker threads each.

Apart from plugin.py because this is compiled, which a script that nbdkit loads can't be.
"""

import ctypes
import errno as codes
import itertools
import logging

import nbdkit

from mirror.core.errors import ConnectionCut, MirrorError
from mirror.core.limits import EXTENTS_ANSWER_MAX
from nbd_server.cores import LOOK_EVERY, Cores
from nbd_server.thread_states import WorkerStates, this_thread
from nbd_server.volume import Volume

_FUA: int = nbdkit.FLAG_FUA
_HOLE: int = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO

_log = logging.getLogger(__name__)
_libnbdkit = ctypes.CDLL(None)


class Failed(Exception):
    """Tells nbdkit that a callback failed. Its text goes to nbdkit's log and, from `open`, to the client."""


class Connection:
    """One client connection: nbdkit hands it to every callback."""

    __slots__ = ("client", "cores", "next_request", "read_into", "states", "volume", "write")

    def __init__(self, volume: Volume, client: str, cores: Cores) -> None:
        self.volume = volume
        self.client = client
        self.cores = cores
        self.states = WorkerStates()
        # What every request needs, at hand.
        self.next_request = cores.next_request
        self.read_into = volume.read_into
        self.write = volume.write


def pread(connection: Connection, buffer: memoryview, offset: int, _flags: int) -> None:
    if not this_thread.pinned:
        connection.states.pin()
    try:
        connection.read_into(buffer, offset)
    except Exception as error:  # noqa: BLE001  the outermost call
        raise _failed("read", error) from None
    _count(connection)


def pwrite(connection: Connection, buffer: memoryview, offset: int, flags: int) -> None:
    if not this_thread.pinned:
        connection.states.pin()
    try:
        connection.write(buffer, offset, flags & _FUA != 0)
    except Exception as error:  # noqa: BLE001  the outermost call
        raise _failed("write", error) from None
    _count(connection)


def _count(connection: Connection) -> None:
    request = connection.next_request()
    if not request & (LOOK_EVERY - 1):
        connection.cores.look(request, connection.volume.running())


def flush(connection: Connection, _flags: int) -> None:
    if not this_thread.pinned:
        connection.states.pin()
    try:
        connection.volume.flush()
    except Exception as error:  # noqa: BLE001  the outermost call
        raise _failed("flush", error) from None


def trim(connection: Connection, length: int, offset: int, flags: int) -> None:
    if not this_thread.pinned:
        connection.states.pin()
    try:
        connection.volume.trim(offset, length, flags & _FUA != 0)
    except Exception as error:  # noqa: BLE001  the outermost call
        raise _failed("trim", error) from None


def zero(connection: Connection, length: int, offset: int, flags: int) -> None:
    if not this_thread.pinned:
        connection.states.pin()
    may_trim, fast = flags & nbdkit.FLAG_MAY_TRIM != 0, flags & nbdkit.FLAG_FAST_ZERO != 0
    try:
        connection.volume.zero(offset, length, may_trim, fast, flags & _FUA != 0)
    except Exception as error:  # noqa: BLE001  the outermost call
        raise _failed("zero", error, fast) from None


def extents(connection: Connection, length: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    if not this_thread.pinned:
        connection.states.pin()
    most = 1 if flags & nbdkit.FLAG_REQ_ONE else EXTENTS_ANSWER_MAX
    try:
        found = itertools.islice(connection.volume.extents(offset, length), most)
        return [(start, size, _HOLE if hole else 0) for start, size, hole in found]
    except Exception as error:  # noqa: BLE001  the outermost call
        raise _failed("block status", error) from None


def _failed(operation: str, error: Exception, fast: bool = False) -> Failed:
    """Prepare the answer to a request that failed, or its silence; the result is to be raised."""
    if isinstance(error, ConnectionCut):
        _libnbdkit.nbdkit_disconnect(1)
    if isinstance(error, MirrorError):
        # "Not supported" answers a fast zero only: for any other zero nbdkit would write zeroes itself, and does that
        # wrong above 64 MiB (plugin_zero in 1.42.3 never moves its offset on).
        unsupported = error.errno == codes.EOPNOTSUPP and not fast
        nbdkit.set_error(codes.EIO if unsupported else error.errno)
        return Failed(f"{operation} failed: {error}")
    _log.error("%s failed on a bug of ours", operation, exc_info=error)
    nbdkit.set_error(codes.EIO)
    return Failed(f"{operation} failed on a bug of ours: {error!r}")
