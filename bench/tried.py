"""What was tried, measured again: each way of doing a thing beside the way that it is compared with.

Mostly loops over a file or a socket, without a server: what a choice costs by itself. Rounds are interleaved over all
ways of all trials, and medians taken. `python -m bench.tried` writes bench/results/tried.json, and `make report` puts
that below docs/performance.md's table of what was tried, which has the verdicts and the reasons, and no figures.
"""

import contextlib
import ctypes
import fcntl
import functools
import mmap
import os
import random
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import crc32c

from bench import fio, machine, processes
from bench.figures import Figure, Record, Round, percentile
from bench.processes import BenchError
from bench.rows import Row
from bench.servers import NbdMirror

BLOCK_BYTES = 4096
MIB = 1 << 20
FILE_BYTES = 64 * MIB
VOLUME_BYTES = 64 * MIB
MUCH_BYTES = 256 * MIB
LARGE_BYTES = 1 * MIB
ROUNDS = 5
SECONDS = 0.1
# fio takes half a second to begin, whatever it measures then.
VOLUME_SECONDS = 0.4
# About what a peer takes to answer a write: so long the disk may work on it before the flush is asked for.
ANSWER_S = 0.0002
# What takes less than a look at the clock is done so often between two looks.
AT_A_TIME = 1000
HEADER = struct.Struct("<HBBIQQQIIIiQ")

_libc = ctypes.CDLL(None, use_errno=True)
_AWAIT_WRITE_BACK, _BEGIN_WRITE_BACK = 0x01, 0x02
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class _Piece(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc.vmsplice.argtypes = (ctypes.c_int, ctypes.POINTER(_Piece), ctypes.c_size_t, ctypes.c_uint)
_libc.vmsplice.restype = ctypes.c_ssize_t


def sync_file_range(descriptor: int, offset: int, length: int, what: int) -> None:
    if _libc.sync_file_range(descriptor, offset, length, what):
        raise OSError(ctypes.get_errno(), "sync_file_range")


class Scratch:
    """The files, the socket and the volumes that the loops work on; `close` ends them all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.draw = random.Random(1)
        # O_DIRECT wants memory that begins with a page.
        self.block = mmap.mmap(-1, BLOCK_BYTES)
        self.content = self.draw.randbytes(BLOCK_BYTES)
        self.block[:] = self.content
        # Memory of this process alone, as nbdkit's: shared pages are lent at another price.
        self.large = bytearray(self.draw.randbytes(LARGE_BYTES))
        self.kept = bytearray(HEADER.size)
        self._volumes: dict[str, NbdMirror] = {}
        self._cleanup = contextlib.ExitStack()
        self.data = self._open("data", FILE_BYTES)
        self.direct = self._open("data", FILE_BYTES, os.O_DIRECT)
        self.record = self._open("record", MIB)
        self.direct_record = self._open("record", MIB, os.O_DIRECT | os.O_DSYNC)
        self.much = self._open("much", MUCH_BYTES)

    def close(self) -> None:
        self._cleanup.close()

    def _open(self, name: str, size_bytes: int, flags: int = 0) -> int:
        """A file that is written whole, so that no loop waits for the filesystem to find room."""
        path = self.directory / name
        if not path.exists():
            path.write_bytes(self.draw.randbytes(MIB) * (size_bytes // MIB))
        try:
            descriptor = os.open(path, os.O_RDWR | flags)
        except OSError as error:
            raise BenchError(f"{path}: {error}: give a --directory on a filesystem that has O_DIRECT") from None
        self._cleanup.callback(os.close, descriptor)
        return descriptor

    def place(self, size_bytes: int = FILE_BYTES) -> int:
        return self.draw.randrange(size_bytes // BLOCK_BYTES) * BLOCK_BYTES

    @functools.cached_property
    def peer(self) -> socket.socket:
        """A socket to a process that answers each LARGE_BYTES with a byte."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            words = [sys.executable, "-m", "bench.tried", "--answer", str(listener.getsockname()[1])]
            process = processes.start(words, self.directory / "peer.log")
            self._cleanup.callback(processes.end, process)
            listener.settimeout(processes.START_LIMIT_S)
            client = listener.accept()[0]
        client.setblocking(True)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._cleanup.callback(client.close)
        return client

    @functools.cached_property
    def pipe(self) -> tuple[int, int]:
        """As large as a user without privileges may have it."""
        reader, writer = os.pipe()
        self._cleanup.callback(os.close, reader)
        self._cleanup.callback(os.close, writer)
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, LARGE_BYTES)
        return reader, writer

    def volume(self, settings: str) -> NbdMirror:
        """A pair under protocol C with these lines in volume.toml, started when it is first asked for."""
        if settings not in self._volumes:
            directory = self.directory / f"volume{len(self._volumes)}"
            directory.mkdir()
            target = NbdMirror(directory.name, directory, VOLUME_BYTES, VOLUME_BYTES, "C", settings)
            self._cleanup.callback(target.stop)
            target.start()
            fio.fill(target.uri, VOLUME_BYTES)
            self._volumes[settings] = target
        return self._volumes[settings]


