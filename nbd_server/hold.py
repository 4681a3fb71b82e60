"""Who holds a replica: locks that make a second `serve` fail at once and name the first.

Two locks, both flock(2): DIR/lock, which also holds the holder's process id for people and messages, and the data file
or device itself, because two directories may name one backing. nbdkit inherits both descriptors, so they stay held
until the last process that can write the data is gone, however its parent ended. A pid file alone lost: it outlives a
crash, and process ids are reused. A block device is opened with O_EXCL too: the kernel then refuses to mount it.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from mirror.core.errors import DeviceError, OperatorError
from mirror.runtime import Runtime

FILE_NAME = "lock"

# After a killed parent its nbdkit stops in order, which it is given 2 s for; then a new parent may take over.
DYING_HOLDER_S = 3.0
RETRY_S = 0.05


class HeldElsewhere(OperatorError):
    """Another process holds the replica or its data."""

    def __init__(self, message: str, remedy: str, pid: int | None) -> None:
        super().__init__(message, remedy, errno.EBUSY)
        self.pid = pid


def hold_directory(directory: Path, runtime: Runtime) -> int:
    """Lock DIR/lock and write this process's id into it. Returns the descriptor; raises HeldElsewhere."""
    path = directory / FILE_NAME
    descriptor = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        _lock_or_wait_for_dying(descriptor, lambda: _recorded_pid(path), runtime)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        os.close(descriptor)
        pid = _recorded_pid(path)
        raise HeldElsewhere(f"{directory} is being served already, by {_named(pid, path)}", _remedy(pid), pid) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def hold_data(path: Path, runtime: Runtime) -> int:
    """Open the data file or device for the whole life of a server, and lock it. Returns the descriptor."""
    flags = os.O_RDWR
    with contextlib.suppress(OSError):
        flags |= os.O_EXCL if stat.S_ISBLK(path.stat().st_mode) else 0
    try:
        descriptor = _open(path, flags)
    except DeviceError as error:
        if error.errno != errno.EBUSY:
            raise
        raise HeldElsewhere(
            f"{path} is in use: mounted, part of another device, or served from another directory",
            "unmount it, or stop what uses it (lsblk and fuser show it)",
            None,
        ) from None
    try:
        _lock_or_wait_for_dying(descriptor, lambda: _locker(descriptor), runtime)
    except BlockingIOError:
        pid = _locker(descriptor)
        os.close(descriptor)
        raise HeldElsewhere(f"{path} is in use already, by {_named(pid, path)}", _remedy(pid), pid) from None
    return descriptor


@contextlib.contextmanager
def held_for_change(directory: Path, what: str, runtime: Runtime) -> Iterator[None]:
    """Hold DIR while a command changes its files, so that no server starts meanwhile; raises HeldElsewhere."""
    path = directory / FILE_NAME
    descriptor = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            _lock_or_wait_for_dying(descriptor, lambda: _recorded_pid(path), runtime)
        except BlockingIOError:
            pid = _recorded_pid(path)
            raise HeldElsewhere(
                f"{directory} can't be {what} while it is served, by {_named(pid, path)}",
                "stop the server first (Ctrl-C, or SIGTERM to that process)",
                pid,
            ) from None
        yield
    finally:
        os.close(descriptor)


def holder(directory: Path) -> int | None:
    """The process that serves DIR: its id, 0 if it can't be told, None if nobody does. Changes nothing."""
    path = directory / FILE_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _recorded_pid(path) or 0
    finally:
        os.close(descriptor)
    return None


def is_alive(pid: int | None) -> bool:
    """Whether there is such a process that has not ended (a zombie has)."""
    if not pid:
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return fields.rpartition(")")[2].split()[0] not in "ZX"


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise OperatorError(
            f"can't open {path}: {error.strerror}",
            remedy="put it back, or correct `backing` in volume.toml; `nbdmirror create --join` replaces a lost copy",
        ) from None
    except OSError as error:
        raise DeviceError(str(path), "open", error.errno or errno.EIO, error.strerror or str(error)) from None


def _lock_or_wait_for_dying(descriptor: int, holder_pid: Callable[[], int | None], runtime: Runtime) -> None:
    """Take the lock; wait a little unless its holder is a live process. Raises BlockingIOError.

    A holder that can't be named is a dying nbdkit, somebody who has just begun, or a `status` that is only looking.
    """
    deadline = runtime.now_s() + DYING_HOLDER_S
    pause = runtime.condition()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pid = holder_pid()
            if is_alive(pid) or runtime.now_s() > deadline:
                raise
        with pause:
            pause.wait(RETRY_S)


def _recorded_pid(path: Path) -> int | None:
    try:
        text = path.read_bytes()[:32].split()
        return int(text[0]) if text else None
    except (OSError, ValueError):
        return None


def _locker(descriptor: int) -> int | None:
    """The process that took the flock on this file, from /proc/locks."""
    about = os.fstat(descriptor)
    device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    found = [re.match(r"\d+: FLOCK +ADVISORY +WRITE (\d+) (\S+):(\d+)", line) for line in lines]
    same = [match for match in found if match and int(match[3]) == about.st_ino]
    # btrfs and overlayfs show another device here than stat does: then one of the same inode is it.
    sure = [match for match in same if match[2] == device] or (same if len(same) == 1 else [])
    return int(sure[0][1]) or None if sure else None


def _users(path: Path) -> list[int]:
    """Processes that have this file open, as far as this user may see them."""
    found = []
    wanted = os.path.realpath(path)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if any(os.path.realpath(link) == wanted for link in (entry / "fd").iterdir()):
                found.append(int(entry.name))
    return found


def _named(pid: int | None, path: Path) -> str:
    if is_alive(pid):
        return f"process {pid}"
    users = _users(path)
    if not users:
        return "another process"
    left = " and ".join(f"process {user}" for user in users)
    return f"{left}, left behind by a server that ended" if pid else left


def _remedy(pid: int | None) -> str:
    if is_alive(pid):
        return f"stop it first (kill -TERM {pid}), or leave it as it is"
    return "wait for its end, or end it (kill -KILL and its process id)"
