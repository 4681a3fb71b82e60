"""Dialling a host that is silent (a cut link) takes long; a session that comes from there must not wait for it."""

import threading
from pathlib import Path

import pytest

from mirror import peer
from mirror.core.errors import LinkLost
from mirror.link import Stream
from tests.pair import PATIENCE_S, cut_until_in_step, free_port, pair, session_of, stop, wait_ended

NOBODY = free_port()


def test_a_session_ends_while_its_replica_dials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cleaned up at once: the next one can begin, and a stop is in order."""
    really, given_up = peer.dial, threading.Event()
    diallers: list[threading.Thread] = []

    def dial(address: tuple[str, int], timeout_s: float) -> Stream:
        if address[1] != NOBODY:
            return really(address, timeout_s)
        diallers.append(threading.current_thread())
        given_up.wait()
        raise LinkLost("nobody answered")

    monkeypatch.setattr(peer, "dial", dial)
    listen_a, listen_b = free_port(), free_port()
    try:
        with pair(tmp_path, ports=(listen_a, listen_b, listen_b, NOBODY)) as (first, second):
            cut_until_in_step(first, second)
            session = session_of(second)
            assert stop(first)
            wait_ended(second, session)
            assert stop(second)
            assert len(diallers) == 1
    finally:
        given_up.set()
        for thread in diallers:
            thread.join(PATIENCE_S)
