"""Protocols A and B where the link ends between a change and the later word on it."""

from pathlib import Path

import pytest

from mirror.core.errors import LinkLost
from mirror.link import Poller, Stream
from tests.pair import pair, session_of

DATA = memoryview(b"\x5a" * 4096)


def test_the_connection_is_lost_as_the_reaper_is_to_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written on this side, in memory on the other: answered, and its range and extent are free again."""
    with pair(tmp_path, "B") as (first, _):
        primary, session = first._primary, session_of(first)

        def refuse(self: Poller, stream: Stream) -> None:
            raise LinkLost("the connection was closed already")

        # Its later word must not come with the first.
        monkeypatch.setattr(Stream, "spin", lambda stream, us: False)
        monkeypatch.setattr(Poller, "add", refuse)
        first.write(DATA, 4096, False)
        assert session.ended
        assert primary.unanswered() == primary.running() == 0
        assert first._replica.log.quiet
        assert first._replica.dirty.is_dirty(4096, 4096)
        first.write(DATA, 4096, False)
