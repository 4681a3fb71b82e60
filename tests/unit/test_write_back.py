"""A page that the disk drops when a write is begun ahead of its flush: that disk is Failed, and the volume goes on."""

import ctypes
import errno
from pathlib import Path

import pytest

from mirror.core.errors import LinkLost
from mirror.core.limits import COMMITS_MIN
from mirror.core.states import DiskState
from mirror.store import data_file
from tests.pair import pair, session_of

DATA = memoryview(b"\x5a" * 4096)


@pytest.mark.parametrize("side", ["primary", "peer"])
def test_the_copy_that_dropped_a_page_is_failed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """Not only at the next flush: a process that is killed before would come back as one that forgot nothing."""
    with pair(tmp_path) as (first, second):
        session = session_of(first)
        loser = first if side == "primary" else second

        def drop(descriptor: int, *_: int) -> int:
            ctypes.set_errno(errno.ENOSPC)
            return -(descriptor == loser._replica.store.data_fd)

        for number in range(COMMITS_MIN + 1):
            # Two each: behind the last write of a commit its flush would be sent.
            first.write(DATA, number * 8192, False)
            first.write(DATA, number * 8192 + 4096, False)
            first.flush()
        monkeypatch.setattr(data_file, "_libc_sync_file_range", drop)
        first.write(DATA, 1 << 20, False)
        if side == "peer":
            with pytest.raises(LinkLost):
                session.rest(10)
        assert loser._replica.superblock.disk is DiskState.FAILED
        first.flush()
        assert session.ended is (side == "peer")
        whole = memoryview(bytearray(4096))
        first.read_into(whole, 1 << 20)
        assert whole == DATA
