"""A session that can't be put in place. No thread or descriptor: that is said, it is tried again later, and nothing of
it is left. A request that hangs: nobody else is held up."""

import errno
import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mirror.core import backoff
from mirror.core.states import ConnectionState
from mirror.peer import STILL_RUNNING
from nbd_server.volume import Volume
from tests.pair import PATIENCE_S, pair, peer_of, session_of, wait_ended, wait_in_step

DATA = memoryview(b"\x5a" * 4096)
THREADS = (
    *("sender-0", "sender-1", "reaper", "apply", "apply-0", "apply-3", "resync-apply", "resync-apply-1"),
    *("control", "monitor", "verify", "resync-0", "resync-1"),
)
# One of the reaper, two of the receivers.
POLLERS = (1, 2, 3)


def what_there_is() -> tuple[Counter[str], int]:
    """Threads by name, and how many descriptors."""
    return Counter(thread.name for thread in threading.enumerate()), len(os.listdir("/proc/self/fd"))


@dataclass
class Apart:
    """Two replicas without a session, `first` of which is to fail; the primary, it has written alone."""

    first: Volume
    second: Volume
    meet: Callable[[], None]
    there_is: tuple[Counter[str], int]
    # The thread in which `first` attaches.
    attaches_in: str

    def wait_failed(self) -> None:
        peer = peer_of(self.first)
        with peer.changed:
            assert peer.changed.wait_for(
                lambda: peer.retry.backoff.failures and peer.state is ConnectionState.CONNECTING, PATIENCE_S
            )
            assert peer.session is None

    def wait_nothing_left(self) -> None:
        """As before they met; what was being greeted or turned away ends soon."""
        deadline_s = time.monotonic() + PATIENCE_S
        while (found := what_there_is()) != self.there_is:
            assert time.monotonic() < deadline_s, (self.there_is, found)
            os.sched_yield()


@pytest.fixture(params=["dials", "is dialled"])
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Apart]:
    # Not before somebody says so.
    monkeypatch.setattr(backoff, "PLAN_RETRY_FIRST_S", 3600.0)
    monkeypatch.setattr(backoff, "PLAN_RETRY_MAX_S", 3600.0)
    with pair(tmp_path, "B") as (first, second):
        dialler, other = (first, second) if request.param == "dials" else (second, first)
        may_meet = threading.Event()
        really = peer_of(dialler)._may_dial
        monkeypatch.setattr(peer_of(dialler), "_may_dial", lambda: may_meet.is_set() and really())
        monkeypatch.setattr(peer_of(other), "_may_dial", lambda: False)
        sessions = [(volume, session_of(volume)) for volume in (first, second)]
        session_of(first).end("a test parts them")
        for volume, session in sessions:
            wait_ended(volume, session)
        # What is resynced then needs threads too.
        first.write(DATA, 0, False)

        def meet() -> None:
            may_meet.set()
            peer_of(dialler).redial()

        yield Apart(first, second, meet, what_there_is(), "dial" if dialler is first else "greeting")


def refuse(monkeypatch: pytest.MonkeyPatch, apart: Apart, owner: Any, name: str, error: Exception, number: int) -> None:
    """The system refuses the call of this number that `first` makes while it attaches."""
    really = getattr(owner, name)
    calls = []

    def call(*arguments: Any) -> Any:
        if threading.current_thread().name == apart.attaches_in:
            calls.append(arguments)
            if len(calls) == number:
                raise error
        return really(*arguments)

    monkeypatch.setattr(owner, name, call)


def refuse_thread(monkeypatch: pytest.MonkeyPatch, apart: Apart, name: str) -> None:
    really = threading.Thread.start
    refused = []

    def start(thread: threading.Thread) -> None:
        if thread.name == name and threading.current_thread().name == apart.attaches_in and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        really(thread)

    monkeypatch.setattr(threading.Thread, "start", start)


def check(apart: Apart, why: str) -> None:
    """It failed, says so, left nothing behind, takes writes meanwhile, and comes back at the operator's word."""
    first = apart.first
    apart.meet()
    apart.wait_failed()
    shown = first.status()
    assert why in shown["retry"]["reason"]
    assert shown["retry"]["failures"] == 1
    assert any(why in warning for warning in shown["warnings"])
    first.write(DATA, 8192, False)
    apart.wait_nothing_left()
    assert first.running() == 0
    peer_of(first).connect(False)
    for volume in (first, apart.second):
        wait_in_step(volume)
    content = memoryview(bytearray(len(DATA)))
    for offset in (0, 8192):
        apart.second._replica.store.read_into(content, offset)
        assert content == DATA
    assert first.status()["retry"] is None


@pytest.mark.parametrize("name", THREADS)
def test_no_thread_for_it(apart: Apart, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    refuse_thread(monkeypatch, apart, name)
    check(apart, f"can't start the thread {name!r}: can't start new thread")


@pytest.mark.parametrize("number", POLLERS)
@pytest.mark.parametrize(("owner", "call"), [(select, "epoll"), (socket, "socketpair")])
def test_no_descriptor_for_a_poller(
    apart: Apart, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str, number: int
) -> None:
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    refuse(monkeypatch, apart, owner, call, error, number)
    check(apart, "can't wait for what the peer sends: Too many open files")


@pytest.mark.parametrize("what", ["read_into", "write", "flush"])
def test_a_request_that_hangs_holds_up_no_other(apart: Apart, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    first, store = apart.first, apart.first._replica.store
    really, hangs, goes_on = getattr(store, what), threading.Event(), threading.Event()
    paused: list[float] = []

    def call(*arguments: Any) -> Any:
        if not hangs.is_set():
            hangs.set()
            assert goes_on.wait(PATIENCE_S)
        return really(*arguments)

    def pause(timeout_s: float) -> bool:
        paused.append(timeout_s)
        return type(first._primary).pause(first._primary, timeout_s)

    requests: dict[str, Callable[[], None]] = {
        "read_into": lambda: first.read_into(memoryview(bytearray(4096)), 0),
        "write": lambda: first.write(DATA, 0, False),
        "flush": first.flush,
    }
    monkeypatch.setattr(store, what, call)
    monkeypatch.setattr(first._primary, "pause", pause)
    thread = threading.Thread(target=requests[what])
    thread.start()
    assert hangs.wait(PATIENCE_S)
    apart.meet()
    apart.wait_failed()
    assert first.status()["retry"]["reason"] == STILL_RUNNING
    assert not paused
    goes_on.set()
    thread.join(PATIENCE_S)
    # Either side has seen the plan fail.
    for volume in (first, apart.second):
        peer_of(volume).connect(False)
    for volume in (first, apart.second):
        wait_in_step(volume)
    assert paused


def test_it_comes_back_by_itself(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "PLAN_RETRY_FIRST_S", 0.1)
    refuse_thread(monkeypatch, apart, "control")
    apart.meet()
    for volume in (apart.first, apart.second):
        wait_in_step(volume)
