"""How fast a peer that was away catches up, and what clients' writes pay for it meanwhile."""

import itertools
import threading
import time
from pathlib import Path
from typing import Any

from bench import fio
from bench.servers import NbdMirror, wait_for

MIB = 1 << 20
GIB = 1 << 30
# Where clients write beside a resync; the rest of the volume is what the peer lacks.
FOREGROUND_BYTES = 64 * MIB
FOREGROUND = fio.JOBS[0]


def measure(directory: Path, dirty_bytes: int, seconds: float) -> dict[str, Any]:
    """A pair; the secondary stops, `dirty_bytes` that can't be compressed are written, it comes back.

    Once with nobody else, once with writes beside it, for `seconds` at most.
    """
    directory.mkdir()
    target = NbdMirror("resync", directory, dirty_bytes + FOREGROUND_BYTES, "C")
    try:
        target.start()
        fio.fill(target.uri, FOREGROUND_BYTES)
        dirty_before = _fall_behind(target, dirty_bytes)
        begin = time.monotonic()
        known = target.status()["last_resync"]
        target.serve(target.replicas[1])
        wait_for(lambda: target.status()["last_resync"] != known, "the resync to end", 120)
        seconds_in_all = time.monotonic() - begin
        record = target.wait_in_step()["last_resync"]
        speed = record["dirty_bytes"] / max(record["seconds"], 1e-6)
        return {
            "dirty_bytes": dirty_before,
            "sent_bytes": record["sent_bytes"],
            "skipped_bytes": record["skipped_bytes"],
            "seconds": record["seconds"],
            "megabytes_per_s": speed / 1e6,
            "seconds_with_start": seconds_in_all,
            "memory_bytes": target.memory_bytes(),
            # It is to last as long as it is looked at, also where nothing holds it back.
            "beside_writes": _beside_writes(target, dirty_bytes, speed, min(seconds, 0.6 * dirty_bytes / speed)),
        }
    finally:
        target.stop()


def _fall_behind(target: NbdMirror, dirty_bytes: int) -> int:
    """The secondary is away while the rest of the volume is written; what is dirty then."""
    away = target.processes.pop("b")
    away.terminate()
    away.wait(10)
    fio.fill(target.uri, dirty_bytes, FOREGROUND_BYTES)
    dirty: int = target.status()["dirty_bytes"]
    return dirty


def _beside_writes(target: NbdMirror, dirty_bytes: int, idle_bytes_per_s: float, seconds: float) -> dict[str, Any]:
    alone = fio.measure(target.uri, FOREGROUND, FOREGROUND_BYTES, seconds)
    _fall_behind(target, dirty_bytes)
    target.serve(target.replicas[1])
    wait_for(lambda: (target.peek()["resync"] or {}).get("done_bytes"), "the resync to begin", 30)
    with _Watch(target) as watch:
        beside = fio.measure(target.uri, FOREGROUND, FOREGROUND_BYTES, seconds)
    bytes_per_s = watch.bytes_per_s()
    return {
        "p99_us_alone": alone.p99_us,
        "p99_us_beside": beside.p99_us,
        "p99_ratio": beside.p99_us / alone.p99_us,
        "megabytes_per_s": bytes_per_s / 1e6,
        "part_of_idle_speed": bytes_per_s / idle_bytes_per_s,
    }


class _Watch:
    """Looks at a resync ten times a second; its speed is that of the moments in which clients wrote."""

    def __init__(self, target: NbdMirror) -> None:
        self._target = target
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        # When, how far the resync is, how many writes there were.
        self._seen: list[tuple[float, int, int]] = []

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1) and (status := self._target.peek())["resync"]:
            self._seen.append((time.monotonic(), status["resync"]["done_bytes"], status["io"]["writes"]))

    def bytes_per_s(self) -> float:
        copied, passed_s = 0, 0.0
        for (one_s, one_bytes, one_writes), (two_s, two_bytes, two_writes) in itertools.pairwise(self._seen):
            if two_writes > one_writes:
                copied += two_bytes - one_bytes
                passed_s += two_s - one_s
        return copied / passed_s if passed_s else 0.0
