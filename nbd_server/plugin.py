"""nbdkit's callbacks, translated into volume calls: with requests.py the only file that knows nbdkit.

nbdkit runs this file as a script inside its own process: it hands over the parameters, binds its socket, forks if it
wants to and calls `after_fork`, which lets the volume begin. A request is one call on one of nbdkit's worker threads,
from the callback through the volume to the answer; its buffer belongs to nbdkit and is valid until the callback
returns.

Those of nbdkit's functions that may block are called through ctypes, which lets other threads run meanwhile. nbdkit's
own Python module calls them with the interpreter locked, and `disconnect` waits for an answer that a slow client has
yet to read: one such client would stop the process.
"""

import ctypes
import faulthandler
import ipaddress
import itertools
import logging
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import nbdkit

from mirror.core.errors import MirrorError, OperatorError
from mirror.core.limits import ADVERTISED_REQUEST_BYTES_MAX, BLOCK_BYTES
from mirror.runtime import Runtime
from nbd_server import requests
from nbd_server.client_sockets import ClientSockets
from nbd_server.cores import Cores
from nbd_server.lifetime import STOP_TIMEOUT_S, Lifetime
from nbd_server.requests import Connection, Failed
from nbd_server.slowness import PROCESSOR
from nbd_server.thread_states import start_reaper
from nbd_server.volume import StartOptions, Volume

API_VERSION = 2

_SWITCHES = ("primary", "insecure", "shared", "memory_kept", "resume")
_LONG_SLEEP_S = 1 << 30

_log = logging.getLogger("nbd_server.plugin")
_libnbdkit = ctypes.CDLL(None)
_parameters: dict[str, str] = {}
_lifetime = Lifetime()
_unnamed = itertools.count(1)
_cores: Cores | None = None


_format_exception = traceback.format_exception


def _format_failure(*arguments: Any, **options: Any) -> list[str]:
    # nbdkit prints what this function of `traceback` returns, and sends it to the client whose open failed: for a
    # failure that is told on purpose that must be the reason in one line and not a stack.
    if len(arguments) > 1 and isinstance(arguments[1], Failed):
        return [str(arguments[1])]
    return _format_exception(*arguments, **options)


traceback.format_exception = _format_failure


# -- the life of nbdkit ------------------------------------------------------------------------------------------------


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    if key != "dir" and (key not in _SWITCHES or value not in ("0", "1")):
        raise Failed(f"unknown parameter {key}={value}")
    _parameters[key] = value


def config_complete() -> None:
    if "dir" not in _parameters:
        raise Failed("the parameter dir= is missing")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    _log_as(Path(_parameters["dir"]).name)
    # Asking for a thread's name would register nbdkit's threads with Python's, for good.
    logging.logThreads = False


def after_fork() -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    runtime = Runtime()
    start_reaper(runtime)
    PROCESSOR.start(runtime)
    options = StartOptions(**{name: _parameters.get(name) == "1" for name in _SWITCHES})
    _lifetime.begin(Path(_parameters["dir"]), options, ClientSockets().cut, _wait_for_quit, _log_as)


def cleanup() -> None:
    _lifetime.stop("nbdkit was told to end", STOP_TIMEOUT_S)


def _log_as(name: str) -> None:
    """Time, level and the volume's name before every line."""
    formatter = logging.Formatter(f"%(asctime)s %(levelname)s {name.replace('%', '%%')}: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)


def _wait_for_quit() -> None:
    # Sleeping in nbdkit fails only when nbdkit was told to end. Its `cleanup` would be too late: it comes after the
    # last request, and a request may be waiting for just the stop that follows from here.
    while _libnbdkit.nbdkit_nanosleep(_LONG_SLEEP_S, 0) == 0:
        pass


# -- exports -----------------------------------------------------------------------------------------------------------


def list_exports(_readonly: bool, _is_tls: bool) -> list[tuple[str, str]]:
    return [(_lifetime.name(), "nbdmirror volume")]


def default_export(_readonly: bool, _is_tls: bool) -> str:
    return _lifetime.name()


# -- connections -------------------------------------------------------------------------------------------------------


def open(_readonly: bool) -> Connection:  # noqa: A001  nbdkit's name
    client = "a client"
    try:
        client = _client()
        volume = _lifetime.volume()
        export = nbdkit.export_name()
        if export not in ("", volume.name):
            raise OperatorError(f"there is no export {export!r}, only {volume.name!r}")
        connection = Connection(volume, client, _cores_of(volume))
        volume.admit(client, connection)
    except MirrorError as error:
        _log.warning("refused %s: %s", client, error)
        raise Failed(str(error)) from None
    except Exception as error:  # noqa: BLE001  the outermost call
        _log.exception("refused %s on a bug of ours", client)
        raise Failed(f"internal error: {error!r}") from None
    return connection


def _cores_of(volume: Volume) -> Cores:
    global _cores  # noqa: PLW0603  a process has one volume
    if _cores is None:
        _cores = Cores(volume.cores, volume.crowded)
    return _cores


def close(connection: Connection) -> None:
    # nbdkit has joined the worker threads of this connection: none of its requests runs any more.
    try:
        # So, too, when the replica stops being primary: it cuts the connections of its clients.
        if connection.volume.leave(connection.client, connection):
            connection.cores.let_go()
    finally:
        connection.states.free()


def _client() -> str:
    """Who is at the other end: its process on a unix socket, its address on TCP."""
    address = ctypes.create_string_buffer(128)
    length = ctypes.c_uint32(len(address))
    if _libnbdkit.nbdkit_peer_name(address, ctypes.byref(length)) != 0:
        raise OperatorError("the client has hung up")
    family = int.from_bytes(address.raw[:2], sys.byteorder)
    if family == socket.AF_INET:
        return f"address {ipaddress.IPv4Address(address.raw[4:8])}"
    if family == socket.AF_INET6:
        version_6 = ipaddress.IPv6Address(address.raw[8:24])
        return f"address {version_6.ipv4_mapped or version_6}"
    try:
        pid = nbdkit.peer_pid()
    except ValueError:
        # It lives where this process can't see process identifiers: each of its connections is a client of its own.
        return f"process outside this namespace, connection {next(_unnamed)}"
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return f"process {pid}"
    # The start time, because an nbd-client is gone once it has attached, and its number may come back.
    return f"process {pid} (started at tick {status.rpartition(')')[2].split()[19]})"


def get_size(connection: Connection) -> int:
    return connection.volume.size_bytes


def block_size(_connection: Connection) -> tuple[int, int, int]:
    return 1, BLOCK_BYTES, ADVERTISED_REQUEST_BYTES_MAX


def is_rotational(_connection: Connection) -> bool:
    return False


def can_write(_connection: Connection) -> bool:
    return True


def can_flush(_connection: Connection) -> bool:
    return True


def can_trim(_connection: Connection) -> bool:
    return True


def can_zero(_connection: Connection) -> bool:
    return True


def can_fast_zero(connection: Connection) -> bool:
    return connection.volume.can_fast_zero


def can_fua(_connection: Connection) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_multi_conn(_connection: Connection) -> bool:
    # A flush covers what was answered on every connection (invariant flush).
    return True


def can_cache(_connection: Connection) -> int:
    return int(nbdkit.CACHE_EMULATE)


def can_extents(_connection: Connection) -> bool:
    return True


# -- requests ----------------------------------------------------------------------------------------------------------

pread = requests.pread
pwrite = requests.pwrite
flush = requests.flush
trim = requests.trim
zero = requests.zero
extents = requests.extents
