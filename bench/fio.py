"""fio's nbd engine against a server: one run and its figures, or a client that writes until it is told to stop."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

from bench import processes
from bench.figures import Round
from bench.processes import BenchError

STOP_LIMIT_S = 30.0


def words(uri: str, options: tuple[str, ...]) -> list[str]:
    # Without the pair of percentiles half of a request's time is missed: the nbd engine counts submission apart from
    # completion. Without --thread the job is a process that outlives a killed fio.
    return [
        *("fio", "--name=job", "--thread", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"),
        *("--lat_percentiles=1", "--clat_percentiles=0", "--norandommap", "--refill_buffers", *options),
    ]


def run(uri: str, options: tuple[str, ...], timeout_s: float, before: tuple[str, ...] = ()) -> dict[str, Any]:
    """fio's own figures of its one job. BenchError when it reports an error. `before`: the words of what starts it."""
    command = [*before, *words(uri, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr[-1000:]}{done.stdout[-1000:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if job["error"]:
        raise BenchError(f"{' '.join(command)}: error {job['error']}")
    assert isinstance(job, dict)
    return job


def timed(size_bytes: int, seconds: float) -> tuple[str, ...]:
    """For so long, within the first so many bytes."""
    return (f"--size={size_bytes}", "--time_based", f"--runtime={round(seconds * 1000)}ms")


def measure(uri: str, options: tuple[str, ...], limit_s: float) -> Round:
    """Latency of a whole request, submission and completion."""
    return figures_of(run(uri, options, limit_s + 60)["read" if "--rw=randread" in options else "write"])


def figures_of(part: dict[str, Any]) -> Round:
    """Of fio's own, for reads or for writes."""
    latency = part["lat_ns"]
    percentiles = {float(percent): value / 1000 for percent, value in latency["percentile"].items()}
    return Round(
        {
            "p50_us": percentiles[50.0],
            "p99_us": percentiles[99.0],
            "p99_9_us": percentiles[99.9],
            "max_ms": latency["max"] / 1e6,
            "operations_per_s": part["iops"],
            "bytes_per_s": part["bw_bytes"],
        },
        percentiles,
    )


def fill(uri: str, size_bytes: int, offset_bytes: int = 0, seed: int = 1) -> None:
    """Write every byte once, with data that can't be compressed; the same seed makes the same data."""
    where = (f"--offset={offset_bytes}", f"--size={size_bytes}", f"--randseed={seed}")
    run(uri, ("--rw=write", "--bs=1m", "--iodepth=4", "--end_fsync=1", *where), 600)


class Foreground:
    """A client that writes at depth 1 until `stop`, which returns all writes: (when answered in s, latency in us).

    fio takes a second to begin on a busy machine, and before it writes, nothing can be measured or stopped.
    """

    def __init__(self, uri: str, directory: Path, offset_bytes: int, size_bytes: int) -> None:
        self.latencies, self.said = directory / "foreground_lat.1.log", directory / "fio.log"
        self.latencies.unlink(missing_ok=True)
        where = (f"--offset={offset_bytes}", f"--size={size_bytes}")
        job = ("--rw=randwrite", "--bs=4k", "--iodepth=1", "--time_based", "--runtime=600")
        log = f"--write_lat_log={directory / 'foreground'}"
        kept = (log, "--log_unix_epoch=1", "--disable_clat=1", "--disable_slat=1")
        self.process = processes.start(words(uri, (*where, *job, *kept)), self.said)

    def alive(self) -> None:
        """Raises BenchError when it is not."""
        if self.process.poll() is not None:
            raise BenchError(f"fio ended before it was to: {self.said.read_text()[-1000:]}")

    def stop(self) -> list[tuple[float, float]]:
        self.alive()
        self.process.send_signal(signal.SIGINT)  # it writes its log and ends
        self.process.wait(STOP_LIMIT_S)
        if not self.latencies.exists():
            raise BenchError(f"fio wrote no latencies: {self.said.read_text()[-1000:]}")
        writes = []
        for line in self.latencies.read_text().splitlines():
            when_ms, latency_ns = line.split(",")[:2]
            writes.append((int(when_ms) / 1000, int(latency_ns) / 1000))
        return writes

    def end(self) -> None:
        processes.end(self.process)
