"""Writes that are durable when they are answered, one at a time: FUA, or a write and then a flush.

fio's nbd engine can't set FUA, and gives the write and its fsync apart, whose medians don't add up to that of the pair.
So this is a loop over libnbd, in a process of its own, the same for every target.
"""

import contextlib
import json
import random
import sys
import time
from pathlib import Path

from bench import processes
from bench.figures import Round, percentile
from bench.servers import Target

PERCENTS = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)
BLOCK_BYTES = 4096


def measure(target: Target, kind: str, size_bytes: int, seconds: float) -> Round:
    """`kind`: "fua" or "flush"."""
    with contextlib.ExitStack() as cleanup:
        if target.second_uri:
            # Longer than what is measured, which is begun later.
            beside = processes.start(
                _words(target.second_uri, kind, size_bytes, seconds + 60), target.directory / "second.log"
            )
            cleanup.callback(processes.end, beside)
            cleanup.callback(beside.terminate)
        latencies_us = json.loads(processes.command(_words(target.uri, kind, size_bytes, seconds), seconds + 60))
    return Round(
        {
            "p50_us": percentile(latencies_us, 50),
            "p99_us": percentile(latencies_us, 99),
            "max_ms": max(latencies_us) / 1000,
            "operations_per_s": len(latencies_us) / (sum(latencies_us) / 1e6),
        },
        {float(percent): percentile(latencies_us, percent) for percent in PERCENTS},
    )


def _words(uri: str, kind: str, size_bytes: int, seconds: float) -> list[str | Path]:
    return [sys.executable, "-m", "bench.cycles", uri, kind, str(size_bytes), str(seconds)]


def loop(uri: str, kind: str, size_bytes: int, seconds: float) -> list[float]:
    """Microseconds of each cycle."""
    # Here, because only this process needs it: it is a Debian package and has no types.
    import nbd

    client = nbd.NBD()
    client.connect_uri(uri)
    draw = random.Random(1)
    content = draw.randbytes(BLOCK_BYTES)
    latencies_us = []
    end_s = time.perf_counter() + seconds
    while (begin_s := time.perf_counter()) < end_s:
        offset = draw.randrange(size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if kind == "fua":
            client.pwrite(content, offset, nbd.CMD_FLAG_FUA)
        else:
            client.pwrite(content, offset)
            client.flush()
        latencies_us.append(round((time.perf_counter() - begin_s) * 1e6, 1))
    client.shutdown()
    return latencies_us


if __name__ == "__main__":
    print(json.dumps(loop(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))))