Way = Callable[[Scratch], Round]
Step = Callable[[Scratch], object]


def figures(latencies_s: list[float]) -> Round:
    latencies_us = [latency_s * 1e6 for latency_s in latencies_s]
    return Round(
        {
            "p50_us": percentile(latencies_us, 50),
            "p99_us": percentile(latencies_us, 99),
            "max_ms": max(latencies_us) / 1000,
        }
    )


def timed(scratch: Scratch, step: Step, goes_on: Callable[[], bool]) -> list[float]:
    """Seconds of each, at least of one."""
    latencies_s: list[float] = []
    while not latencies_s or goes_on():
        begin_s = time.perf_counter()
        step(scratch)
        latencies_s.append(time.perf_counter() - begin_s)
    return latencies_s


def for_a_while() -> Callable[[], bool]:
    end_s = time.perf_counter() + SECONDS
    return lambda: time.perf_counter() < end_s


def loop(step: Step) -> Way:
    """One after the other; the first, which may have something to make ready, does not count."""

    def measure(scratch: Scratch) -> Round:
        step(scratch)
        begin_s = time.thread_time()
        latencies_s = timed(scratch, step, for_a_while())
        processor_us = (time.thread_time() - begin_s) * 1e6 / len(latencies_s)
        return Round({**figures(latencies_s).values, "processor_us": processor_us})

    return measure


def tiny_loop(step: Step) -> Way:
    """AT_A_TIME between two looks at the clock; the loop itself takes part of it, the same of each way."""

    def many(scratch: Scratch) -> None:
        for _ in range(AT_A_TIME):
            step(scratch)

    def measure(scratch: Scratch) -> Round:
        return Round({"p50_ns": percentile(timed(scratch, many, for_a_while()), 50) * 1e9 / AT_A_TIME})

    return measure


# -- a write of 4 KiB, and what makes it durable


def write(scratch: Scratch) -> None:
    os.pwrite(scratch.data, scratch.block, scratch.place())


def write_direct(scratch: Scratch) -> None:
    os.pwrite(scratch.direct, scratch.block, scratch.place())


def write_and_flush(scratch: Scratch) -> None:
    write(scratch)
    os.fdatasync(scratch.data)


def write_direct_and_flush(scratch: Scratch) -> None:
    write_direct(scratch)
    os.fdatasync(scratch.direct)


def write_durably(scratch: Scratch) -> None:
    os.pwritev(scratch.data, [scratch.block], scratch.place(), os.RWF_DSYNC)


def flush_after_an_answer(begun: bool) -> Way:
    """Of the flush alone, which a client asks for when its write is answered."""

    def measure(scratch: Scratch) -> Round:
        latencies_s: list[float] = []
        goes_on = for_a_while()
        while not latencies_s or goes_on():
            offset = scratch.place()
            os.pwrite(scratch.data, scratch.block, offset)
            if begun:
                sync_file_range(scratch.data, offset, BLOCK_BYTES, _BEGIN_WRITE_BACK)
            processes.pause(ANSWER_S)
            begin_s = time.perf_counter()
            os.fdatasync(scratch.data)
            latencies_s.append(time.perf_counter() - begin_s)
        return figures(latencies_s)

    return measure


# -- a record of the log, beside a flush of the data


def write_record(scratch: Scratch) -> None:
    os.pwritev(scratch.record, [scratch.block], scratch.place(MIB), os.RWF_DSYNC)


def write_record_direct(scratch: Scratch) -> None:
    os.pwrite(scratch.direct_record, scratch.block, scratch.place(MIB))


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


