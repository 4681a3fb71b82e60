"""Keeps the Python thread state of nbdkit's worker threads alive between callbacks, and frees it after they ended.

nbdkit enters Python with PyGILState_Ensure and leaves with PyGILState_Release. For a thread that Python did not start,
that makes a thread state and destroys it again at every callback: an mmap, a munmap and a page fault a request, and
everything in `threading.local` is forgotten. One more PyGILState_Ensure, never released, keeps the state: of 4 KiB
writes, five times as many at depth 16, each in three quarters of the time at depth 1. What that asks for in return:

1. A thread is known to be pinned by a mark in `threading.local`, which an unpinned thread can't keep. A set of thread
   identifiers lost: they are reused, and half of the connections would run unpinned.
2. nbdkit makes new worker threads for every connection and Python learns nothing of their end, so states would leak
   (80 MiB in a thousand connections). nbdkit joins a connection's workers before it closes the connection, which then
   hands their states to the reaper, a thread that frees each as soon as the kernel no longer knows its owner: a moment
   after the join. Freeing in the close itself lost: it needs the interpreter's lock several times, and under many
   short connections the closes fell hundreds behind.
3. From Python 3.12 on, deleting a state clears the binding of the thread that *deletes* (`unbind_gilstate_tstate` in
   CPython's pystate.c), and if nbdkit made that thread, its next PyGILState_Release aborts the process. The reaper was
   made by Python and needs no such binding.
"""

import ctypes
import os
import queue
import threading

from mirror.runtime import Runtime

# How soon the reaper looks again at threads that were still ending.
RETRY_S = 0.1

_PYGILSTATE_LOCKED = 0
_NO_SIGNAL = 0

_ensure = ctypes.pythonapi.PyGILState_Ensure
_ensure.argtypes, _ensure.restype = [], ctypes.c_int
_release = ctypes.pythonapi.PyGILState_Release
_release.argtypes, _release.restype = [ctypes.c_int], None
_current_state = ctypes.pythonapi.PyThreadState_Get
_current_state.argtypes, _current_state.restype = [], ctypes.c_void_p
_clear = ctypes.pythonapi.PyThreadState_Clear
_clear.argtypes, _clear.restype = [ctypes.c_void_p], None
_delete = ctypes.pythonapi.PyThreadState_Delete
_delete.argtypes, _delete.restype = [ctypes.c_void_p], None
# Called with the interpreter's lock held: it never blocks, and taking the lock again would cost far more.
_tgkill = ctypes.pythonapi.tgkill
_tgkill.argtypes, _tgkill.restype = [ctypes.c_int, ctypes.c_int, ctypes.c_int], ctypes.c_int


class _Mark(threading.local):
    pinned = False


this_thread = _Mark()

# A pinned thread: its identifier in the kernel and its state.
_Pinned = tuple[int, int]
_ended: "queue.SimpleQueue[list[_Pinned]]" = queue.SimpleQueue()


class WorkerStates:
    """The pinned states of one connection's worker threads."""

    __slots__ = ("_pinned",)

    def __init__(self) -> None:
        self._pinned: list[_Pinned] = []

    def pin(self) -> None:
        """Keep the calling thread's state; call it only where `this_thread.pinned` is false."""
        _ensure()
        self._pinned.append((threading.get_native_id(), _current_state()))
        this_thread.pinned = True

    def free(self) -> None:
        """Let the states go; call it when nbdkit has joined the connection's workers."""
        if this_thread.pinned:
            # nbdkit -t 1 has no workers: the connection's own thread serves, and goes on after this close.
            _release(_PYGILSTATE_LOCKED)
            this_thread.pinned = False
            self._pinned.remove((threading.get_native_id(), _current_state()))
        if self._pinned:
            _ended.put(self._pinned)


def start_reaper(runtime: Runtime) -> None:
    """To be called once, after nbdkit's fork."""
    runtime.spawn("thread-states", _reap)


def _reap() -> None:
    process = os.getpid()
    candidates: list[_Pinned] = []
    while True:
        try:
            candidates += _ended.get(timeout=RETRY_S if candidates else None)
        except queue.Empty:
            pass
        remaining = []
        for thread, state in candidates:
            if _tgkill(process, thread, _NO_SIGNAL) == 0:
                remaining.append((thread, state))
            else:
                _clear(state)
                _delete(state)
        candidates = remaining
