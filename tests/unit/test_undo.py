"""A write that a full disk refused is undone on the peer, and that is not stable there before the next flush."""

import errno
from pathlib import Path

import pytest

from mirror.core.errors import DeviceError
from mirror.session import Session
from tests.pair import pair, peer_of, session_of

DATA = memoryview(b"\x5a" * 4096)


@pytest.mark.parametrize("link_lost", [False, True])
def test_a_flush_round_between_a_write_and_its_undoing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link_lost: bool
) -> None:
    """It made the write stable on the peer, so a power cut there could bring it back once the undoing was forgotten."""
    with pair(tmp_path) as (first, second):
        primary, replica, session = first._primary, first._replica, session_of(first)
        really = primary._copy_local_to_peer

        def refuse(*_: object) -> None:
            raise DeviceError("data", "write", errno.ENOSPC, "No space left on device")

        def undo(session: Session, offset: int, length: int) -> None:
            primary.flushes.run_round()
            assert not replica.unstable.dirty_blocks + replica.flushing.dirty_blocks
            if link_lost:
                session.end("a test ends it")
            really(session, offset, length)

        for volume in (first, second):
            # Or the next session would bring in order what is looked at.
            monkeypatch.setattr(peer_of(volume), "_may_dial", lambda: False)
        monkeypatch.setattr(replica.store, "write", refuse)
        monkeypatch.setattr(primary, "_copy_local_to_peer", undo)
        with pytest.raises(DeviceError):
            first.write(DATA, 4096, False)
        assert primary.flushes.needed
        assert session.ended is link_lost
        assert (replica.dirty if link_lost else replica.unstable).is_dirty(4096, 4096)
        if not link_lost:
            assert bytes(second._replica.store.read(4096, 4096)) == bytes(4096)
            first.flush()
            assert not replica.unstable.dirty_blocks
