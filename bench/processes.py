"""Processes that the benchmark starts, waits for and ends, by their ids; and what they cost."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

START_LIMIT_S = 20.0
STOP_LIMIT_S = 10.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_pause = threading.Event()


class BenchError(Exception):
    """A server or fio did not do what the benchmark needs; the message says which and why."""


class Unavailable(BenchError):
    """This machine or this version can't do what is to be measured: its rows are shown as not available."""


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = START_LIMIT_S, every_s: float = 0.02) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise BenchError(f"not within {timeout_s:g} s: {what}")
        _pause.wait(every_s)
    return value


def pause(seconds: float) -> None:
    """Let what was started go on for so long: a length of a measurement, never a wait for something."""
    _pause.wait(seconds)


def command(words: Sequence[str | Path], timeout_s: float = 60.0) -> str:
    """What it printed. BenchError when it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(map(str, words))}: exit {done.returncode}: {done.stderr.strip()[-1000:]}")
    return done.stdout


def start(words: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    """A process in a session of its own: Ctrl-C reaches the benchmark alone, which then ends all in order."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL for what is left of its session."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_LIMIT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that never give up a core of their own accord."""
    with contextlib.ExitStack() as cleanup:
        for _ in range(count):
            loop = subprocess.Popen(["sh", "-c", "while :; do :; done"], start_new_session=True)
            cleanup.callback(loop.wait)
            cleanup.callback(loop.kill)
        yield


def family(pid: int) -> list[int]:
    """The process and its children."""
    found = [pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def cpu_seconds(pid: int) -> float:
    """Of a process and its children, in user and system mode, until now."""
    ticks = 0
    for member in family(pid):
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


def peak_memory_mib(pid: int) -> float:
    """The most resident memory that a process or one of its children ever had."""
    peaks = []
    for member in family(pid):
        lines = Path(f"/proc/{member}/status").read_text().splitlines()
        peaks += [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")]
    return max(peaks)
