"""On what it was measured: figures without their machine say nothing."""

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.processes import pause
from bench.servers import find_nbdkit

Facts = dict[str, str | int | float]


def first_line(words: list[str | Path]) -> str:
    try:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        return "not there"
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def ticks() -> list[int]:
    """Of all cores since the machine started: user, nice, system, idle, iowait, irq, softirq, steal."""
    return [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


def _spent(since: list[int]) -> list[int]:
    return [after - before for after, before in zip(ticks(), since, strict=True)]


def idle_percent() -> float:
    """Of all cores, for a second, before anything was started."""
    before = ticks()
    pause(1)
    spent = _spent(before)
    return 100 * spent[3] / max(sum(spent), 1)


def stolen_percent(since: list[int]) -> float:
    """Of what a virtual machine's cores wanted to run since then, what their host gave to others."""
    spent = _spent(since)
    return 100 * spent[7] / max(sum(spent) - spent[3] - spent[4], 1)


@contextlib.contextmanager
def timing(settings: dict[str, Any]) -> Iterator[None]:
    """Into them, however it ends: how many minutes it took, and what the host took from the machine meanwhile."""
    begin_s, before = time.monotonic(), ticks()
    try:
        yield
    finally:
        settings["minutes"] = round((time.monotonic() - begin_s) / 60, 1)
        settings["stolen_percent"] = round(stolen_percent(before), 1)


def facts(directory: Path) -> Facts:
    """Machine, kernel, versions, and where the copies stand."""
    root = Path(__file__).resolve().parent.parent
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "idle_before_percent": round(idle_percent()),
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "python": platform.python_version(),
        "nbdkit": first_line([find_nbdkit(), "--version"]),
        "qemu": first_line(["qemu-storage-daemon", "--version"]),
        "fio": first_line(["fio", "--version"]),
        "filesystem": first_line(["findmnt", "--noheadings", "--output", "FSTYPE,SOURCE", "--target", directory]),
        "commit": first_line(["git", "-C", root, "describe", "--always", "--dirty"]),
    }
