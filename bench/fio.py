"""One fio run and its figures; fio's nbd engine against a running server."""

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from bench.servers import BenchError


@dataclass(frozen=True)
class Job:
    """What clients do: a name for people and fio's words for it."""

    name: str
    options: tuple[str, ...]
    kind: str = "write"
    megabytes: bool = False

    @property
    def synced(self) -> bool:
        return any(option.startswith("--fsync") for option in self.options)


JOBS = (
    Job("4 KiB random writes, depth 1", ("--rw=randwrite", "--bs=4k", "--iodepth=1")),
    Job("4 KiB random writes, depth 16", ("--rw=randwrite", "--bs=4k", "--iodepth=16")),
    Job("4 KiB random write, then fsync", ("--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1")),
    Job("1 MiB sequential writes, depth 4", ("--rw=write", "--bs=1m", "--iodepth=4"), megabytes=True),
    Job("4 KiB random reads, depth 1", ("--rw=randread", "--bs=4k", "--iodepth=1"), kind="read"),
    Job("4 KiB random reads, depth 16", ("--rw=randread", "--bs=4k", "--iodepth=16"), kind="read"),
)


@dataclass(frozen=True)
class Figures:
    """Latency of a whole request (submission and completion; of a write and its fsync together), in microseconds."""

    p50_us: float
    p99_us: float
    operations_per_s: float
    bytes_per_s: float


def run(uri: str, options: tuple[str, ...], size_bytes: int, timeout_s: float) -> dict[str, Any]:
    """fio's own figures of its one job. BenchError when it reports an error."""
    words = ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", f"--size={size_bytes}", "--output-format=json"]
    # Without this pair half of a request's time is missed: the nbd engine counts submission apart from completion.
    words += ["--lat_percentiles=1", "--clat_percentiles=0", "--norandommap", "--refill_buffers", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(words)}: exit {done.returncode}: {done.stderr[-1000:]}{done.stdout[-1000:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if job["error"]:
        raise BenchError(f"{' '.join(words)}: error {job['error']}")
    assert isinstance(job, dict)
    return job


def measure(uri: str, job: Job, size_bytes: int, seconds: float) -> Figures:
    timed = ("--time_based", f"--runtime={seconds}", *job.options)
    found = run(uri, timed, size_bytes, seconds + 60)
    part = found[job.kind]
    p50, p99 = (part["lat_ns"]["percentile"][f"{percent:.6f}"] / 1000 for percent in (50, 99))
    if job.synced:
        sync = found["sync"]["lat_ns"]["percentile"]
        p50, p99 = p50 + sync["50.000000"] / 1000, p99 + sync["99.000000"] / 1000
    return Figures(p50, p99, part["iops"], part["bw_bytes"])


def fill(uri: str, size_bytes: int, offset_bytes: int = 0) -> None:
    """Write every byte once, with data that can't be compressed."""
    options = ("--rw=write", "--bs=1m", "--iodepth=4", f"--offset={offset_bytes}", "--end_fsync=1")
    run(uri, options, size_bytes, 300)
