"""Protocols A and B where the link ends between a change and the later word on it."""

from pathlib import Path
from typing import Any

import pytest

from mirror import confirmer
from mirror.change import Change
from mirror.core.errors import LinkLost
from mirror.core.spin import Spin
from mirror.core.wire import MessageType
from mirror.lending import LENT_BYTES_MIN
from mirror.link import Poller, Stream
from mirror.primary import Primary
from tests.pair import PATIENCE_S, pair, session_of

DATA = memoryview(b"\x5a" * 4096)


def test_the_connection_is_lost_as_the_reaper_is_to_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written on this side, in memory on the other: answered, and its range and extent are free again."""
    with pair(tmp_path, "B") as (first, _):
        primary, session = first._primary, session_of(first)
        # A cold one would be parked.
        first.write(DATA, 0, False)

        def refuse(self: Poller, stream: Stream) -> None:
            raise LinkLost("the connection was closed already")

        # Its later word must not come with the first, nor in its place.
        monkeypatch.setattr(confirmer, "QUICK_BYTES_MAX", 0)
        monkeypatch.setattr(Stream, "spin", lambda stream, us: False)
        monkeypatch.setattr(Poller, "add", refuse)
        first.write(DATA, 4096, False)
        assert session.ended
        # A proof of the two copies may be at work beside it.
        assert primary.drain(PATIENCE_S)
        assert primary.unanswered() == 0
        assert first._replica.log.quiet
        assert first._replica.dirty.is_dirty(4096, 4096)
        first.write(DATA, 4096, False)


@pytest.mark.parametrize(("protocol", "lent"), [("A", False), ("B", True), ("C", True)])
def test_a_payload_is_lent_where_the_client_waits_until_the_peer_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, lent: bool
) -> None:
    """Under A the client may use its buffer again while it is still on its way."""
    sent: list[bool] = []

    def send(stream: Stream, kind: MessageType, *arguments: Any, lent: bool = False, **words: Any) -> None:
        if kind is MessageType.WRITE:
            sent.append(lent)
        plain_send(stream, kind, *arguments, lent=lent, **words)

    plain_send = Stream.send
    with pair(tmp_path, protocol) as (first, _):
        # Alone and spinning, a write under A does not go by the queue, which copies it. None so large spins.
        first._primary.spin = Spin(100)
        monkeypatch.setattr(Change, "is_typical", True)
        monkeypatch.setattr(Primary, "is_alone", lambda primary: True)
        monkeypatch.setattr(Stream, "send", send)
        first.write(memoryview(bytes(LENT_BYTES_MIN)), 0, False)
    assert sent == [lent]


def test_under_a_looking_that_is_always_in_vain_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link slower than a client's patience: a miss must count, or nothing is ever compared."""
    with pair(tmp_path, "A") as (first, _):
        primary = first._primary
        primary.spin = Spin("auto")
        monkeypatch.setattr(Primary, "is_alone", lambda primary: True)
        monkeypatch.setattr(Stream, "spin", lambda stream, us: False)
        for number in range(4000):
            first.write(DATA, number % 64 * 4096, False)
            # Only where nothing is on its way is an answer looked for.
            first.flush()
            if not primary.spin.pays:
                break
        assert not primary.spin.pays
