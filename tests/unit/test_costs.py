"""What makes it fast, in counts instead of times: system calls, messages, calls of functions and memory a request.

A slow machine changes none of them, so they are held to the figures of docs/performance.md. Counted by a profile
function in the thread that writes, on the primary, in those that apply, on its secondary, and in all others, where
nothing of a request may happen. Nobody spins, or the number of looks at a socket would be chance.
"""

import contextlib
import math
import re
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mirror.core.limits import EXTENT_BYTES
from mirror.core.spin import Spin
from mirror.store import data_file
from nbd_server.volume import Volume
from tests.pair import pair, peer_of

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_CALLS = (
    *("pread", "preadv", "pwrite", "pwritev", "sync_file_range", "fdatasync", "fsync", "ftruncate", "lseek"),
    *("sendall", "sendmsg", "recv_into", "poll"),
)
SENDS = ("sendall", "sendmsg")
# Of so many of a kind; one more or less on either side is the beginning of the next request, and a few more are chance.
COUNT, STRAY = 50, 10
SIDES = ("primary", "secondary")
ELSEWHERE = "elsewhere"
DATA, READ = memoryview(b"\xa5" * 4096), memoryview(bytearray(4096))
# What a write may call at most, of Python's functions and the interpreter's own; a new one has to be worth it.
CALLS_MAX = {"primary": 85, "secondary": 50}
# New memory that a request needs at most while it runs, in bytes, on both sides together. Less than its payload means
# that nobody copies that into memory of its own.
MEMORY_MAX = {
    "a hot write": 2048,
    "a cold write": 32768,
    "a FUA write": 2048,
    "a write and a flush": 2048,
    "a write of 1 MiB": 65536,
    "a read": 1024,
}


class Counts:
    """A profile function; counts while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.system = {side: Counter[str]() for side in (*SIDES, ELSEWHERE)}
        self.calls: Counter[str] = Counter()

    def __call__(self, frame: FrameType, event: str, what: Any) -> None:
        if not self.on or event not in ("call", "c_call"):
            return
        name = threading.current_thread().name
        side = "primary" if name == "MainThread" else "secondary" if name.startswith("apply") else ELSEWHERE
        self.calls[side] += 1
        called = what.__name__ if event == "c_call" else frame.f_code.co_name
        if called in SYSTEM_CALLS:
            self.system[side][called] += 1

    def of(self, request: Callable[[int], None]) -> dict[str, dict[str, int]]:
        """System calls of one request by side."""
        for counter in (*self.system.values(), self.calls):
            counter.clear()
        self.on = True
        for number in range(COUNT):
            request(number)
        self.on = False
        # Others beat and compare now and then, by the clock.
        elsewhere = {name: n for name, n in self.system[ELSEWHERE].items() if n >= COUNT / 2}
        assert not elsewhere, f"a thread that nobody counts does part of a request: {elsewhere}"
        # A call more in one request of some counts; one look of a receiver that was just going to sleep does not.
        return {
            side: {name: math.ceil((n - STRAY) / COUNT) for name, n in self.system[side].items() if n > STRAY}
            for side in SIDES
        }


@contextlib.contextmanager
def unwatched_pair(tmp_path: Path) -> Iterator[Volume]:
    """The primary of a pair that does nothing but what it is asked, with some extents in its log."""
    with pair(tmp_path, size_bytes=(COUNT + 1) * EXTENT_BYTES) as (first, _):
        first._primary.spin = Spin("off")
        # Nothing is compared beside it: not from now on, nor any more.
        peer_of(first).verifier.proof.end()
        with first._primary.request_alone(0, first.size_bytes):
            pass
        # What a write costs that nobody looks at; a slow one would have the next ones looked at.
        first._trace.spans.mask, first._trace.spans.slow_ns = -1, 1 << 60
        for number in range(16):
            first.write(DATA, number * 4096, False)
        yield first


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Volume, Counts]]:
    begin_write_back = data_file._libc_sync_file_range

    def sync_file_range(*arguments: int) -> int:
        """A profile function does not see what ctypes calls."""
        return int(begin_write_back(*arguments))

    monkeypatch.setattr(data_file, "_libc_sync_file_range", sync_file_range)
    counts = Counts()
    threading.setprofile(counts)
    try:
        with unwatched_pair(tmp_path) as first:
            sys.setprofile(counts)
            try:
                yield first, counts
            finally:
                sys.setprofile(None)
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]


REQUESTS: dict[str, Callable[[Volume], Callable[[int], None]]] = {
    "a hot write": lambda volume: lambda number: volume.write(DATA, number % 16 * 4096, False),
    # Each of an extent that was not written before, none behind the last one, or they would be logged ahead.
    "a cold write": lambda volume: lambda number: volume.write(DATA, (number * 7 % COUNT + 1) * EXTENT_BYTES, False),
    "a FUA write": lambda volume: lambda number: volume.write(DATA, number % 16 * 4096, True),
    "a write and a flush": lambda volume: lambda number: (volume.write(DATA, 0, False), volume.flush())[1],
    "a read": lambda volume: lambda number: volume.read_into(READ, 0),
}


def warmed(name: str, request: Callable[[int], None]) -> Callable[[int], None]:
    """A client's habit, to flush say, is known after a few requests; what is cold must not be touched before."""
    if name != "a cold write":
        for number in range(16):
            request(number)
    return request


