"""Resync, driven by its source: copy the dirty blocks to the target.

Each chunk is locked like a write (invariant same-order): the source reads it and sends it. Where that is measured to
pay it first asks the target for the digests of its blocks, and sends only those that differ. Zero blocks travel as a
range. A copied block is as unstable as a written one until both replicas have flushed (invariants unstable-is-dirty,
clear-after-stable), so an interruption at any point leaves it dirty, and a resync goes on where it was. The target
becomes UpToDate only by the source's last word, after a flush of both.
"""

import logging
from collections.abc import Callable
from typing import Any

import lz4.block

from mirror.core import resync
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import LinkLost, MirrorError, PeerError
from mirror.core.generation import Action
from mirror.core.limits import RESYNC_STABLE_BYTES, SYNC_STREAMS
from mirror.core.resync import Action as BlockAction
from mirror.core.resync import Asking, Compression, Progress
from mirror.core.selection import both
from mirror.core.throttle import AUTO, Rate
from mirror.core.wire import Flag, MessageType, crc32c
from mirror.driven import say_extents
from mirror.link import Stream
from mirror.primary import Primary, describe_errno
from mirror.replica import Replica
from mirror.resync_pace import Pace
from mirror.runtime import Thread
from mirror.session import Session

log = logging.getLogger(__name__)

# (action, offset, length)
Runs = list[tuple[BlockAction, int, int]]

# The target's last word takes two durable superblocks and a map.
FINISH_TIMEOUT_S = 20.0


