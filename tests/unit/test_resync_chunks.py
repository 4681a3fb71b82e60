"""Scattered blocks of a resync share their messages, and nobody waits for a range while he holds another."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror.core.limits import BLOCK_BYTES, RESYNC_CHUNK_BYTES, RESYNC_RUN_BYTES
from mirror.core.range_lock import Ticket
from mirror.core.resync import Asking
from mirror.link import Stream
from mirror.sync import Chunk, SyncSource
from nbd_server.volume import Volume
from tests.pair import assert_equal_copies, cut_until_in_step, pair

RUNS_MAX = RESYNC_CHUNK_BYTES // RESYNC_RUN_BYTES
STRIDE_BYTES = 4 * BLOCK_BYTES


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Volume, Volume]]:
    with pair(tmp_path) as volumes:
        yield volumes


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[Chunk]:
    """What was copied together, as it comes."""
    found: list[Chunk] = []
    really_copy = SyncSource._copy_chunk

    def copy(source: SyncSource, stream: Stream, chunk: Chunk) -> None:
        found.append(chunk)
        really_copy(source, stream, chunk)

    monkeypatch.setattr(SyncSource, "_copy_chunk", copy)
    return found


def write_scattered(volume: Volume, count: int) -> list[tuple[int, int]]:
    """So many blocks, none beside another, of which a cut leaves nobody sure; the runs that they are."""
    offsets = range(0, count * STRIDE_BYTES, STRIDE_BYTES)
    for offset in offsets:
        # Every other one is of zeroes, which travel as a range.
        content = bytes(BLOCK_BYTES) if offset % (2 * STRIDE_BYTES) else offset.to_bytes(8, "big") * (BLOCK_BYTES // 8)
        volume._primary.write(memoryview(content), offset, False)
    return [(offset, BLOCK_BYTES) for offset in offsets]


def test_scattered_blocks_are_copied_many_at_a_time(two: tuple[Volume, Volume], chunks: list[Chunk]) -> None:
    first, second = two
    runs = write_scattered(first, 7 * RUNS_MAX)
    for _, length in runs:
        assert length < RESYNC_RUN_BYTES
    # What the peer has is not what it should: a resync that copies nothing would be seen.
    second._replica.store.write(memoryview(b"\xee" * BLOCK_BYTES), runs[-1][0])
    second._replica.store.write(memoryview(b"\xee" * BLOCK_BYTES), runs[-2][0])
    cut_until_in_step(first, second)
    assert sorted(run for chunk in chunks for run in chunk) == runs
    assert max(map(len, chunks)) == RUNS_MAX
    assert_equal_copies(first, second)


def test_a_large_run_is_a_chunk_by_itself(two: tuple[Volume, Volume], chunks: list[Chunk]) -> None:
    first, second = two
    for offset in range(0, 2 * RESYNC_CHUNK_BYTES, 64 * 1024):
        first._primary.write(memoryview(b"\x5a" * 64 * 1024), offset, False)
    cut_until_in_step(first, second)
    assert sorted(chunks) == [[(0, RESYNC_CHUNK_BYTES)], [(RESYNC_CHUNK_BYTES, RESYNC_CHUNK_BYTES)]]


def test_a_run_that_somebody_works_on_is_left_for_later(
    two: tuple[Volume, Volume], chunks: list[Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    runs = write_scattered(first, 8)
    really_copy_next = SyncSource._copy_next
    held: list[Ticket] = []
    lock = threading.Lock()

    def copy_next(source: SyncSource, stream: Stream) -> int:
        with lock:
            if not held:
                held.append(first._primary.lock_range(*runs[3]))
        copied_bytes = really_copy_next(source, stream)
        with lock:
            if len(held) == 1:
                # The first chunk is copied, whatever it holds: nobody waited for this with a ticket of his own.
                first._primary.unlock_range(held[0])
                held.append(held[0])
        return copied_bytes

    monkeypatch.setattr(SyncSource, "_copy_next", copy_next)
    cut_until_in_step(first, second)
    assert runs[:3] in chunks
    assert sorted(run for chunk in chunks for run in chunk) == runs
    assert_equal_copies(first, second)


def test_readers_do_not_wait_for_what_is_copied(two: tuple[Volume, Volume], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two
    runs = write_scattered(first, 8)
    read: list[bytes] = []
    really_copy = SyncSource._copy_chunk

    def copy(source: SyncSource, stream: Stream, chunk: Chunk) -> None:
        buffer = bytearray(BLOCK_BYTES)
        for offset, _ in chunk:
            first._primary.read_into(memoryview(buffer), offset)
            read.append(bytes(buffer))
        really_copy(source, stream, chunk)

    monkeypatch.setattr(SyncSource, "_copy_chunk", copy)
    cut_until_in_step(first, second)
    assert sorted(read) == sorted(first._replica.store.read(length, offset) for offset, length in runs)


def slowly(act: Callable[..., None], seconds: float) -> Callable[..., None]:
    def slow(*arguments: Any) -> None:
        threading.Event().wait(seconds)
        act(*arguments)

    return slow


@pytest.mark.parametrize(("stride_blocks", "slow_s"), [(4, 0.012), (1, 0.004)], ids=["scattered", "in-a-row"])
def test_few_requests_at_a_time_where_the_disk_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride_blocks: int, slow_s: float
) -> None:
    """Else the target would owe its answers for so long that the session ends, this one and all that follow.

    In a row every other block is of zeroes, so that each takes a request of its own.
    """
    begun: list[SyncSource] = []
    really_start = SyncSource.start

    def start(source: SyncSource) -> None:
        begun.append(source)
        really_start(source)

    with pair(tmp_path, disk_timeout_s=1.0) as two:
        first, second = two
        store = second._replica.store
        for number in range(1024 // stride_blocks):
            offset = number * stride_blocks * BLOCK_BYTES
            first._primary.write(memoryview(bytes([number % 2 * 0x5A]) * BLOCK_BYTES), offset, False)
        # All of it is sent.
        monkeypatch.setattr(Asking, "wanted", lambda _: False)
        monkeypatch.setattr(store, "write", slowly(store.write, slow_s))
        monkeypatch.setattr(store, "zero", slowly(store.zero, slow_s))
        monkeypatch.setattr(SyncSource, "start", start)
        cut_until_in_step(first, second)
        assert len(begun) == 1
        assert_equal_copies(first, second)
