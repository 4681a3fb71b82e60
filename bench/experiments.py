"""What needs a pair of its own: resyncs, with and without clients that write meanwhile, and memory.

An experiment gets an empty directory and leaves nothing running. It says each step before it does it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import fio, processes
from bench.figures import Record, Round, p99_by_time, percentile
from bench.processes import BenchError, wait_for
from bench.scale import Scale
from bench.servers import NbdkitFile, NbdMirror

Say = Callable[[str], None]
MIB = 1 << 20
RESYNC_LIMIT_S = 300.0
# What the foreground writes to, behind all that the resync copies.
FOREGROUND_BYTES = 64 * MIB
WINDOW_S = 0.5


@dataclass(frozen=True)
class Experiment:
    """`run` puts what it found into the record, under `work`."""

    run: Callable[[str, Path, Scale, Record, Say], None]
    # How often it says what it does.
    steps: Callable[[Scale], int]


@contextlib.contextmanager
def pair(directory: Path, size_bytes: int) -> Iterator[NbdMirror]:
    directory.mkdir()
    target = NbdMirror(directory.name, directory, size_bytes, 0, "C")
    try:
        target.start()
        yield target
    finally:
        target.stop()


@dataclass(frozen=True)
class Resync:
    """What the server noted, when it began and ended (seconds since 1970), how many cores each side took."""

    note: dict[str, Any]
    began_s: float
    ended_s: float
    cores: dict[str, float]

    @property
    def bytes_per_s(self) -> float:
        return float(self.note["dirty_bytes"] / max(self.note["seconds"], 1e-6))


def resynced(target: NbdMirror) -> Resync:
    """The peer returns and gets what it lacks."""
    before = target.status()["last_resync"]
    target.peer_returns()
    used = {role: processes.cpu_seconds(process.pid) for role, process in target.processes.items()}
    began_s = ended_s = 0.0

    def ended() -> dict[str, Any] | None:
        nonlocal began_s, ended_s
        status = target.status()
        # A quick one may be over before it is seen; then this is when it ended.
        if not began_s and (status["resync"] or status["last_resync"] != before):
            began_s = time.time()
        ended_s = time.time()
        note: dict[str, Any] = status["last_resync"]
        return note if note != before and not status["resync"] else None

    note = wait_for(ended, "the resync to end", RESYNC_LIMIT_S, every_s=0.05)
    cores = {
        role: (processes.cpu_seconds(process.pid) - used[role]) / max(note["seconds"], 1e-6)
        for role, process in target.processes.items()
    }
    return Resync(note, min(began_s, ended_s - note["seconds"]), ended_s, cores)


def nbdcopy_bytes_per_s(directory: Path, source: Path) -> float:
    """The same file, which has no holes, from one nbdkit to another one, into a new sparse file, flushed in the end."""
    with contextlib.ExitStack() as cleanup:
        servers = []
        for name in ("from", "to"):
            (directory / name).mkdir()
            server = NbdkitFile(name, directory / name, source.stat().st_size, 0)
            servers.append(server)
            cleanup.callback(server.stop)
        servers[0].serve(source, "-r")
        servers[1].start()
        begin_s = time.monotonic()
        processes.command(["nbdcopy", "--flush", *(server.uri for server in servers)], RESYNC_LIMIT_S)
        seconds = time.monotonic() - begin_s
        cleanup.callback((directory / "to" / "data").unlink)
    return source.stat().st_size / seconds


def resync(work: str, directory: Path, scale: Scale, record: Record, say: Say) -> None:
    """Idle, beside nbdcopy of the same data; then again while a client writes."""
    size_bytes = scale.resync_bytes
    with pair(directory, size_bytes + FOREGROUND_BYTES) as target:
        say("resync: writes without one, to compare with")
        fio.fill(target.uri, FOREGROUND_BYTES, size_bytes)
        alone = foreground(target, directory, scale, size_bytes)
        target.peer_leaves()
        say("resync: writing while the peer is away")
        fio.fill(target.uri, size_bytes)
        copied = []
        for number in range(2):
            # Before and after the resync, as a machine's speed changes.
            say("resync: nbdcopy")
            place = directory / f"copy{number}"
            place.mkdir()
            copied.append(nbdcopy_bytes_per_s(place, target.replicas[0] / "data"))
            if number == 0:
                say("resync: idle")
                idle = resynced(target)
        target.peer_leaves()
        say("resync: writing again while the peer is away")
        # Other data, or the peer would have all of it already.
        fio.fill(target.uri, size_bytes, seed=2)
        say("resync: beside writes")
        busy: list[Resync] = []
        writes = foreground(target, directory, scale, size_bytes, lambda: busy.append(resynced(target)))
    during = [latency for when, latency in writes if busy[0].began_s <= when <= busy[0].ended_s]
    if not alone or not during:
        raise BenchError("the foreground wrote nothing")
    record.add(work, "nbdcopy", [Round({"bytes_per_s": speed}) for speed in copied])
    record.add(
        work,
        "idle",
        [
            Round(
                {
                    "bytes_per_s": idle.bytes_per_s,
                    "dirty_bytes": idle.note["dirty_bytes"],
                    "cores": max(idle.cores.values()),
                }
            )
        ],
    )
    record.add(work, "beside writes", [Round({"bytes_per_s": busy[0].bytes_per_s, "p99_us": percentile(during, 99)})])
    record.add(work, "writes without", [Round({"p99_us": percentile([latency for _, latency in alone], 99)})])
    record.timeline = {
        "window_s": WINDOW_S,
        # [seconds, p99 in us], each from its own beginning: of the second, that of the resync.
        "without": p99_by_time(alone, min(when for when, _ in alone), WINDOW_S),
        "beside": p99_by_time(writes, busy[0].began_s, WINDOW_S),
        "resync_s": round(busy[0].ended_s - busy[0].began_s, 3),
    }


def foreground(
    target: NbdMirror, directory: Path, scale: Scale, offset_bytes: int, meanwhile: Callable[[], None] | None = None
) -> list[tuple[float, float]]:
    """Writes at depth 1 for `foreground_s`, then during `meanwhile`, then for as long again."""
    processes.command(["sync"], RESYNC_LIMIT_S)
    written_before = target.status()["io"]["writes"]

    def writes() -> bool:
        client.alive()
        return bool(target.status()["io"]["writes"] > written_before)

    client = fio.Foreground(target.uri, directory, offset_bytes, FOREGROUND_BYTES)
    try:
        processes.wait_for(writes, "the first write of fio", RESYNC_LIMIT_S)
        processes.pause(scale.foreground_s)
        if meanwhile is not None:
            meanwhile()
            processes.pause(scale.foreground_s)
        return client.stop()
    finally:
        client.end()


def scattered(work: str, directory: Path, scale: Scale, record: Record, say: Say) -> None:
    """One block in a hundred, all over the volume."""
    size_bytes = scale.scattered_volume_bytes
    with pair(directory, size_bytes) as target:
        target.peer_leaves()
        say("scattered resync: writing while the peer is away")
        written = (f"--io_size={size_bytes // 100}", f"--size={size_bytes}")
        fio.run(target.uri, ("--rw=randwrite", "--bs=4k", "--iodepth=16", *written), RESYNC_LIMIT_S)
        dirty_bytes = target.status()["dirty_bytes"]
        processes.command(["sync"], RESYNC_LIMIT_S)
        say("scattered resync: running")
        done = resynced(target)
    moved = {"sent_bytes": done.note["sent_bytes"], "dirty_bytes": dirty_bytes, "seconds": done.note["seconds"]}
    record.add(work, "idle", [Round(moved)])


def memory(work: str, directory: Path, scale: Scale, record: Record, say: Say) -> None:
    """The largest process, after writes all over the volume, some of them while the peer was away, and the resync."""
    with pair(directory, scale.memory_volume_bytes) as target:
        job = ("--rw=randwrite", "--bs=4k", "--iodepth=16", "--time_based", f"--size={scale.memory_volume_bytes}")
        say("memory: writing")
        fio.run(target.uri, (*job, f"--runtime={round(scale.seconds * 1000)}ms"), RESYNC_LIMIT_S)
        away = max(processes.peak_memory_mib(process.pid) for process in target.processes.values())
        target.peer_leaves()
        say("memory: writing while the peer is away")
        fio.run(target.uri, (*job, f"--runtime={round(scale.seconds * 1000)}ms"), RESYNC_LIMIT_S)
        resynced(target)
        peaks = [processes.peak_memory_mib(process.pid) for process in target.processes.values()]
    record.add(work, "idle", [Round({"peak_mib": max(away, *peaks)})])
