"""The peer stands in for a disk that just failed, for those requests too that came in before."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from mirror.change import Change
from mirror.core.errors import DeviceError
from mirror.core.range_lock import Ticket
from mirror.core.wire import MessageType
from mirror.session import Session
from tests.pair import PATIENCE_S, pair


def test_a_request_waits_while_it_is_being_agreed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came in while the disk was sound, and asks for its extent when it is not."""
    really, asked, go_on = Session.request, threading.Event(), threading.Event()

    def request(self: Session, operation: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        if operation == "primary_disk_failed":
            asked.set()
            assert go_on.wait(PATIENCE_S)
        return really(self, operation, timeout_s, **arguments)

    with pair(tmp_path) as (first, _):
        monkeypatch.setattr(Session, "request", request)
        primary = first._primary
        ticket = primary.lock_range(0, 4096)
        failing = threading.Thread(target=primary.disk_failed, args=(DeviceError("data", "write", errno.EIO, "burnt"),))
        failing.start()
        assert asked.wait(PATIENCE_S)
        assert first._replica.failed
        assert not primary.peer_only
        got: list[tuple[Ticket, int, int]] = []
        change = Change(MessageType.WRITE, 0, 0, 4096)
        waiting = threading.Thread(target=lambda: got.append(primary._hold_cold(change, ticket, 0, 0)))
        waiting.start()
        waiting.join(0.05)
        go_on.set()
        for thread in (failing, waiting):
            thread.join(PATIENCE_S)
        assert got == [(ticket, 0, -1)]
        primary.unlock_range(ticket)
