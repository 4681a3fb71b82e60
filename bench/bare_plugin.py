"""The least that a volume in Python can cost: an nbdkit plugin that reads and writes a file, and knows nothing else.

nbdkit runs it as a script. What it is slower than nbdkit's file plugin is the price of calling Python, not of a mirror.
"""

import ctypes
import os
import threading

import nbdkit

API_VERSION = 2

_files: list[int] = []
_thread = threading.local()


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(_key: str, path: str) -> None:
    _files.append(os.open(path, os.O_RDWR))


def open(_readonly: bool) -> int:  # noqa: A001  nbdkit's name for it
    return _files[0]


def get_size(file: int) -> int:
    return os.fstat(file).st_size


def pread(file: int, buffer: memoryview, offset: int, _flags: int) -> None:
    _keep_thread_state()
    os.preadv(file, [buffer], offset)


def pwrite(file: int, buffer: memoryview, offset: int, _flags: int) -> None:
    _keep_thread_state()
    os.pwrite(file, buffer, offset)


def flush(file: int, _flags: int) -> None:
    os.fdatasync(file)


def _keep_thread_state() -> None:
    """Else nbdkit makes and throws away what Python keeps of a thread, at each call (nbd_server/thread_states.py)."""
    if not hasattr(_thread, "kept"):
        _thread.kept = ctypes.pythonapi.PyGILState_Ensure()