class SyncSource:
    """One resync as its source, in threads of its own. `on_done` is called when the target is UpToDate.

    Of `their_suspects`, the target's, those that are copied are none any more at the end.
    """

    def __init__(
        self,
        primary: Primary,
        session: Session,
        their_suspects: DirtyMap,
        on_done: Callable[[Session], None],
        rate: Rate = AUTO,
    ) -> None:
        self._on_done = on_done
        self._primary = primary
        self._replica: Replica = primary.replica
        self._runtime = primary.replica.runtime
        self._session = session
        self._cursor = 0
        self._since_stable = 0
        self._running = 0
        self.sent_bytes = 0
        self.skipped_bytes = 0
        self.started_at = self._runtime.wall_time_s()
        self._started_s = self._runtime.now_s()
        with self._replica.books:
            self.total_bytes = self._replica.dirty.dirty_bytes
            self._settled = both(their_suspects, self._replica.dirty)
            if session.outcome.action is Action.SOURCE_BITMAP:
                # What is believed because of a map is to be proven; a full resync looks at every block itself.
                self._replica.unproven.add(self._replica.dirty.extents())
        self.progress = Progress(self.total_bytes)
        self._asking = Asking()
        self._compression = Compression()
        self._pace = Pace(primary, session, rate)
        self._reported_s = 0.0
        self._threads: list[Thread] = []

    def start(self) -> None:
        self._running = SYNC_STREAMS
        for number in range(SYNC_STREAMS):
            self._threads.append(self._runtime.spawn(f"resync-{number}", self._copy, number))

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _copy(self, number: int) -> None:
        """Body of each of the resync threads; the last one to run out of work finishes the resync."""
        pace = self._pace
        try:
            stream = self._session.borrow_sync()
            pace.wait(number)
            while (chunk := self._next()) is not None:
                self._copy_chunk(stream, *chunk)
                self._report()
                self._stabilise_at_times()
                pace.done(number, chunk[1])
                pace.wait(number)
            pace.leave(number)
            self._session.give_back_sync(stream)
            with self._replica.books:
                self._running -= 1
                last = self._running == 0
            if last:
                self._finish()
        except MirrorError as error:
            if not isinstance(error, LinkLost):
                self._session.disk_trouble = True
            self._session.end(f"the resync stopped: {error.message}")

    def _next(self) -> tuple[int, int] | None:
        with self._replica.books:
            run = self._replica.dirty.next_run(self._cursor, self._pace.chunk_bytes)
            if run is not None:
                self._cursor = run[0] + run[1]
            return run

    def _copy_chunk(self, stream: Stream, offset: int, length: int) -> None:
        ranges = self._primary.lock_range(offset, length)
        try:
            if self._replica.store.is_hole(offset, length):
                # Nothing to read and nothing to compare: a sparse volume is synced at the speed of its metadata.
                self._ask(stream, MessageType.ZERO, offset, length, flags=Flag.RESYNC | Flag.MAY_TRIM)
                self.skipped_bytes += length
                self._copied(offset, length)
                return
            content, runs = (
                self._compare(stream, offset, length) if self._asking.wanted() else self._read(offset, length)
            )
            for action, at, size in runs:
                if action is BlockAction.SKIP:
                    self.skipped_bytes += size
                elif action is BlockAction.ZERO:
                    self._ask(stream, MessageType.ZERO, at, size, flags=Flag.RESYNC | Flag.MAY_TRIM)
                    self.skipped_bytes += size
                else:
                    self._send(stream, at, memoryview(content)[at - offset : at - offset + size])
                    self.sent_bytes += size
            self._copied(offset, length)
        finally:
            self._primary.unlock_range(ranges)

    def _compare(self, stream: Stream, offset: int, length: int) -> tuple[bytes, Runs]:
        """The chunk, and what the target lacks of it; both sides take their digests at the same time."""
        started_s = self._runtime.now_s()
        stream.send(MessageType.SUMS, Flag.RESYNC, offset, length)
        content = self._replica.store.read(length, offset)
        local = resync.block_sums(content)
        remote = resync.decode_sums(self._answer(stream), length)
        runs = resync.classify_blocks(local, remote, offset)
        equal_bytes = sum(size for action, _, size in runs if action is BlockAction.SKIP)
        self._asking.asked(length, equal_bytes, self._runtime.now_s() - started_s)
        return content, runs

    def _read(self, offset: int, length: int) -> tuple[bytes, Runs]:
        """The chunk, and all of it as what the target lacks."""
        content = self._replica.store.read(length, offset)
        return content, resync.uncompared_runs(content, offset)

    def _copied(self, offset: int, length: int) -> None:
        """The target has the chunk, in memory at least: no longer dirty, not stable yet."""
        with self._replica.books:
            if self._primary.session is not self._session:
                raise LinkLost(self._session.reason)
            self._replica.dirty.clear(offset, length)
            self._replica.unstable.mark(offset, length)
            self._since_stable += length
            self.progress.advance(length, self._runtime.now_s() - self._started_s)

    def _send(self, stream: Stream, offset: int, content: memoryview) -> None:
        length = len(content)
        begun_s = self._runtime.now_s()
        if self._compression.wanted():
            started_s = self._runtime.now_s()
            packed = lz4.block.compress(content, store_size=False)
            packed_s = self._runtime.now_s()
            smaller = len(packed) < length
            if smaller:
                # The message's own checksum covers what travels; this one what is written.
                self._ask(stream, MessageType.WRITE, offset, length, packed, Flag.RESYNC | Flag.LZ4, crc32c(content))
            else:
                self._ask(stream, MessageType.WRITE, offset, length, content, Flag.RESYNC)
            self._compression.packed(length, len(packed), packed_s - started_s, self._runtime.now_s() - packed_s)
        else:
            started_s = self._runtime.now_s()
            self._ask(stream, MessageType.WRITE, offset, length, content, Flag.RESYNC)
            self._compression.plain(length, self._runtime.now_s() - started_s)
        self._asking.sent(length, self._runtime.now_s() - begun_s)

    def _ask(
        self,
        stream: Stream,
        kind: MessageType,
        offset: int,
        length: int,
        payload: bytes | memoryview = b"",
        flags: int = Flag.RESYNC,
        number: int = 0,
    ) -> memoryview:
        stream.send(kind, flags, offset, length, payload, number=number, lent=True)
        return self._answer(stream)

    def _answer(self, stream: Stream) -> memoryview:
        header, answer = stream.receive_answer()
        if header.code:
            raise PeerError(f"the peer's disk answered {describe_errno(header.code)}")
        return answer

    def _send_suspect_parts(self) -> None:
        """Of suspect blocks the target gets what a client wrote while it was away, and nothing else."""
        for offset, length in self._replica.superblock.suspect_parts:
            ranges = self._primary.lock_range(offset, length)
            stream = self._session.borrow_sync()
            try:
                content = self._replica.store.read(length, offset)
                self._ask(stream, MessageType.WRITE, offset, length, content)
                with self._replica.books:
                    if self._primary.session is not self._session:
                        raise LinkLost(self._session.reason)
                    # Not dirty if the link is lost, but kept as a part until both are in step.
                    self._primary.flushes.needed = True
            finally:
                self._primary.unlock_range(ranges)
            self._session.give_back_sync(stream)

    def _stabilise_at_times(self) -> None:
        with self._replica.books:
            due = self._since_stable >= RESYNC_STABLE_BYTES
            if due:
                self._since_stable = 0
        if due:
            started_s = self._runtime.now_s()
            self._primary.flushes.run_round()
            self._asking.flushed(self._runtime.now_s() - started_s)
            self._replica.persist_map()

    def _report(self) -> None:
        now_s = self._runtime.now_s()
        with self._replica.books:
            due = now_s - self._reported_s >= 0.5
            if due:
                self._reported_s = now_s
        if due:
            self._session.notify("sync_progress", **self.status())

    def status(self) -> dict[str, Any]:
        return {
            "done_bytes": self.progress.done_bytes,
            "total_bytes": self.progress.total_bytes,
            "bytes_per_s": round(self.progress.bytes_per_s),
            "eta_s": self.progress.eta_s,
        }

    def limit(self) -> dict[str, Any]:
        """How far the resync is held back, and why."""
        return self._pace.status()

    def result(self) -> dict[str, Any]:
        return {
            "started": self.started_at,
            "rule": self._session.outcome.rule,
            "dirty_bytes": self.total_bytes,
            "sent_bytes": self.sent_bytes,
            "skipped_bytes": self.skipped_bytes,
            "seconds": round(self._runtime.now_s() - self._started_s, 3),
        }

    def _finish(self) -> None:
        replica, session = self._replica, self._session
        with replica.books:
            left = replica.dirty.dirty_bytes
        if left:
            raise PeerError(f"{left} bytes became dirty during the resync")
        self._send_suspect_parts()
        self._primary.flushes.run_round()
        say_extents(session, "suspects_clear", self._settled)
        known = replica.superblock
        result = self.result()
        session.request(
            "sync_finished", FINISH_TIMEOUT_S, current=known.current, history=list(known.history), result=result
        )
        self._primary.in_step(session, last_resync=result)
        replica.persist_map()
        self._on_done(session)
        log.info(
            "resync done: %d bytes were dirty, %d sent, %d equal or zero, %.1f s",
            self.total_bytes, self.sent_bytes, self.skipped_bytes, result["seconds"],
        )  # fmt: skip
