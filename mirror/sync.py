"""Resync, driven by its source: copy the dirty blocks to the target.

A chunk is one large dirty run, or many small ones that share their messages: one at a time, scattered blocks would do
little but wait. Each run is locked like a write (invariant same-order): the source reads it and sends it. Where that is
measured to pay it first asks the target for the digests of the blocks, and sends only those that differ. Zero blocks
travel as a range. A copied block is as unstable as a written one until both replicas have flushed (invariants
unstable-is-dirty, clear-after-stable), so an interruption at any point leaves it dirty, and a resync goes on where it
was. The target becomes UpToDate only by the source's last word, after a flush of both.
"""

import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import lz4.block

from mirror.core import resync
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import LinkLost, MirrorError, PeerError
from mirror.core.forecast import noted
from mirror.core.generation import Action
from mirror.core.limits import BLOCK_BYTES, RESYNC_RUN_BYTES, RESYNC_STABLE_BYTES, SYNC_STREAMS
from mirror.core.range_lock import Ticket
from mirror.core.resync import Action as BlockAction
from mirror.core.resync import Asking, Compression, Gathering, Progress
from mirror.core.selection import both
from mirror.core.throttle import AUTO, Rate
from mirror.core.wire import Flag, MessageType, crc32c
from mirror.driven import say_extents
from mirror.lending import LENT_BYTES_MIN
from mirror.link import NO_PAYLOAD, Request, Stream
from mirror.primary import Primary, describe_errno
from mirror.replica import Replica
from mirror.resync_pace import Pace
from mirror.runtime import Thread
from mirror.session import Session

log = logging.getLogger(__name__)

# (offset, length): dirty runs that are locked and copied together.
Chunk = list[tuple[int, int]]

# The target's last word takes two durable superblocks and a map.
FINISH_TIMEOUT_S = 20.0


