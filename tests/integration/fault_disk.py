"""A file whose reads, writes and flushes fail on demand: a FUSE filesystem of one file, spoken to the kernel directly.

    disk = FaultDisk(tmp_path, size_bytes)      # disk.path is the file
    disk.fail(reads=[(offset, length)])         # EIO for these bytes until they are written again, like bad sectors
    disk.fail(write_errno=errno.EIO), disk.fail(fsync_errno=errno.EIO), disk.fail()
    disk.counts()                               # {"read_errors": 1, "write_errors": 0, "fsync_errors": 0}
    disk.lose_power(seed)                       # of each block written since the last fsync, either content may be left

Opened without page cache (FOPEN_DIRECT_IO), so each request of the replica reaches the fault. The other ways lost: an
nbdkit error filter needs an NBD block device, device-mapper is not in every kernel, a loop device hides a read error
behind its cache. The server is a process of its own, `fault_disk.py MOUNTPOINT BACKING`, that takes JSON lines.
"""

import contextlib
import ctypes
import errno
import json
import os
import random
import select
import stat
import struct
import subprocess
import sys
from pathlib import Path

LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE = 1, 2, 3, 4, 14, 15, 16, 17, 18
FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS, INTERRUPT, DESTROY = 20, 25, 26, 27, 28, 29, 34, 36, 38
BATCH_FORGET, FALLOCATE, LSEEK = 42, 43, 46

IN_HEADER = struct.Struct("<IIQQIIII")
OUT_HEADER = struct.Struct("<IiQ")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
FOPEN_DIRECT_IO = 1
FUSE_BIG_WRITES = 1 << 5
FATTR_SIZE = 1 << 3
BLOCK_BYTES = 4096
MAX_WRITE = 1 << 17
ROOT, DISK = 1, 2
SECONDS_VALID = 3600

libc = ctypes.CDLL(None, use_errno=True)


