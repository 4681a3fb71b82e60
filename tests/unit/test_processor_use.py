"""What the processors do: seconds that were scarce are kept, a process that computes is seen, and no error ends it."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mirror.core.errors import ProtocolError
from mirror.runtime import Runtime
from nbd_server import processor, slowness
from nbd_server.processor import EVERY_S, KEPT, Processor, Use, of_peer
from nbd_server.volume import Volume
from tests.pair import pair


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


# -- the peer's -------------------------------------------------------------------------------------------------------

USE: dict[str, Any] = {"own_cores": 0.25, "idle_percent": 3, "runnable": 7}
TOLD: dict[str, Any] = {"cores": 2, **USE, "before": [{"began_ago_s": 9.5, "ended_ago_s": 8.5, **USE}]}


@pytest.mark.parametrize(
    "told",
    [
        *("text", 7, [], {}, {**TOLD, "before": None}, {**TOLD, "before": TOLD["before"] * (KEPT + 1)}),
        *({**TOLD, "before": [one]} for one in (None, 7, USE)),
        *({**TOLD, "before": [{**TOLD["before"][0], "began_ago_s": began}]} for began in ("9.5", 8.4, -1, 1e300)),
        *({**TOLD, "cores": cores} for cores in (0, -1, None, True, "2", 1.5, 10**7)),
        *({**TOLD, "own_cores": cores} for cores in (None, True, 1e300, float("nan"), float("inf"))),
        *({**TOLD, "idle_percent": percent} for percent in (-1, 101, 3.5)),
    ],
)
def test_what_a_peer_can_not_mean(told: Any) -> None:
    with pytest.raises(ProtocolError):
        of_peer(told)


def test_what_a_peer_says_beyond_it_is_left_out() -> None:
    assert of_peer({**TOLD, "more": "words"}) == of_peer(TOLD) == TOLD
    assert of_peer(None) is None


def facts_of(volume: Volume) -> dict[str, Any]:
    return slowness.of_server(volume._replica, volume._primary, volume._peer, volume.status())


def test_a_primary_asks_its_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Processor()
    monkeypatch.setattr(slowness, "PROCESSOR", seen)
    with pair(tmp_path) as (first, second):
        assert facts_of(first)["peer_processor"] is None, "nobody has looked yet"
        now_s = time.perf_counter()
        seen._uses.append(Use(now_s - 30.0, now_s - 29.0, 0.25, 3, 7))
        assert facts_of(first)["peer_processor"] is None, "nobody has looked lately"
        seen._uses.append(Use(now_s - 1.0, now_s, 0.1, 90, 1))
        found = facts_of(first)["peer_processor"]
        assert (found["cores"], found["idle_percent"]) == (os.cpu_count(), 90)
        [before] = found["before"]
        assert 29.0 <= before["ended_ago_s"] < before["began_ago_s"]
        assert facts_of(second)["peer_processor"] is None, "it waits for no peer"


def test_a_peer_of_an_older_release_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair(tmp_path) as (first, second):
        really = second._answer_peer

        def answer(session: Any, message: dict[str, Any]) -> Any:
            return really(session, {**message, "op": "unheard of"} if message["op"] == "processor" else message)

        assert second._peer is not None
        monkeypatch.setattr(second._peer, "_on_control", answer)
        found = facts_of(first)
        assert found["peer_processor"] is None
        assert found["cause"] == "nothing"