class Piece(NamedTuple):
    """What is done about a part of a chunk; `content` is what the target is sent."""

    action: BlockAction
    offset: int
    length: int
    content: memoryview


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
        self._gathering = Gathering()
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
            while copied_bytes := self._copy_next(stream):
                self._report()
                self._stabilise_at_times()
                pace.done(number, copied_bytes)
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

    def _copy_next(self, stream: Stream) -> int:
        """Copy the next chunk; its bytes, 0 when there is none."""
        with self._replica.books:
            bytes_max = self._pace.chunk_bytes
            first = self._replica.dirty.next_run(self._cursor, bytes_max)
            if first is None:
                return 0
            self._cursor = sum(first)
        tickets = [self._primary.lock_range(*first)]
        try:
            gathered_max = self._gathering.bytes_max
            more_bytes = min(bytes_max, gathered_max) - max(first[1], RESYNC_RUN_BYTES)
            chunk = [first, *self._lock_more(more_bytes, tickets)]
            for ticket in tickets:
                # Nothing changes here: readers need not wait.
                ticket.answered = True
            began_s = self._runtime.now_s()
            self._copy_chunk(stream, chunk)
            self._gathering.copied(gathered_max, self._runtime.now_s() - began_s)
        finally:
            self._primary.unlock_ranges(tickets)
        return sum(length for _, length in chunk)

    def _lock_more(self, bytes_max: int, tickets: list[Ticket]) -> Chunk:
        """Runs behind the first, up to one that somebody works on: who has a ticket may not wait for another."""
        runs: Chunk = []
        with self._replica.books:
            while bytes_max >= BLOCK_BYTES and (run := self._replica.dirty.next_run(self._cursor, bytes_max)):
                ticket = self._primary.try_range(*run)
                if ticket is None:
                    break
                tickets.append(ticket)
                runs.append(run)
                self._cursor = sum(run)
                bytes_max -= max(run[1], RESYNC_RUN_BYTES)
        return runs

    def _copy_chunk(self, stream: Stream, chunk: Chunk) -> None:
        pieces, data = [], []
        for offset, length in chunk:
            if length > RESYNC_RUN_BYTES and self._replica.store.is_hole(offset, length):
                # Nothing to read and nothing to compare: a sparse volume is synced at the speed of its metadata.
                pieces.append(Piece(BlockAction.ZERO, offset, length, NO_PAYLOAD))
            else:
                data.append((offset, length))
        if data:
            pieces += self._compare(stream, data) if self._asking.wanted() else self._read(data)
        self._send(stream, pieces)
        self._copied(chunk)

    def _compare(self, stream: Stream, data: Chunk) -> list[Piece]:
        """The data as what the target lacks of it; both sides take their digests at the same time."""
        started_s = self._runtime.now_s()
        stream.send_requests(
            [Request(MessageType.SUMS, Flag.RESYNC, offset, length, b"", 0) for offset, length in data]
        )
        local = []
        for offset, length in data:
            content = self._replica.store.read(length, offset)
            local.append((offset, content, resync.block_sums(content)))
        pieces = []
        for offset, content, sums in local:
            remote = resync.decode_sums(self._answer(stream), len(content))
            pieces += _pieces(content, offset, resync.classify_blocks(sums, remote, offset))
        equal_bytes = sum(piece.length for piece in pieces if piece.action is BlockAction.SKIP)
        self._asking.asked(sum(length for _, length in data), equal_bytes, self._runtime.now_s() - started_s)
        return pieces

    def _read(self, data: Chunk) -> list[Piece]:
        """The data, and all of it as what the target lacks."""
        pieces = []
        for offset, length in data:
            content = self._replica.store.read(length, offset)
            pieces += _pieces(content, offset, resync.uncompared_runs(content, offset))
        return pieces

    def _copied(self, chunk: Chunk) -> None:
        """The target has the chunk, in memory at least: no longer dirty, not stable yet."""
        with self._replica.books:
            if self._primary.session is not self._session:
                raise LinkLost(self._session.reason)
            for offset, length in chunk:
                self._replica.dirty.clear(offset, length)
                self._replica.unstable.mark(offset, length)
                self._since_stable += length
                self.progress.advance(length, self._runtime.now_s() - self._started_s)

    def _send(self, stream: Stream, pieces: list[Piece]) -> None:
        begun_s = self._runtime.now_s()
        different = [piece for piece in pieces if piece.action is BlockAction.SEND]
        requests = [_zero(piece) for piece in pieces if piece.action is BlockAction.ZERO]
        raw_bytes = sum(piece.length for piece in different)
        compressed = bool(different) and self._compression.wanted()
        requests += map(_packed if compressed else _plain, different)
        made_s = self._runtime.now_s()
        self._ask(stream, requests)
        answered_s = self._runtime.now_s()
        if compressed:
            packed_bytes = sum(len(request.payload) for request in requests)
            self._compression.packed(raw_bytes, packed_bytes, made_s - begun_s, answered_s - made_s)
        elif different:
            self._compression.plain(raw_bytes, answered_s - begun_s)
        if different:
            self._asking.sent(raw_bytes, answered_s - begun_s)
        self.sent_bytes += raw_bytes
        self.skipped_bytes += sum(piece.length for piece in pieces) - raw_bytes

    def _ask(self, stream: Stream, requests: list[Request]) -> None:
        """Send them, as many at a time as are carried out soon; the target has carried out all when this returns."""
        left = iter(requests)
        while together := list(itertools.islice(left, self._gathering.count_max)):
            self._ask_together(stream, together)

    def _ask_together(self, stream: Stream, requests: list[Request]) -> None:
        small = []
        for request in requests:
            if len(request.payload) < LENT_BYTES_MIN:
                small.append(request)
            else:
                kind, flags, offset, length, payload, payload_crc, number = request
                stream.send(kind, flags, offset, length, payload, number=number, payload_crc=payload_crc, lent=True)
        if small:
            stream.send_requests(small)
        for _ in requests:
            self._answer(stream)

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
                self._ask(stream, [_plain(Piece(BlockAction.SEND, offset, length, memoryview(content)))])
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
        result = noted(self.result(), known.last_resync)
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


def _pieces(content: bytes, offset: int, runs: list[tuple[BlockAction, int, int]]) -> list[Piece]:
    """The runs of a content that begins at `offset`, with what each of them holds."""
    view = memoryview(content)
    return [Piece(action, at, size, view[at - offset : at - offset + size]) for action, at, size in runs]


def _zero(piece: Piece) -> Request:
    return Request(MessageType.ZERO, Flag.RESYNC | Flag.MAY_TRIM, piece.offset, piece.length, b"", 0)


def _plain(piece: Piece) -> Request:
    content = piece.content
    return Request(MessageType.WRITE, Flag.RESYNC, piece.offset, piece.length, content, crc32c(content))


def _packed(piece: Piece) -> Request:
    """Compressed, if that makes it smaller."""
    packed = lz4.block.compress(piece.content, store_size=False)
    if len(packed) >= piece.length:
        return _plain(piece)
    # The message's own checksum covers what travels; this one what is written.
    written_crc = crc32c(piece.content)
    flags = Flag.RESYNC | Flag.LZ4
    return Request(MessageType.WRITE, flags, piece.offset, piece.length, packed, crc32c(packed), written_crc)
