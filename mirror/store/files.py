"""Positioned system calls on the replica's files: whole or an error, and the error names the file."""

import errno as codes
import logging
import os
from pathlib import Path

from mirror.core.errors import DeviceError, OperatorError
from mirror.core.limits import RECORD_BYTES

log = logging.getLogger(__name__)

# Contents, byte by byte.
Buffer = bytes | bytearray | memoryview


def failed(path: Path, operation: str, error: OSError) -> DeviceError:
    """The device error that this failed system call is."""
    return DeviceError(str(path), operation, error.errno or codes.EIO, error.strerror or str(error))


def open_file(path: Path, flags: int) -> int:
    """A descriptor. Raises OperatorError for what a person can mend, DeviceError."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise OperatorError(
            f"{path} does not exist", remedy="check the path; `nbdmirror create` makes a replica"
        ) from None
    except (PermissionError, IsADirectoryError) as error:
        raise OperatorError(f"{path} can't be opened: {error.strerror}", remedy="check its kind and owner") from None
    except OSError as error:
        raise failed(path, "open", error) from error


def write_all(fd: int, buffer: Buffer, offset: int, flags: int = 0) -> None:
    """Write the whole buffer, however the kernel cuts it."""
    rest = memoryview(buffer).cast("B")
    while rest:
        done = os.pwritev(fd, (rest,), offset, flags)
        if not done:
            raise OSError(codes.EIO, "nothing of it was written")
        rest = rest[done:]
        offset += done


def read_all(fd: int, length: int, offset: int) -> bytes:
    """`length` bytes; fewer only at the end of the file."""
    parts = []
    while length > 0:
        part = os.pread(fd, length, offset)
        if not part:
            break
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_records(path: Path, fd: int, count: int, offset: int) -> list[bytes]:
    """Records as they are; one that can't be read is as good as damaged, and costs none of its neighbours."""
    try:
        whole = read_all(fd, count * RECORD_BYTES, offset)
    except OSError as error:
        if count > 1:
            return [read_records(path, fd, 1, offset + index * RECORD_BYTES)[0] for index in range(count)]
        log.warning("%s can't be read at %d: %s", path, offset, error.strerror)
        return [b""]
    return [whole[at : at + RECORD_BYTES] for at in range(0, count * RECORD_BYTES, RECORD_BYTES)]


def flush_directory(directory: Path) -> None:
    """Make the names in it durable. Raises OperatorError, DeviceError."""
    fd = open_file(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        raise failed(directory, "flush", error) from error
    finally:
        os.close(fd)
