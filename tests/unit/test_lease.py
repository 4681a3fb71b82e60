"""Who may attach: one client at a time, the next one once the last connection of the former is drained."""

import errno
import threading
from collections.abc import Callable

import pytest

from mirror.runtime import Runtime
from nbd_server import lease as lease_module
from nbd_server.lease import Lease, Refused

LIMIT_S = 10.0


class WatchedCondition(threading.Condition):
    """Says when a thread has begun to wait, so that a test can go on from there without guessing."""

    def __init__(self) -> None:
        super().__init__(threading.Lock())
        self.waits = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.release()  # still under the lock: whoever takes the lock after this finds a thread that waits
        return super().wait(timeout)


class WatchedRuntime(Runtime):
    def __init__(self) -> None:
        self.changed = WatchedCondition()

    def condition(self, lock: object = None) -> WatchedCondition:  # type: ignore[override]
        return self.changed


class Attempt:
    """An admit on a thread of its own, and how it ended."""

    def __init__(self, lease: Lease, client: str, connection: object) -> None:
        self.refusal: Refused | None = None
        self._thread = threading.Thread(target=self._run, args=(lambda: lease.admit(client, connection),))
        self._thread.start()

    def _run(self, admit: Callable[[], None]) -> None:
        try:
            admit()
        except Refused as refusal:
            self.refusal = refusal

    def admitted(self) -> bool:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        return self.refusal is None

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()


@pytest.fixture
def runtime() -> WatchedRuntime:
    return WatchedRuntime()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is refused for the slowness of the machine that tests."""
    monkeypatch.setattr(lease_module, "ATTACH_WAIT_S", LIMIT_S)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "ATTACH_WAIT_S", 0.01)


def begun_to_wait(runtime: WatchedRuntime) -> None:
    assert runtime.changed.waits.acquire(timeout=LIMIT_S)


def test_one_client_has_many_connections_without_waiting(runtime: WatchedRuntime) -> None:
    lease = Lease(runtime)
    for connection in "abc":
        lease.admit("process 1", connection)
    assert lease.clients() == {"process 1": 3}
    assert not runtime.changed.waits.acquire(blocking=False)


@pytest.mark.usefixtures("hasty")
def test_another_client_is_refused_and_told_who_holds_the_volume(runtime: WatchedRuntime) -> None:
    lease = Lease(runtime)
    lease.admit("process 1", "a")
    with pytest.raises(Refused, match=r"another client is attached: process 1 with 1 connection;") as refusal:
        lease.admit("process 2", "b")
    assert refusal.value.errno == errno.EBUSY
    assert refusal.value.remedy
    lease.admit("process 1", "c")
    with pytest.raises(Refused, match=r"process 1 with 2 connections;"):
        lease.admit("process 2", "b")
    assert lease.clients() == {"process 1": 2}


@pytest.mark.usefixtures("patient")
def test_the_next_client_comes_in_when_the_last_connection_is_drained_and_not_before(runtime: WatchedRuntime) -> None:
    lease = Lease(runtime)
    lease.admit("process 1", "a")
    lease.admit("process 1", "b")
    second = Attempt(lease, "process 2", "c")
    begun_to_wait(runtime)
    assert not lease.leave("process 1", "a")
    assert second.waits
    assert lease.clients() == {"process 1": 1}
    assert lease.leave("process 1", "b")
    assert second.admitted()
    assert lease.clients() == {"process 2": 1}


@pytest.mark.usefixtures("patient")
def test_of_two_that_wait_one_comes_in_and_the_other_after_it(runtime: WatchedRuntime) -> None:
    lease = Lease(runtime)
    lease.admit("process 1", "a")
    attempts = {client: Attempt(lease, client, "x") for client in ("process 2", "process 3")}
    begun_to_wait(runtime)
    begun_to_wait(runtime)
    lease.leave("process 1", "a")
    begun_to_wait(runtime)  # the one that lost waits on
    (winner,) = lease.clients()
    (loser,) = set(attempts) - {winner}
    assert attempts[winner].admitted()
    assert attempts[loser].waits
    lease.leave(winner, "x")
    assert attempts[loser].admitted()


@pytest.mark.usefixtures("patient")
def test_a_client_that_waits_lets_the_holder_open_more(runtime: WatchedRuntime) -> None:
    lease = Lease(runtime)
    lease.admit("process 1", "a")
    second = Attempt(lease, "process 2", "c")
    begun_to_wait(runtime)
    lease.admit("process 1", "b")
    lease.leave("process 1", "a")
    assert second.waits
    lease.leave("process 1", "b")
    assert second.admitted()


def test_shared_lets_everybody_in_and_counts(runtime: WatchedRuntime) -> None:
    lease = Lease(runtime, shared=True)
    lease.admit("process 1", "a")
    lease.admit("process 2", "b")
    lease.admit("process 2", "c")
    assert lease.clients() == {"process 1": 1, "process 2": 2}
    lease.leave("process 1", "a")
    assert lease.clients() == {"process 2": 2}


def test_leaving_twice_is_a_bug(runtime: WatchedRuntime) -> None:
    lease = Lease(runtime)
    lease.admit("process 1", "a")
    lease.leave("process 1", "a")
    with pytest.raises(KeyError):
        lease.leave("process 1", "a")