class Server:
    """Answers the kernel's FUSE requests; faults are looked up at each."""

    def __init__(self, mountpoint: str, backing: str) -> None:
        self.fuse = os.open("/dev/fuse", os.O_RDWR)
        self.backing = os.open(backing, os.O_RDWR)
        options = f"fd={self.fuse},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        if libc.mount(b"faultdisk", mountpoint.encode(), b"fuse", 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), f"mount {mountpoint}: {os.strerror(ctypes.get_errno())}")
        self.faults: dict[str, object] = {}
        self.bad: list[tuple[int, int]] = []
        # What blocks held that have been written since the last fsync.
        self.unstable: dict[int, bytes] = {}
        self.counts = {
            "read_errors": 0,
            "write_errors": 0,
            "fsync_errors": 0,
            "reads": 0,
            "writes": 0,
            "fsyncs": 0,
            "lost_blocks": 0,
        }

    def run(self) -> None:
        poller = select.poll()
        poller.register(self.fuse, select.POLLIN)
        poller.register(0, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd == 0:
                    line = sys.stdin.buffer.readline()
                    if not line:
                        return
                    self.command(json.loads(line))
                elif not self.request():
                    return

    def command(self, faults: dict[str, object]) -> None:
        if "power_loss" in faults:
            self.lose_power(random.Random(int(faults["power_loss"])))  # type: ignore[call-overload]
        elif "counts" not in faults:
            self.faults = faults
            self.bad = [(int(offset), int(length)) for offset, length in faults.get("reads", [])]  # type: ignore[attr-defined]
        sys.stdout.write(json.dumps(self.counts) + "\n")
        sys.stdout.flush()

    def keep(self, offset: int, length: int) -> None:
        """Before a change: remember what its blocks hold on the medium."""
        for block in range(offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)):
            if block not in self.unstable:
                self.unstable[block] = os.pread(self.backing, BLOCK_BYTES, block * BLOCK_BYTES)

    def lose_power(self, chance: random.Random) -> None:
        """The medium got some of what was written since the last fsync: any subset of its blocks."""
        share = chance.choice([0.1, 0.5, 0.9])
        for block, old in sorted(self.unstable.items()):
            if chance.random() < share:
                os.pwrite(self.backing, old, block * BLOCK_BYTES)
                self.counts["lost_blocks"] += 1
        self.unstable.clear()

    def request(self) -> bool:
        try:
            message = os.read(self.fuse, MAX_WRITE + 4096)
        except OSError as error:
            return error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT)
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(message)
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            return True
        try:
            answer, code = self.answer(opcode, node, memoryview(message)[IN_HEADER.size :]), 0
        except OSError as error:
            answer, code = b"", -(error.errno or errno.EIO)
        with contextlib.suppress(FileNotFoundError):  # the request was interrupted
            os.write(self.fuse, OUT_HEADER.pack(OUT_HEADER.size + len(answer), code, unique) + answer)
        return bool(opcode != DESTROY)

    def answer(self, opcode: int, node: int, body: memoryview) -> bytes:
        if opcode == INIT:
            return INIT_OUT.pack(7, 31, 0, FUSE_BIG_WRITES, 0, 0, MAX_WRITE, 1, MAX_WRITE // 4096, 0, 0)
        if opcode == LOOKUP:
            if bytes(body).rstrip(b"\0") != b"disk":
                raise FileNotFoundError(errno.ENOENT, "only `disk` is here")
            return struct.pack("<QQQQII", DISK, 0, SECONDS_VALID, 0, 0, 0) + self.attributes(DISK)
        if opcode in (GETATTR, SETATTR):
            if opcode == SETATTR and struct.unpack_from("<I", body)[0] & FATTR_SIZE:
                os.ftruncate(self.backing, struct.unpack_from("<Q", body, 16)[0])
            return struct.pack("<QII", 0, 0, 0) + self.attributes(node)
        if opcode in (OPEN, OPENDIR):
            return struct.pack("<QII", 0, FOPEN_DIRECT_IO if opcode == OPEN else 0, 0)
        if opcode == STATFS:
            return struct.pack("<QQQQQIIII24x", 1 << 30, 1 << 30, 1 << 30, 10, 10, 4096, 255, 4096, 0)
        if opcode in (FLUSH, RELEASE, RELEASEDIR, READDIR, ACCESS, DESTROY):
            return b""
        return self.data(opcode, body)

    def attributes(self, node: int) -> bytes:
        found = os.fstat(self.backing)
        mode, size = (stat.S_IFREG | 0o600, found.st_size) if node == DISK else (stat.S_IFDIR | 0o700, 4096)
        return ATTR.pack(node, size, found.st_blocks, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def fault(self, kind: str) -> None:
        delay_s = float(self.faults.get(f"{kind}_delay_s", 0))  # type: ignore[arg-type]
        if delay_s:
            select.select([], [], [], delay_s)
        code = int(self.faults.get(f"{kind}_errno", 0))  # type: ignore[call-overload]
        if code:
            self.counts[f"{kind}_errors"] += 1
            raise OSError(code, kind)

    def data(self, opcode: int, body: memoryview) -> bytes:
        if opcode == READ:
            _, offset, length = struct.unpack_from("<QQI", body)
            self.counts["reads"] += 1
            if any(start < offset + length and offset < start + size for start, size in self.bad):
                self.counts["read_errors"] += 1
                raise OSError(errno.EIO, "bad sector")
            self.fault("read")
            return os.pread(self.backing, length, offset)
        if opcode == WRITE:
            return self.write(body)
        if opcode == FSYNC:
            self.counts["fsyncs"] += 1
            self.fault("fsync")
            self.unstable.clear()
            return b""
        if opcode == FALLOCATE:
            _, offset, length, mode, _ = struct.unpack_from("<QQQII", body)
            self.fault("write")
            self.keep(offset, length)
            if libc.fallocate64(self.backing, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
                raise OSError(ctypes.get_errno(), "fallocate")
            return b""
        if opcode == LSEEK:
            _, offset, whence, _ = struct.unpack_from("<QQII", body)
            return struct.pack("<Q", os.lseek(self.backing, offset, whence))
        raise OSError(errno.ENOSYS, f"opcode {opcode}")

    def write(self, body: memoryview) -> bytes:
        _, offset, length, _, _, flags = struct.unpack_from("<QQIIQI", body)
        self.counts["writes"] += 1
        self.fault("write")
        if flags & os.O_DSYNC:
            for block in range(-(-offset // BLOCK_BYTES), (offset + length) // BLOCK_BYTES):
                self.unstable.pop(block, None)
        else:
            self.keep(offset, length)
        written = os.pwrite(self.backing, body[40 : 40 + length], offset)
        # A written sector is a good one again: the disk has put it elsewhere.
        if not self.faults.get("lasting"):
            self.bad = [(s, n) for s, n in self.bad if not (offset <= s and s + n <= offset + length)]
        return struct.pack("<II", written, 0)


class FaultDisk:
    """The test's side: starts the server, sends it faults, unmounts."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self.mountpoint = directory / "faultdisk"
        self.backing = directory / "faultdisk.img"
        self.mountpoint.mkdir()
        with self.backing.open("wb") as image:
            image.truncate(size_bytes)
        words = [sys.executable, __file__, str(self.mountpoint), str(self.backing)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.path = self.mountpoint / "disk"
        self.fail()

    def fail(
        self,
        reads: list[tuple[int, int]] | None = None,
        write_errno: int = 0,
        fsync_errno: int = 0,
        read_errno: int = 0,
        lasting: bool = False,
        write_delay_s: float = 0.0,
        fsync_delay_s: float = 0.0,
    ) -> None:
        """From now on exactly these faults; `lasting`: a bad range stays bad when written. A delay holds up all."""
        faults = {
            "reads": reads or [],
            "write_errno": write_errno,
            "fsync_errno": fsync_errno,
            "read_errno": read_errno,
            "write_delay_s": write_delay_s,
            "fsync_delay_s": fsync_delay_s,
        }
        self._send(faults | {"lasting": lasting})

    def counts(self) -> dict[str, int]:
        return self._send({"counts": True})

    def lose_power(self, seed: int) -> None:
        """After its replica was killed: every block written since the last fsync has its old or its new content."""
        self._send({"power_loss": seed})

    def _send(self, command: dict[str, object]) -> dict[str, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 10.0)
        assert ready, "the fault disk does not answer"
        answer = self.process.stdout.readline()
        assert answer, "the fault disk ended"
        counts = json.loads(answer)
        assert isinstance(counts, dict)
        return counts

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.mountpoint)], check=False, timeout=10)
        self.process.kill()
        self.process.communicate()


if __name__ == "__main__":
    Server(sys.argv[1], sys.argv[2]).run()
