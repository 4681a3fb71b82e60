"""Threads are moved as the placement says, all but the first, and never to a core that this process may not use."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from mirror.core.placement import WINDOW_NS, Placement
from nbd_server.cores import Cores

ALLOWED = os.sched_getaffinity(0)


@pytest.fixture
def thread() -> Iterator[int]:
    """Another thread of this process, as the kernel names it."""
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    try:
        assert other.native_id is not None
        yield other.native_id
    finally:
        for one in map(int, os.listdir("/proc/self/task")):
            os.sched_setscheduler(one, os.SCHED_OTHER, os.sched_param(0))
            os.sched_setaffinity(one, ALLOWED)
        end.set()
        other.join()


def looks(monkeypatch: pytest.MonkeyPatch, setting: str, said: bool) -> list[bool]:
    """One window is over and the placement says `said`; what was told."""
    told: list[bool] = []
    monkeypatch.setattr(Placement, "window", lambda *_: said)
    cores = Cores(setting, told.append)
    cores._began_ns = time.perf_counter_ns() - WINDOW_NS
    cores.look(16, 1)
    return told


def test_gathered_on_one_core_that_is_allowed(monkeypatch: pytest.MonkeyPatch, thread: int) -> None:
    told = looks(monkeypatch, "auto", True)
    first, moved = os.sched_getaffinity(os.getpid()), os.sched_getaffinity(thread)
    assert first == ALLOWED
    assert os.sched_getscheduler(os.getpid()) == os.SCHED_OTHER
    assert os.sched_getscheduler(thread) == (os.SCHED_BATCH if len(ALLOWED) > 1 else os.SCHED_OTHER)
    # A process that may use one core only has nothing to choose.
    assert (told, len(moved)) == ([True] if len(ALLOWED) > 1 else [], 1)
    assert moved <= ALLOWED


def test_any_leaves_the_threads_alone(monkeypatch: pytest.MonkeyPatch, thread: int) -> None:
    assert looks(monkeypatch, "any", True) == []
    assert os.sched_getaffinity(thread) == ALLOWED


def test_back_to_all_that_are_allowed(monkeypatch: pytest.MonkeyPatch, thread: int) -> None:
    monkeypatch.setattr(Placement, "window", lambda *_: True)
    cores = Cores("auto", lambda _: None)
    for said in (True, False):
        monkeypatch.setattr(Placement, "window", lambda *_, said=said: said)
        cores._began_ns = time.perf_counter_ns() - WINDOW_NS
        cores.look(16, 1)
    assert os.sched_getaffinity(thread) == ALLOWED
    assert os.sched_getscheduler(thread) == os.SCHED_OTHER


@pytest.mark.skipif(len(ALLOWED) < 2, reason="one core only")
def test_a_class_that_the_operator_chose_stays(monkeypatch: pytest.MonkeyPatch, thread: int) -> None:
    for one in (os.getpid(), thread):
        os.sched_setscheduler(one, os.SCHED_BATCH, os.sched_param(0))
    cores = Cores("auto", lambda _: None)
    for said in (True, False):
        monkeypatch.setattr(Placement, "window", lambda *_, said=said: said)
        cores._began_ns = time.perf_counter_ns() - WINDOW_NS
        cores.look(16, 1)
        assert (len(os.sched_getaffinity(thread)) == 1) is said
        assert os.sched_getscheduler(thread) == os.SCHED_BATCH


def test_without_clients_the_threads_run_anywhere_and_nothing_of_them_is_remembered(
    monkeypatch: pytest.MonkeyPatch, thread: int
) -> None:
    told: list[bool] = []
    cores = Cores("auto", told.append)
    with monkeypatch.context() as patch:
        patch.setattr(Placement, "window", lambda *_: True)
        cores._began_ns = time.perf_counter_ns() - WINDOW_NS
        cores.look(16, 3)
    before = cores._placement
    for _ in range(2):
        cores.let_go()
        assert os.sched_getaffinity(thread) == ALLOWED
        assert told == ([True, False] if len(ALLOWED) > 1 else [])
    assert cores._placement is not before


def test_no_look_before_a_window_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placement, "window", lambda *_: pytest.fail("too early"))
    cores = Cores("auto", lambda _: None)
    cores._began_ns = time.perf_counter_ns() + WINDOW_NS
    cores.look(16, 1)


def test_nothing_that_goes_wrong_becomes_the_answer_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    really_list = os.listdir

    def listdir(path: str) -> list[str]:
        if path == "/proc/self/task":
            raise OSError(24, "Too many open files")
        return really_list(path)

    monkeypatch.setattr(os, "listdir", listdir)
    if len(ALLOWED) > 1:
        assert looks(monkeypatch, "auto", True) == [True]


@pytest.mark.skipif(len(ALLOWED) < 2, reason="one core only")
def test_what_the_operator_says_later_holds(monkeypatch: pytest.MonkeyPatch, thread: int) -> None:
    cores = Cores("auto", lambda _: None)
    one = {min(ALLOWED)}
    os.sched_setaffinity(os.getpid(), one)
    os.sched_setaffinity(thread, one)
    for said in (True, False):
        monkeypatch.setattr(Placement, "window", lambda *_, said=said: said)
        cores._began_ns = time.perf_counter_ns() - WINDOW_NS
        cores.look(16, 1)
        assert os.sched_getaffinity(thread) == one
