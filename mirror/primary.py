"""Read, write, flush, trim and zero on the primary.

One worker thread carries one request from start to end. A write: lock its range, have its extents in the durable log,
send it to the peer and write it locally at the same time, wait for both, answer. What is durable before what:

 1. the log names an extent before a write of it is applied on either side; a cold one may be sent before, to be parked
                                                                               (log-before-write, mirror.core.parked)
 2. a write is marked unstable before it is answered                           (unstable-is-dirty)
 3. without the peer: blocks dirty, then a new generation and "peer Outdated" durable, then the answer
                                                                               (error-is-dirty, record-before-ack-alone)
 4. a flush counts the writes answered before it began, on both replicas        (flush)
 5. a range stays locked until both replicas have applied the write             (same-order)
"""

import contextlib
import enum
import errno
import logging
from collections.abc import Iterator

from mirror.batches import Batches
from mirror.change import Change
from mirror.core.errors import (
    ConnectionCut,
    DeviceError,
    LinkLost,
    MirrorError,
    NotPrimary,
    OperatorError,
    PeerError,
    ProtocolError,
)
from mirror.core.limits import BLOCK_BYTES, PARKED_ON_STREAMS_MAX, PIECE_BYTES_MAX, READ_ERRORS_MAX
from mirror.core.range_lock import RangeLock, Ticket
from mirror.core.spin import Spin
from mirror.core.stages import ANSWER, COLD, DISK, FLUSHES, LINK, LOG, PYTHON, RANGE, TURN
from mirror.core.states import DiskState
from mirror.core.wire import Flag, Header, MessageType, crc32c
from mirror.deferred import Deferred
from mirror.flush import FlushRounds
from mirror.log_writer import LogWriter
from mirror.replica import FULL, Replica, extents_of, with_suspect_parts
from mirror.running import GATE, Running
from mirror.session import Session
from mirror.trace import Trace

log = logging.getLogger(__name__)

# From so many requests at a time they share messages; fewer have a stream each, which saves a change of threads.
CROWD = 4

# How soon a handshake sees that the changes which it waits for have ended.
CHANGES_LOOK_S = 0.01


class Gate(enum.Enum):
    """Whether requests may begin: CLOSED ones are refused, HELD ones wait, CUT ones stay unanswered."""

    CLOSED = 1
    OPEN = 2
    HELD = 3
    CUT = 4