def beside_flushes(step: Step) -> Way:
    """While another thread writes 4 KiB and flushes, again and again."""

    def measure(scratch: Scratch) -> Round:
        ended = threading.Event()

        def others() -> None:
            draw = random.Random(2)
            while not ended.is_set():
                os.pwrite(scratch.data, scratch.block, draw.randrange(FILE_BYTES // BLOCK_BYTES) * BLOCK_BYTES)
                os.fdatasync(scratch.data)

        with beside(others):
            try:
                return figures(timed(scratch, step, for_a_while()))
            finally:
                ended.set()

    return measure


def flush_of_much(piece_bytes: int = 0) -> Way:
    """Durable records, one after the other, while MUCH_BYTES are flushed: in pieces before the flush, or at one go."""

    def measure(scratch: Scratch) -> Round:
        took_s: list[float] = []

        def flush() -> None:
            begin_s = time.perf_counter()
            for offset in range(0, MUCH_BYTES if piece_bytes else 0, piece_bytes or 1):
                sync_file_range(scratch.much, offset, piece_bytes, _BEGIN_WRITE_BACK)
                sync_file_range(scratch.much, offset, piece_bytes, _AWAIT_WRITE_BACK)
            os.fdatasync(scratch.much)
            took_s.append(time.perf_counter() - begin_s)

        for offset in range(0, MUCH_BYTES, LARGE_BYTES):
            os.pwrite(scratch.much, scratch.large, offset)
        with beside(flush) as thread:
            found = figures(timed(scratch, write_record, thread.is_alive))
        return Round({**found.values, "flush_seconds": took_s[0]})

    return measure


# -- what a message costs


# With each field by itself, as a message has them: a tuple to be unpacked costs one of both more.
def pack_new(_: Scratch) -> bytes:
    return HEADER.pack(1, 2, 0, BLOCK_BYTES, 3, 4, 5, 6, 7, 8, 9, 10)


def pack_kept(scratch: Scratch) -> None:
    HEADER.pack_into(scratch.kept, 0, 1, 2, 0, BLOCK_BYTES, 3, 4, 5, 6, 7, 8, 9, 10)


def checksum(scratch: Scratch) -> int:
    return crc32c.crc32c(scratch.content)


def await_answer(peer: socket.socket) -> None:
    if not peer.recv(1):
        raise BenchError("the process that answers has ended")


def send_copied(scratch: Scratch) -> None:
    scratch.peer.sendall(scratch.large)
    await_answer(scratch.peer)


def send_lent(scratch: Scratch) -> None:
    """The pages themselves, through a pipe to the socket."""
    reader, writer = scratch.pipe
    lent = (ctypes.c_char * LARGE_BYTES).from_buffer(scratch.large)
    sent = 0
    while sent < LARGE_BYTES:
        piece = _Piece(ctypes.addressof(lent) + sent, LARGE_BYTES - sent)
        in_pipe = _libc.vmsplice(writer, ctypes.byref(piece), 1, 0)
        if in_pipe < 0:
            raise OSError(ctypes.get_errno(), "vmsplice")
        sent += in_pipe
        while in_pipe:
            in_pipe -= os.splice(reader, scratch.peer.fileno(), in_pipe)
    await_answer(scratch.peer)


def answer(port: int) -> None:
    """The other end of Scratch.peer."""
    room = memoryview(bytearray(LARGE_BYTES))
    with socket.create_connection(("127.0.0.1", port)) as server:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        got = 0
        while count := server.recv_into(room[got:]):
            got += count
            if got == LARGE_BYTES:
                server.sendall(b"y")
                got = 0


# -- what volume.toml has


def writes_of_a_volume(depth: int, settings: str = "") -> Way:
    """fio's, 4 KiB at random."""

    def measure(scratch: Scratch) -> Round:
        words = ("--rw=randwrite", "--bs=4k", f"--iodepth={depth}", *fio.timed(VOLUME_BYTES, VOLUME_SECONDS))
        target = scratch.volume(settings)
        os.sync()
        return Round(fio.measure(target.uri, words, VOLUME_SECONDS).values)

    return measure


# -- the trials


@dataclass(frozen=True)
class Trial:
    """The first way is the one that the others are compared with; `keys`: the figures shown, and their names."""

    work: str
    ways: dict[str, Way]
    keys: dict[str, str] = field(default_factory=lambda: {"p50_us": "p50"})


TRIALS = (
    Trial("a write of 4 KiB", {"through the page cache": loop(write), "O_DIRECT": loop(write_direct)}),
    Trial(
        "a durable write of 4 KiB",
        {
            "through the page cache, fdatasync": loop(write_and_flush),
            "O_DIRECT, fdatasync": loop(write_direct_and_flush),
            "through the page cache, RWF_DSYNC": loop(write_durably),
        },
    ),
    Trial(
        "a flush (fdatasync), 200 µs after a write of 4 KiB",
        {
            "nothing begun before": flush_after_an_answer(begun=False),
            "written back at once (sync_file_range)": flush_after_an_answer(begun=True),
        },
    ),
    Trial(
        "a durable record of 4 KiB, beside flushes of another file",
        {"RWF_DSYNC": beside_flushes(write_record), "O_DIRECT": beside_flushes(write_record_direct)},
        {"p50_us": "p50", "p99_us": "p99"},
    ),
    Trial(
        "a durable record of 4 KiB, beside one flush of 256 MiB",
        {
            "at one go": flush_of_much(),
            "in pieces of 4 MiB": flush_of_much(4 * MIB),
            "in pieces of 16 MiB": flush_of_much(16 * MIB),
        },
        {"max_ms": "the slowest record", "flush_seconds": "the flush"},
    ),
    Trial(
        "a header",
        {"new bytes each time": tiny_loop(pack_new), "packed into memory that is kept": tiny_loop(pack_kept)},
        {"p50_ns": "p50"},
    ),
    Trial("the checksum of 4 KiB", {"CRC-32C": tiny_loop(checksum)}, {"p50_ns": "p50"}),
    Trial(
        "1 MiB over loopback and a byte back",
        {"copied (sendall)": loop(send_copied), "its pages lent (vmsplice, splice)": loop(send_lent)},
        {"p50_us": "p50", "processor_us": "the sender's processor"},
    ),
    Trial(
        "one write at a time, mirrored, C",
        {
            "spin = 400": writes_of_a_volume(1, "spin = 400"),
            "spin = 100": writes_of_a_volume(1, "spin = 100"),
        },
        {"p50_us": "p50", "p99_us": "p99"},
    ),
    Trial(
        "16 writes at a time, mirrored, C",
        {
            'cores = "auto"': writes_of_a_volume(16),
            'cores = "any"': writes_of_a_volume(16, 'cores = "any"'),
        },
        {"operations_per_s": "IOPS"},
    ),
)


def rows(trial: Trial) -> Iterator[Row]:
    first = next(iter(trial.ways))
    for key, name in trial.keys.items():
        for way in trial.ways:
            figure = Figure(trial.work, way, key)
            beside_first = None if way == first else Figure(trial.work, first, key)
            yield Row(f"{trial.work[0].upper()}{trial.work[1:]}", f"{way}, {name}", figure, beside_first, None)


ROWS = tuple(row for trial in TRIALS for row in rows(trial))


def measure(directory: Path, rounds: int, say: Callable[[str], None]) -> Record:
    """All of them, in turns; the second way of a trial begins the second round."""
    record = Record(machine.facts(directory), {"rounds": rounds, "seconds": SECONDS, "much_bytes": MUCH_BYTES})
    found: dict[tuple[str, str], list[Round]] = {(trial.work, way): [] for trial in TRIALS for way in trial.ways}
    with machine.timing(record.settings), contextlib.closing(Scratch(directory)) as scratch:
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for trial in TRIALS:
                ways = list(trial.ways)
                first = number % len(ways)
                for way in ways[first:] + ways[:first]:
                    os.sync()
                    found[trial.work, way].append(trial.ways[way](scratch))
    for (work, way), measured in found.items():
        record.add(work, way, measured)
    return record


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True)
@click.option("--directory", type=click.Path(path_type=Path, exists=True), default="/var/tmp", show_default=True)
@click.option("--answer", "port", type=int, hidden=True)
def main(rounds: int, directory: Path, port: int | None) -> None:
    """Measure again what was tried; all of it is written to bench/results/tried.json."""
    if port is not None:
        answer(port)
        return
    # Here, because they make the table of docs/performance.md from the rows here.
    from bench import report
    from bench.__main__ import console, heed_signals, save, tell

    heed_signals()
    where = Path(tempfile.mkdtemp(prefix="nbdmirror-tried-", dir=directory))
    try:
        record = measure(where, rounds, console.print)
    except BenchError as error:
        console.print(f"[red]{error}", highlight=False)
        sys.exit(1)
    finally:
        shutil.rmtree(where, ignore_errors=True)
    tell(record, list(ROWS))
    save(record, report.TRIED)
    console.print("`make report` puts it into docs/performance.md")


if __name__ == "__main__":
    main()
