"""Large payloads sent without copying them: the kernel is lent their pages, and the receiver copies from those.

Copying into the kernel is most of what sending a large payload costs the sender (1 MiB over loopback: 235 us of
processor, 75 with lent pages). vmsplice puts the pages themselves into a pipe, splice hands them on to the socket.

What is lent must stay as it is until the peer has said that it has it, for what is lost on the way is read from there
once more. When the session ends first, the old connection may still carry whatever stands there by then; the peer
finds that it does not fit the message's checksum, and throws it away.

ctypes, because Python's os has a splice but no vmsplice.
"""

import contextlib
import ctypes
import fcntl
import os
from typing import Final

# Below, two more system calls cost as much as the copy.
LENT_BYTES_MIN: Final = 256 * 1024
# All that most requests need at one go; what a user without privileges may have at most.
PIPE_BYTES: Final = 1024 * 1024
# Pipes of a user who has too many are too small to be of use.
PIPE_BYTES_MIN: Final = 128 * 1024
SPLICE_F_MORE: Final = 4


class _Piece(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Buffer(ctypes.Structure):
    """Py_buffer, of Python's stable ABI (3.11)"""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("owner", ctypes.c_void_p),
        ("length", ctypes.c_ssize_t),
        ("item_size", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("dimensions", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_vmsplice = ctypes.CDLL(None).vmsplice
_vmsplice.argtypes = (ctypes.c_int, ctypes.POINTER(_Piece), ctypes.c_size_t, ctypes.c_uint)
_vmsplice.restype = ctypes.c_ssize_t
_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_Buffer),)
_release_buffer.restype = None


class _Pipe:
    """Raises OSError when there are no descriptors for it."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        with contextlib.suppress(OSError):  # then it is as large as it is
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.size_bytes = fcntl.fcntl(self.writer, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


# Empty ones that nobody uses now: as many as there were large sends at a time. Append and pop are one step each.
_free: list[_Pipe] = []


def send(descriptor: int, payload: bytes | bytearray | memoryview) -> int:
    """Lend the pages of a payload to a connected, blocking socket; returns how many bytes of it are sent.

    Not all of them, and perhaps none, where the kernel gives no pipe or does not take the pages: the rest is to be
    copied. Raises OSError as a send does.
    """
    pipe = _take_pipe()
    if pipe is None:
        return 0
    buffer = _Buffer()
    _get_buffer(payload, ctypes.byref(buffer), 0)
    sent = 0
    try:
        while sent < buffer.length:
            piece = _Piece(buffer.address + sent, buffer.length - sent)
            lent = _vmsplice(pipe.writer, ctypes.byref(piece), 1, 0)
            if lent <= 0:
                break
            sent += lent
            more = SPLICE_F_MORE if sent < buffer.length else 0
            while lent:
                lent -= os.splice(pipe.reader, descriptor, lent, flags=more)
    except BaseException:
        # Something may be left in it.
        pipe.close()
        raise
    finally:
        _release_buffer(ctypes.byref(buffer))
    _free.append(pipe)
    return sent


def _take_pipe() -> _Pipe | None:
    with contextlib.suppress(IndexError):
        return _free.pop()
    try:
        pipe = _Pipe()
    except OSError:
        return None
    if pipe.size_bytes < PIPE_BYTES_MIN:
        pipe.close()
        return None
    return pipe