class Primary:
    """The primary's side of a volume. `session` is the live session with the peer, None while alone."""

    def __init__(self, replica: Replica, protocol: str, trace: Trace, spin: Spin) -> None:
        self.replica = replica
        self.trace = trace
        self.spin = spin
        self.session: Session | None = None
        self.peer_reads_ok = False
        self.peer_only = False
        self.gate = Gate.CLOSED
        self._paused = False
        self._open = False
        self.read_errors = 0
        self._store = replica.store
        self._books = replica.books
        self._changed = replica.changed
        self._ranges = RangeLock()
        self._active = 0
        self._under_way = replica.under_way
        self._logs_ahead = False
        self._alone_recorded = False
        self._alone_lock = replica.runtime.lock()
        self._fail_lock = replica.runtime.lock()
        self.flushes = FlushRounds(self)
        self._log_writer = LogWriter(replica, self._stabilise, self._stabilise_beside)
        # From so many requests on their way they share messages.
        self.crowd = CROWD
        self._crowded = False
        # Those of the last session; they take nothing once it has ended.
        self.batches: Batches | None = None
        self._deferred = Deferred(self, protocol)

    # Requests

    def write(self, data: memoryview, offset: int, fua: bool) -> None:
        """Write `data` at `offset` on both replicas; with `fua` it is stable on both when this returns."""
        trace = self.trace
        started = trace.start()
        span = None if trace.writes & trace.spans.mask else trace.spans.take(started)
        flags = Flag.FUA if fua else 0
        # Taken here once and for all: the peer checks it before it writes, however the data got there.
        crc = crc32c(data) if self.replica.tracked else 0
        length = len(data)
        begun_ns = self._change(Change(MessageType.WRITE, flags, offset, length, started, data, crc, span))
        trace.write(started, length, offset, fua, span, begun_ns)

    def zero(self, offset: int, length: int, may_trim: bool, fast: bool, fua: bool) -> None:
        """Make the range read as zeroes on both replicas. `fast`: fail with ENOTSUP rather than write zeroes."""
        session = self.session
        if fast and not (self._store.can_fast_zero and (session is None or session.peer_can_fast_zero)):
            raise MirrorError("this volume can't zero faster than by writing zeroes", errno=errno.EOPNOTSUPP)
        flags = (Flag.FUA if fua else 0) | (Flag.MAY_TRIM if may_trim else 0)
        for at, size in _pieces(offset, length):
            self._change(Change(MessageType.ZERO, flags, at, size, self.trace.start()))
        self.trace.zeroed(length)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Give the range's space back on both replicas; it reads as zeroes, so that both stay equal."""
        flags = Flag.FUA if fua else 0
        for at, size in _pieces(offset, length):
            self._change(Change(MessageType.TRIM, flags, at, size, self.trace.start()))
        self.trace.trimmed(length)

    def flush(self) -> None:
        """All writes answered before this call are stable on every connected replica when it returns."""
        started = self.trace.start()
        span = self.trace.spans.take(started)
        flush = Running(FLUSHES, 0, 0, started, span)
        self._enter(flush)
        try:
            span.lap(TURN)
            self.flushes.flush(flush)
        finally:
            self._leave(flush)
        self.trace.flush(started, span)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from the volume; waits for the unanswered writes of its range (invariant same-order)."""
        length = len(buffer)
        read = Running("read", offset, length, 0)
        self._enter(read)
        try:
            if self.peer_only:
                read.waits_for = LINK
                self._read_from_peer(buffer, offset)
            else:
                read.waits_for = DISK
                try:
                    self._store.read_into(buffer, offset)
                except DeviceError as error:
                    read.waits_for = LINK
                    self._repair_read(buffer, offset, error)
                if self.replica.tracked:
                    # Where nothing is locked no lock need be taken to see it.
                    overtaken = False
                    if not self._ranges.idle:
                        with self._books:
                            overtaken = self._ranges.busy(offset, length)
                    if overtaken:
                        self._read_locked(buffer, offset, read)
                    if not self._open and self.gate is Gate.CUT:
                        # It may have seen a write that was cut off just now, which stays unanswered and may vanish.
                        raise ConnectionCut("this replica stopped serving; the request stays unanswered")
        finally:
            self._leave(read)
        self.trace.read(length)

    # The life of a change

    def _change(self, change: Change) -> int:
        """Carry it out; returns when it had its turn and its extents in the log, 0 where there is neither."""
        if not self.replica.tracked:
            return self._change_untracked(change)
        span = change.span
        ticket, first, last = self._begin(change)
        if span is not None:
            span.lap(LOG)
        # That of a parked one may have ended meanwhile; another one does not begin while a request runs.
        session = change.parked_in or self.session
        if self.replica.suspects.any and change.parked_in is None:
            self._on_suspects(change)
        unlock = True
        alone = change.parked_in is None and self.is_alone()
        # Whoever waits for a disk sleeps: to spin beside it only takes the processor from what ends its wait. Nor does
        # anybody spin for what is not noted: nothing would end that.
        spin_us = self.spin.wanted_us if alone and change.is_typical else 0
        started_ns = self.trace.start()
        try:
            if session is None:
                self._change_alone(change)
            elif change.parked_in is None and self._deferred.takes(change, self._active >= self.crowd):
                alone_since_ns = started_ns if alone and change.is_typical else 0
                unlock = self._deferred.change(session, ticket, change, spin_us, alone_since_ns)
                if not unlock and session.ended:
                    # Lost between the queue and this answer: whoever saw it may not have recorded it yet.
                    self.detach(session)
                    self.record_alone()
            else:
                self.change_both(session, change, spin_us)
            # One that is still on its way under A is noted when the peer has it.
            noted_later = not unlock and self._deferred.protocol == "A"
            if alone and not noted_later and self.is_alone() and change.is_typical and session is not None:
                self.spin.note(spin_us > 0, started_ns, self.trace.start())
        finally:
            if unlock:
                self.unlock(ticket, first, last, change)
            else:
                self._leave(change)
        return started_ns

    def is_alone(self) -> bool:
        """Whether the request that asks is the only one."""
        return self._active == 1 and not self._crowded

    def set_crowded(self, crowded: bool) -> None:
        """Whether there are several requests at a time, though one may seem alone: they run on one core, in turn."""
        self._crowded = crowded

    def _on_suspects(self, change: Change) -> None:
        """No answered write of a suspect block may rest on a resync (mirror.core.selection): it is stable on both."""
        with self._books:
            if self.replica.suspects.touches(change.offset, change.length):
                change.flags |= Flag.FUA

    def _begin(self, change: Change) -> tuple[Ticket, int, int]:
        """Lock the range and hold its extents first..last in the log (none once the own disk is Failed: last < first).

        Whatever fails leaves nothing behind.
        """
        first, last = extents_of(change.offset, change.length)
        self._under_way.add(change)
        try:
            return self._take_turn(change, first, last)
        except BaseException:
            self._under_way.discard(change)
            raise

    def _take_turn(self, change: Change, first: int, last: int) -> tuple[Ticket, int, int]:
        if self.replica.failed:
            self._await_stand_in(change)
        with self._books:
            if not self._open:
                self._wait_open(change)
            self._active += 1
            ticket = self._ranges.request(change.offset, change.length)
            while not ticket.granted:
                change.waits_for = RANGE
                self._changed.wait()
            if change.span is not None:
                change.span.lap(TURN)
            hot = not self.replica.failed and self.replica.log.hold(first, last)
            reached = self.replica.log.reached
            if not hot:
                self._number_parked(change)
        if not hot:
            return self._hold_cold(change, ticket, first, last)
        if reached >= 0:
            self._log_ahead_of(reached, sure=True)
        return ticket, first, last

    def _hold_cold(self, change: Change, ticket: Ticket, first: int, last: int) -> tuple[Ticket, int, int]:
        session = change.parked_in
        try:
            if session is not None:
                self._send(session, change, Flag.PARK, change.parked_as)
            change.waits_for = COLD
            if not self.replica.failed:
                try:
                    self._log_writer.hold(first, last)
                    self._log_ahead_of(last, sure=False)
                    return ticket, first, last
                except DeviceError as error:
                    self.disk_failed(error)
            # It may have failed since this request came in, and the peer's standing in just be being agreed.
            self._await_stand_in(change)
            return ticket, 0, -1
        except BaseException as error:
            if session is not None:
                self._give_up_parked(session, change, error)
            self._drop(ticket)
            raise

    def _give_up_parked(self, session: Session, change: Change, error: BaseException) -> None:
        """It is answered with an error, and the peer, which has it, can't know that (invariant error-is-dirty)."""
        session.end(f"a write that the peer has parked is given up: {error}")
        self.detach(session)
        with self._books:
            self.replica.dirty.mark(change.offset, change.length)
        if change.awaited is not None:
            # Until then its sender may read the client's buffer.
            with contextlib.suppress(LinkLost):
                change.awaited.answer()

    def _number_parked(self, change: Change) -> None:
        """Whether a cold write is sent ahead of its record, and its number then; called with the books held.

        Not what touches suspects, which is to be stable on both, and not under A, which sends later anyway.
        """
        session = self.session
        if session is None or not session.peer_parks or self._deferred.protocol == "A" or self.peer_only:
            return
        if self.replica.failed or self.replica.suspects.any or not change.may_be_parked:
            return
        change.parked_as = session.parked.take()
        if change.parked_as:
            change.parked_in = session

    def _log_ahead_of(self, extent: int, sure: bool) -> None:
        """A sequential writer that has come to this extent should not meet a cold one: log those that follow."""
        log_ = self.replica.log
        with self._books:
            log_.reached = -1
            wanted = None if self._logs_ahead else log_.ahead_of(extent, self.replica.unproven.extent_count, sure)
            if wanted is None:
                return
            self._logs_ahead = True
        try:
            self.replica.runtime.spawn("log-ahead", self._log_ahead, *wanted)
        except OperatorError as error:
            self._logs_ahead = False
            log.debug("nothing is logged ahead: %s", error)

    def _log_ahead(self, first: int, last: int) -> None:
        """Body of a thread: a request that writes nothing, so that no role changes and no log begins anew meanwhile."""
        try:
            self._enter()
            try:
                self._log_writer.hold(first, last)
                with self._books:
                    self.replica.log.logged_ahead(first, last, self.replica.round)
            except DeviceError as error:
                self.disk_failed(error)
            finally:
                self._leave()
        except MirrorError as error:
            log.debug("nothing is logged ahead: %s", error)
        finally:
            self._logs_ahead = False

    def _await_stand_in(self, request: Running | None) -> None:
        """The own disk is Failed: go on when the peer stands in for it, which may just be being agreed."""
        if not self.peer_only:
            if request is not None:
                request.waits_for = GATE
            with self._fail_lock:
                if not self.peer_only:
                    raise self._no_disk()

    def _no_disk(self) -> PeerError:
        return PeerError(f"this replica's disk is Failed ({self.replica.failure}) and no peer can stand in")

    def _drop(self, ticket: Ticket) -> None:
        with self._books:
            self._ranges.unlock(ticket)
            self._active -= 1
            self._changed.notify_all()

    def unlock(self, ticket: Ticket, first: int, last: int, leaves: Running | None = None) -> None:
        """Both replicas have applied the change, or its blocks are dirty: let the next one of its range begin.

        `leaves`: this request ends with it.
        """
        with self._books:
            if first <= last:
                self.replica.log.release(first, last, self.replica.round)
            awaited = self._ranges.unlock(ticket) or self._log_writer.waits_for_release
            if leaves is not None:
                self._under_way.discard(leaves)
                self._active -= 1
                awaited = awaited or (self._active == 0 and not self._open)
            if awaited:
                self._changed.notify_all()

    def _change_untracked(self, change: Change) -> int:
        self._enter(change)
        try:
            if change.span is not None:
                change.span.lap(TURN)
            if self.replica.suspects.any:
                self._on_suspects(change)
            self._apply_alone(change)
        finally:
            self._leave(change)
        return 0

    def _apply_alone(self, change: Change) -> None:
        """Apply what the peer is not sent."""
        error = change.apply_here(self._store)
        # Not before: a round that began in between would not cover it, and the next flush be elided.
        self.flushes.needed = True
        if error is not None:
            if error.errno not in FULL:
                self.disk_failed(error)
            raise error
        self._suspects_written_alone(change.offset, change.length)

    def _suspects_written_alone(self, offset: int, length: int) -> None:
        if self.replica.suspects.any:
            try:
                self.replica.suspects_written_alone(offset, length)
            except DeviceError as error:
                self.disk_failed(error)
                raise

    def change_both(self, session: Session, change: Change, spin_us: int = 0) -> None:
        """Protocol C: both replicas have it before it is answered."""
        if change.parked_in is None:
            commits = self._store.commits
            if commits.likely:
                # What comes after a write that will be flushed comes when the peer would have given up looking.
                self._send(session, change, 0, spin_us, commits.next_is_last)
            else:
                peer_us = self.spin.peer_us if spin_us else 0
                self._send(session, change, Flag.SPIN if peer_us else 0, peer_us)
        error = None if self.peer_only else change.apply_here(self._store)
        change.waits_for = LINK
        peer_has_it = False
        if change.stream is not None or change.awaited is not None:
            try:
                header = self._await_answer(session, change, spin_us)
                if change.span is not None:
                    change.span.lap(ANSWER)
                    change.span.peer_ns = header.number
                if header.code == 0:
                    peer_has_it = True
                else:
                    session.disk_trouble = True
                    session.end(f"the peer could not carry out a write: {describe_errno(header.code)}")
            except (LinkLost, ProtocolError) as lost:
                session.end(lost.message)
        change.waits_for = PYTHON
        if not peer_has_it:
            self.detach(session)
        if change.parked_in is not None:
            # A flush round that begins from now on must have the peer apply it: none will be needed for it after that.
            with self._books:
                session.parked.over(change.parked_as)
        self.settle(session, change.offset, change.length, peer_has_it, error)

    @staticmethod
    def _await_answer(session: Session, change: Change, spin_us: int) -> Header:
        """Of the peer, however it was asked. Raises LinkLost, ProtocolError."""
        stream = change.stream
        if stream is None:
            assert change.awaited is not None
            return change.awaited.answer()
        if spin_us:
            stream.spin(spin_us)
        header, _ = stream.receive_answer()
        if change.flush_behind:
            session.flushes_ahead(stream)
        else:
            session.give_back(stream)
        return header

    def _send(self, session: Session, change: Change, flags: int, number: int, flush_follows: bool = False) -> None:
        """To the peer, by itself or together with others, or with the flush that follows."""
        batches = self.batches
        # Of those that then wait for their record few keep a stream: whoever makes room in the log needs one.
        shared_from = PARKED_ON_STREAMS_MAX + 1 if flags & Flag.PARK else self.crowd
        if batches is not None and self._active >= shared_from and change.may_share:
            change.queue_for_peer(batches, self.replica.runtime.lock(), flags, number)
        else:
            ahead = flush_follows and session.peer_answers_first and change.is_typical
            change.stream = change.ask_peer(session, flags, number, flush_follows=ahead)

    def settle(self, session: Session, offset: int, length: int, peer_has_it: bool, error: DeviceError | None) -> None:
        """Do what must be done before a change is answered; raises when the answer is an error."""
        self.flushes.needed = True
        with self._books:
            attached = self.session is session
            (self.replica.unstable if attached and peer_has_it else self.replica.dirty).mark(offset, length)
            if self.replica.suspects.any and attached and peer_has_it and error is None and not self.peer_only:
                self.replica.suspects.written(offset, length)
        if error is not None:
            self._settle_error(session, offset, length, peer_has_it, error)
        elif not peer_has_it:
            self.record_alone()
            self._suspects_written_alone(offset, length)

    def _settle_error(self, session: Session, offset: int, length: int, peer_has_it: bool, error: DeviceError) -> None:
        """The local disk refused the change that the peer may have (invariant error-is-dirty)."""
        if error.errno not in FULL:
            if peer_has_it and self.disk_failed(error):
                return
            raise error
        if peer_has_it:
            try:
                self._copy_local_to_peer(session, offset, length)
            except MirrorError as second:
                session.end(f"could not undo on the peer a write that this replica's disk refused: {second.message}")
                self.detach(session)
            # Once more: a flush round may have begun since, and what was undone is not covered by it.
            self.flushes.needed = True
            with self._books:
                (self.replica.unstable if self.session is session else self.replica.dirty).mark(offset, length)
        raise error

    def _copy_local_to_peer(self, session: Session, offset: int, length: int) -> None:
        for at, size in _pieces(offset, length):
            content = self._store.read(size, at)
            stream = session.borrow()
            stream.send(MessageType.WRITE, 0, at, size, content)
            header, _ = stream.receive_answer()
            session.give_back(stream)
            if header.code:
                raise PeerError(f"the peer answered {describe_errno(header.code)}")

    def _change_alone(self, change: Change) -> None:
        with self._books:
            self.replica.dirty.mark(change.offset, change.length)
        if self.replica.failed:
            raise self._no_disk()
        self._apply_alone(change)
        self.record_alone()

    def record_alone(self) -> None:
        """Before the first answer that the peer does not have: a new generation, durable (record-before-ack-alone)."""
        if not self.replica.tracked:
            return
        if self.peer_only:
            raise self._no_disk()
        with self._alone_lock:
            if self.gate is Gate.CUT:
                raise ConnectionCut("this replica stops serving; the request stays unanswered")
            if self.replica.failed:
                raise self._no_disk()
            if not self._alone_recorded:
                try:
                    self.replica.move_on(DiskState.OUTDATED)
                except DeviceError as error:
                    self.disk_failed(error)
                    raise
                self._alone_recorded = True
                log.warning("going on without the peer: redundancy is lost until it is back")

    # Reads that need the peer

    def _read_locked(self, buffer: memoryview, offset: int, read: Running) -> None:
        read.waits_for = RANGE
        ticket = self.lock_range(offset, len(buffer))
        read.waits_for = LINK if self.peer_only else DISK
        try:
            if self.peer_only:
                self._read_from_peer(buffer, offset)
            else:
                self._store.read_into(buffer, offset)
        finally:
            self.unlock_range(ticket)

    def _read_from_peer(self, buffer: memoryview, offset: int) -> None:
        session = self.session
        if session is None:
            raise PeerError("this replica's disk can't be read and there is no peer")
        with self._books:
            missing = with_suspect_parts(self.replica.dirty, self.replica.superblock)
            if not self.peer_reads_ok and missing.is_dirty(offset, len(buffer)):
                raise PeerError("this replica's disk can't be read and the peer does not have these blocks yet")
        try:
            stream = session.borrow()
            stream.send(MessageType.READ, 0, offset, len(buffer))
            header, payload = stream.receive_answer()
        except (LinkLost, ProtocolError) as error:
            session.end(error.message)
            self.detach(session)
            raise
        if header.code == 0 and len(payload) == len(buffer):
            buffer[:] = payload
        session.give_back(stream)
        if header.code or header.payload_length != len(buffer):
            raise PeerError(f"the peer could not read either: {describe_errno(header.code)}")

    def _repair_read(self, buffer: memoryview, offset: int, error: DeviceError) -> None:
        """The local disk could not read: answer from the peer, and write that back, so that the sector is remapped.

        Only the blocks that can't be read here: of the others this side's copy counts, which may differ.
        """
        if self.session is None:
            raise error
        start = offset // BLOCK_BYTES * BLOCK_BYTES
        end = -(-(offset + len(buffer)) // BLOCK_BYTES) * BLOCK_BYTES
        whole = memoryview(bytearray(end - start))
        ticket = self.lock_range(start, len(whole))
        first, last = 0, -1
        try:
            unreadable: list[tuple[int, memoryview]] = []
            self._read_what_can_be(whole, start, unreadable)
            for at, part in unreadable:
                self._read_from_peer(part, at)
            buffer[:] = whole[offset - start : offset - start + len(buffer)]
            log.error("%s; %d blocks answered from the peer, and written again", error, len(unreadable))
            self.read_errors += 1
            if max(self.read_errors, len(unreadable)) > READ_ERRORS_MAX:
                self.disk_failed(error)
                return
            try:
                # A power cut may tear this write like any other (invariant log-before-write).
                extents = extents_of(start, len(whole))
                self._log_writer.hold(*extents)
                first, last = extents
                for at, part in unreadable:
                    self._store.write(part, at, True)
                    self._store.read_into(part, at)
            except DeviceError as second:
                self.disk_failed(second)
        finally:
            self.unlock(ticket, first, last)

    def _read_what_can_be(self, part: memoryview, offset: int, unreadable: list[tuple[int, memoryview]]) -> None:
        """Read by halves around what can't be read; once that is more blocks than are borne, nothing is tried."""
        if len(unreadable) <= READ_ERRORS_MAX:
            try:
                self._store.read_into(part, offset)
                return
            except DeviceError:
                half = len(part) // BLOCK_BYTES // 2 * BLOCK_BYTES
                if half:
                    self._read_what_can_be(part[:half], offset, unreadable)
                    self._read_what_can_be(part[half:], offset + half, unreadable)
                    return
        unreadable.append((offset, part))

    def disk_failed(self, error: DeviceError) -> bool:
        """The replica is Failed. True when the volume goes on through the peer's copy, which then knows about it."""
        with self._fail_lock:
            self.replica.fail(error)
            if self.peer_only:
                return True
            session = self.session
            if session is None or not self.peer_reads_ok:
                return False
            try:
                session.request("primary_disk_failed", timeout_s=5.0, generation=self.replica.runtime.random_number())
            except MirrorError as refusal:
                log.error("the volume can't go on through the peer: %s", refusal)
                return False
            self.peer_only = True
            log.error("the volume goes on through the peer's copy alone")
            return True

    # Ranges, flush and log

    def lock_range(self, offset: int, length: int) -> Ticket:
        """Wait until nothing else works on this range; for repairs and the resync."""
        with self._books:
            ticket = self._ranges.request(offset, length)
            while not ticket.granted:
                self._changed.wait()
            return ticket

    def try_range(self, offset: int, length: int) -> Ticket | None:
        """The same if nothing works on it at this moment; called with the books held."""
        ticket = self._ranges.request(offset, length)
        if ticket.granted:
            return ticket
        self._ranges.unlock(ticket)
        return None

    def running(self) -> int:
        """Requests under way in this process; what waits in a client's socket is not known."""
        return self._active

    def unanswered(self) -> int:
        """Changes on their way and repairs; what a resync copies is none."""
        with self._books:
            return self._ranges.unanswered()

    def unlock_range(self, ticket: Ticket) -> None:
        self.unlock_ranges([ticket])

    def unlock_ranges(self, tickets: list[Ticket]) -> None:
        with self._books:
            if [ticket for ticket in tickets if self._ranges.unlock(ticket)]:
                self._changed.notify_all()

    @contextlib.contextmanager
    def request_alone(self, offset: int, length: int) -> Iterator[None]:
        """As a request of this range that nobody else works on: no role changes and no session begins inside."""
        self._enter()
        try:
            ticket = self.lock_range(offset, length)
            try:
                yield
            finally:
                self.unlock_range(ticket)
        finally:
            self._leave()

    def suspect(self, session: Session, offset: int, length: int) -> None:
        """The copies may differ in this range. Raises LinkLost when the session is over."""
        with self.request_alone(offset, length):
            self.suspect_locked(session, offset, length)

    def suspect_locked(self, session: Session, offset: int, length: int) -> None:
        """The same, by somebody who holds the range: no write of it runs, and what was answered is stable on both.

        So nothing that a client was answered rests on a resync of these blocks (mirror.core.selection).
        """
        with self._books:
            open_here = self.replica.unstable.is_dirty(offset, length) or self.replica.flushing.is_dirty(offset, length)
        if open_here:
            self.flushes.run_round()
        with self._books:
            if self.session is not session:
                raise LinkLost(session.reason)
            self.replica.suspects.add([(offset, length)])

    def _stabilise(self) -> None:
        """Free slots of the log: what its finished writes touched becomes stable on both, or durably dirty."""
        if self.session is not None:
            self.flushes.run_round()
            return
        with self._books:
            # One step: whatever ends later belongs to the next round, and its dirty bits are not durable yet.
            number = self.replica.round
            self.replica.round += 1
            victims = self.replica.log.victims_waiting()
        self.replica.persist_extents(victims)
        with self._books:
            self.replica.log.stable_through(number)

    def _stabilise_beside(self) -> None:
        """The same in a thread of its own; called with the books held, by a request that runs."""
        try:
            self.replica.runtime.spawn("make-room", self._make_room)
        except OperatorError as error:
            # Whoever needs room makes it himself.
            log.debug("no room is made ahead in the log: %s", error)
            self._log_writer.room_made(False)
        else:
            self._active += 1

    def _make_room(self) -> None:
        """Body of that thread: a request, so that no role changes and no log begins anew meanwhile."""
        well = False
        try:
            self._stabilise()
            well = True
            self._log_writer.mend_left_dirty()
        except MirrorError as error:
            # Whoever needs room tries it himself, and is told.
            log.debug("no room was made ahead in the log: %s", error)
        finally:
            with self._books:
                self._active -= 1
                self._log_writer.room_made(well)

    def wait_applied(self) -> None:
        """Under A and B: until the peer has applied every write answered so far, or the session ended."""
        self._deferred.wait_applied()

    # The gate and the session

    def _enter(self, request: Running | None = None) -> None:
        if request is not None:
            self._under_way.add(request)
        try:
            if self.replica.failed:
                self._await_stand_in(request)
            with self._books:
                if not self._open:
                    self._wait_open(request)
                self._active += 1
        except MirrorError:
            if request is not None:
                self._under_way.discard(request)
            raise

    def _leave(self, request: Running | None = None) -> None:
        with self._books:
            if request is not None:
                self._under_way.discard(request)
            self._active -= 1
            if self._active == 0 and not self._open:
                self._changed.notify_all()

    def _wait_open(self, request: Running | None) -> None:
        if request is not None:
            request.waits_for = GATE
        while self.gate is Gate.HELD or (self._paused and self.gate is Gate.OPEN):
            self._changed.wait()
        if self.gate is Gate.CUT:
            raise ConnectionCut("this replica stopped serving; the request stays unanswered")
        if self.gate is Gate.CLOSED:
            raise NotPrimary("this replica is not the primary")
        if request is not None:
            request.waits_for = PYTHON

    def set_gate(self, gate: Gate) -> None:
        with self._books:
            self.gate = gate
            self._open = gate is Gate.OPEN and not self._paused
            self._changed.notify_all()

    def hold(self, timeout_s: float) -> bool:
        """Let no new request begin and wait for the running ones. False when they did not end in time."""
        self.set_gate(Gate.HELD)
        return self.drain(timeout_s)

    def drain(self, timeout_s: float) -> bool:
        """Wait for the running requests. False when they did not end in time."""
        with self._books:
            return bool(self._changed.wait_for(lambda: self._active == 0, timeout_s))

    def pause(self, timeout_s: float) -> bool:
        """Hold requests until `resume`, whatever the gate is. False when running ones did not end in time."""
        with self._books:
            self._paused = True
            self._open = False
        return self.drain(timeout_s)

    def resume(self) -> None:
        with self._books:
            self._paused = False
            self._open = self.gate is Gate.OPEN
            self._changed.notify_all()

    def let_requests_end(self, timeout_s: float) -> bool:
        """Wait for the requests that run now, while new ones go on. False when that took too long.

        Of those that change something that is a must. The others are waited for because on a disk that hangs nobody
        should be held up, as `pause` would, for what can't end in time.
        """
        runtime = self.replica.runtime
        deadline_s = runtime.now_s() + timeout_s
        with self._books:
            changing, asked = self._ranges.tickets(), self._past_the_gate()
            while not (changing.isdisjoint(self._ranges.tickets()) and asked.isdisjoint(self._past_the_gate())):
                if runtime.now_s() >= deadline_s:
                    return False
                # Looked at now and then: to be told would cost every write something.
                self._changed.wait(CHANGES_LOOK_S)
        return True

    def _past_the_gate(self) -> set[Running]:
        """What was asked of this replica and is being carried out."""
        # A copy, made in one step: they come and go meanwhile.
        return {one for one in list(self._under_way) if one.waits_for != GATE}

    def attach(self, session: Session) -> None:
        """From now on changes go to the peer too; call while the gate holds all requests and none is running.

        Raises OperatorError. Whatever there is by then of it, and of `start`, goes by `detach` and `join`.
        """
        # First: a flush of a stop may use the session as soon as it is there, see its end, and then detach it.
        self.batches = Batches(session, self.replica.runtime)
        self._deferred.attach(session)
        with self._books:
            self.session = session
            self._alone_recorded = False

    def start(self, session: Session) -> None:
        """Let the session's threads on this side begin. Raises OperatorError."""
        assert self.batches is not None
        self.batches.start()
        self._deferred.start(session)

    def detach(self, session: Session) -> None:
        """The session ended: what may be lost on the peer is dirty (invariant unstable-is-dirty). May be repeated."""
        with self._books:
            if self.session is not session:
                return
            self.session = None
            self.peer_reads_ok = False
            self.replica.take_unstable_as_dirty()
            self._changed.notify_all()
        lost = self._deferred.detach(session)
        assert self.batches is not None
        self.batches.close()
        if lost:
            # Answered already, but the peer may lack it: say so durably before anything else happens.
            try:
                self.record_alone()
            except MirrorError as error:
                log.warning("could not record that the peer lacks answered writes: %s", error)

    def alone_is_recorded(self) -> None:
        """A promotion without the peer has recorded the new generation already."""
        with self._alone_lock:
            self._alone_recorded = True

    def in_step(self, session: Session, **changes: object) -> None:
        """Record durably that the peer has everything, unless its session ended meanwhile (then LinkLost)."""
        with self._alone_lock:
            if self.session is not session:
                raise LinkLost(session.reason)
            self.replica.define_contents(
                base=0,
                peer_disk=DiskState.UP_TO_DATE,
                redundancy_lost_at=0.0,
                # Also where a resync of before has ended on the target's side only.
                suspect_parts=(),
                **changes,
            )
            self.peer_reads_ok = True

    def join(self) -> None:
        """Wait for the threads of an ended session."""
        if self.batches is not None:
            self.batches.join()
        self._deferred.join()


def _pieces(offset: int, length: int) -> list[tuple[int, int]]:
    end = offset + length
    return [(at, min(PIECE_BYTES_MAX, end - at)) for at in range(offset, end, PIECE_BYTES_MAX)]


def describe_errno(code: int) -> str:
    return errno.errorcode.get(code, f"error {code}")
