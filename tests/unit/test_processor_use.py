"""What the processors do: seconds that were scarce are kept, a process that computes is seen, and no error ends it."""

import os
import threading
import time
from typing import Any

import pytest

from mirror.runtime import Runtime
from nbd_server import processor
from nbd_server.processor import EVERY_S, Processor, Use


@pytest.mark.parametrize(
    ("idle_percent", "own_cores", "is_scarce"), [(50, 0.1, False), (6, 0.84, False), (5, 0.1, True), (40, 0.85, True)]
)
def test_what_is_scarce(idle_percent: int, own_cores: float, is_scarce: bool) -> None:
    assert Use(0.0, 1.0, own_cores, idle_percent, 1).is_scarce is is_scarce


def compute_until_seen(seen: Processor) -> list[dict[str, Any]]:
    """The process's own time counts, however busy the machine is."""
    end_s = time.perf_counter() + 60 * EVERY_S
    while not (before := seen.report()["before"]) and time.perf_counter() < end_s:
        until_s = time.perf_counter() + 2 * EVERY_S
        while time.perf_counter() < until_s:
            sum(range(100_000))
    return before  # type: ignore[no-any-return]


def test_one_that_computes_is_seen_afterwards() -> None:
    seen = Processor()
    assert set(seen.report()) == {"cores", "own_cores", "idle_percent", "runnable", "before"}
    assert seen.report()["before"] == []
    seen.start(Runtime())
    latest = compute_until_seen(seen)[0]
    assert latest["began_ago_s"] > latest["ended_ago_s"] >= 0
    assert latest["runnable"] >= 1


def test_a_look_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no descriptor is left it was the last one."""
    failures: list[OSError] = []
    really = processor._read

    def read() -> Any:
        if len(failures) < 2 and threading.current_thread() is not threading.main_thread():
            failures.append(OSError(24, os.strerror(24)))
            raise failures[-1]
        return really()

    monkeypatch.setattr(processor, "_read", read)
    seen = Processor()
    seen.start(Runtime())
    assert compute_until_seen(seen)
    assert len(failures) == 2
