"""How fast a peer that was away catches up: dirty megabytes a second, and memory of each process right after it."""

import time
from pathlib import Path
from typing import Any

from bench import fio
from bench.servers import NbdMirror, wait_for

GIB = 1 << 30


def measure(directory: Path, dirty_bytes: int) -> dict[str, Any]:
    """A pair; the secondary stops, `dirty_bytes` that can't be compressed are written, it comes back."""
    directory.mkdir()
    target = NbdMirror("resync", directory, dirty_bytes + (64 << 20), "C")
    try:
        target.start()
        away = target.processes.pop("b")
        away.terminate()
        away.wait(10)
        fio.fill(target.uri, dirty_bytes)
        dirty_before = target.status()["dirty_bytes"]
        begin = time.monotonic()
        target.serve(target.replicas[1])
        wait_for(lambda: target.status()["last_resync"], "the resync to end", 120)
        seconds_in_all = time.monotonic() - begin
        record = target.wait_in_step()["last_resync"]
        return {
            "dirty_bytes": dirty_before,
            "sent_bytes": record["sent_bytes"],
            "skipped_bytes": record["skipped_bytes"],
            "seconds": record["seconds"],
            "megabytes_per_s": record["dirty_bytes"] / max(record["seconds"], 1e-6) / 1e6,
            "seconds_with_start": seconds_in_all,
            "memory_bytes": target.memory_bytes(),
        }
    finally:
        target.stop()