def documented() -> dict[str, dict[str, dict[str, int]]]:
    """The table of docs/performance.md: request -> side -> system call -> how many."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    text = (ROOT / "docs" / "performance.md").read_text().partition("## Counts")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (an? .*?) \| (.*?) \| (.*?) \| \d+ \|$", text, re.MULTILINE):
        sides = [{name: int(n) for n, name in re.findall(r"(\d+) (\w+)", cell)} for cell in row[1:]]
        found[row[0]] = dict(zip(SIDES, sides, strict=True))
    return found


@pytest.mark.parametrize("name", REQUESTS)
def test_system_calls(counted: tuple[Volume, Counts], name: str) -> None:
    volume, counts = counted
    request = warmed(name, REQUESTS[name](volume))
    assert counts.of(request) == documented()[name]


def test_function_calls(counted: tuple[Volume, Counts]) -> None:
    volume, counts = counted
    rounds = []
    for _ in range(3):
        counts.of(REQUESTS["a hot write"](volume))
        rounds.append({side: counts.calls[side] / COUNT for side in SIDES})
    # Who meets another thread at a lock waits, which is a call or two.
    found = {side: min(one[side] for one in rounds) for side in SIDES}
    assert {side: found[side] <= CALLS_MAX[side] for side in SIDES} == dict.fromkeys(SIDES, True), found


@pytest.mark.parametrize("name", MEMORY_MAX)
def test_memory(tmp_path: Path, name: str) -> None:
    large = memoryview(bytes(1 << 20))
    requests = {
        **REQUESTS,
        "a write of 1 MiB": lambda volume: lambda number: volume.write(large, number % 16 << 20, False),
    }
    with unwatched_pair(tmp_path) as volume:
        request = warmed(name, requests[name](volume))
        tracemalloc.start()
        try:
            peaks = []
            for number in range(COUNT):
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                request(number)
                peaks.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            tracemalloc.stop()
    # What other threads do meanwhile is in some of them.
    assert sorted(peaks)[COUNT // 5] <= MEMORY_MAX[name], sorted(peaks)


def test_messages() -> None:
    """One there and one back, whatever is asked; a flush goes with the write before it, and is answered by itself."""
    messages = {"a hot write": 2, "a cold write": 2, "a FUA write": 2, "a write and a flush": 3, "a read": 0}
    found = {
        name: sum(n for side in SIDES for call, n in sides[side].items() if call in SENDS)
        for name, sides in documented().items()
    }
    assert found == messages
