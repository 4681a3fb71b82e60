"""Processes, ports and conditions: what a test starts, it waits for, with a time limit, and ends by pid."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Below the range that Linux takes ports of outgoing connections from, so that none of those sits on a port we hand out.
FIRST_PORT, LAST_PORT = 20000, 32000
_ports_given: set[int] = set()
_never = threading.Event()


def wait_for(condition: Callable[[], T | None], timeout_s: float = 10.0, what: str = "", every_s: float = 0.01) -> T:
    """Poll `condition` until it is true and return its value; AssertionError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or condition}")
        _never.wait(every_s)


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on and that this test run has not handed out before."""
    for _ in range(1000):
        port = random.SystemRandom().randint(FIRST_PORT, LAST_PORT)
        if port in _ports_given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
        _ports_given.add(port)
        return port
    raise AssertionError("no free port found")


def process_state(pid: int) -> str:
    """The letter of /proc/PID/stat (R, S, D, T, Z ...), or "" when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return stat.rpartition(")")[2].split()[0]


def stands_still(pid: int) -> bool:
    """True once SIGSTOP has taken effect, or the process is gone."""
    return process_state(pid) in ("T", "")


def children_of(pid: int) -> list[int]:
    """Process ids of the children of a process, by reading /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = stat.rpartition(")")[2].split()
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(entry.name))
    return sorted(found)


def command_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _gone(pid: int) -> bool:
    """True when the process ended; a zombie that this process inherited (it is a subreaper) is taken off."""
    state = process_state(pid)
    if state == "Z":
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        return True
    return state == ""


def wait_gone(pid: int, timeout_s: float = 10.0) -> None:
    wait_for(lambda: _gone(pid), timeout_s, f"process {pid} ({command_name(pid)}) to end")


def signal_quietly(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process id that this test started; it may have ended already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def run(command: Sequence[str | Path], timeout_s: float = 30.0, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; AssertionError with what it said when it fails or is too slow."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, check=False, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as late:
        raise AssertionError(
            f"{' '.join(words)}: no end within {timeout_s} s; said {late.stdout!r} {late.stderr!r}"
        ) from late
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(words)}: exit {done.returncode}\nstdout: {done.stdout}\nstderr: {done.stderr}")
    return done
