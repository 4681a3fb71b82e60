"""Protocols A and B: changes that are answered before the peer has applied them.

Their range stays locked and their extents stay held in the log until the peer has applied them (invariant same-
order). A: the change is written locally and copied into a bounded queue, then answered; a full queue makes writers
wait; it goes in batches with others. B: the worker itself sends it and waits until the peer says that it has it in
memory; a reaper thread takes the later word that it is applied. A FUA write under A and B goes the way of protocol C,
and under B so does one of many at a time: in a batch the second word would come with the first.

When the session ends, whatever was not applied is dirty, and that is recorded at once: these were answered already.
"""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mirror.change import Change
from mirror.core.errors import LinkLost, PeerError, ProtocolError
from mirror.core.in_flight import InFlight
from mirror.core.limits import IN_FLIGHT_BYTES_MAX, IN_FLIGHT_COUNT_MAX
from mirror.core.range_lock import Ticket
from mirror.core.stages import ANSWER, LINK, PYTHON
from mirror.core.wire import Flag, Header, MessageType
from mirror.link import Poller, Request, Stream
from mirror.replica import extents_of
from mirror.runtime import Thread
from mirror.session import Session

if TYPE_CHECKING:
    from mirror.primary import Primary

# A write into the peer's page cache takes a few microseconds; then its answer follows the word that it is received.
APPLIED_US = 15
# Under protocol A a client need not wait for the link: no longer for the answer than a quick one takes.
QUICK_ANSWER_US = 100


@dataclass(slots=True)
class Pending:
    """A change that was answered and is not applied on the peer yet."""

    deferred: "Deferred"
    session: Session
    number: int
    ticket: Ticket
    kind: MessageType
    flags: int
    offset: int
    length: int
    payload: bytes
    payload_crc: int
    # It has a place in the bounded queue of protocol A.
    queued: bool
    # When it began, if it was alone: what it took until the peer had it tells whether spinning would have paid.
    alone_since_ns: int
    # How long the client waited while its answer was looked for in vain.
    looked_ns: int

    @property
    def request(self) -> Request:
        return Request(self.kind, self.flags, self.offset, self.length, self.payload, self.payload_crc)

    def answered(self, header: Header) -> None:
        self.deferred.check(self.session, header)
        self.deferred.applied(self)

    def lost(self, _reason: str) -> None:
        self.deferred.primary.detach(self.session)


class Deferred:
    """Everything of a session that is answered but not applied. Its lock is the replica's books."""

    def __init__(self, primary: "Primary", protocol: str) -> None:
        self.protocol = protocol
        self.primary = primary
        self._books = primary.replica.books
        self._changed = primary.replica.changed
        self._session: Session | None = None
        self._next = 0
        self._pending: dict[int, Pending] = {}
        self._window = InFlight(IN_FLIGHT_COUNT_MAX, IN_FLIGHT_BYTES_MAX)
        self._threads: list[Thread] = []
        self._poller: Poller | None = None
        self._by_stream: dict[Stream, Pending] = {}

    def takes(self, change: Change, crowd: bool) -> bool:
        """Whether a change goes this way: under A and B, but not with FUA and not while the own disk is Failed."""
        if self.protocol == "C" or change.flags & Flag.FUA or self.primary.peer_only:
            return False
        return self.protocol == "A" or not (crowd and change.may_share)

    def change(self, session: Session, ticket: Ticket, change: Change, spin_us: int, alone_since_ns: int = 0) -> bool:
        """Carry out one change as far as its answer. False when its range stays locked until the peer applied it.

        `spin_us`: it is the only one, and the peer's word may come within so many microseconds.
        """
        if self.protocol == "B":
            stays = self._change_sent(session, ticket, change, spin_us, Flag.ACK_RECEIVED)
        elif spin_us and not self._pending:
            stays = self._change_sent(session, ticket, change, spin_us, 0, alone_since_ns)
        else:
            stays = self._change_queued(session, ticket, change, alone_since_ns)
        if change.span is not None:
            # A place in the queue, or the peer's word that it has it in memory: what waits for the link.
            change.span.lap(ANSWER)
        change.waits_for = PYTHON
        return stays

    def _change_queued(self, session: Session, ticket: Ticket, change: Change, alone_since_ns: int) -> bool:
        """Protocol A: written here, and in the queue."""
        primary = self.primary
        if change.apply_here(primary.replica.store) is not None:
            # Nothing was sent: go the way that knows what to do when only one side can.
            primary.change_both(session, change)
            return True
        copied = bytes(change.payload)
        change.waits_for = LINK
        with self._books:
            while primary.session is session and not self._window.admit(len(copied)):
                self._changed.wait()
            attached = primary.session is session
            if attached:
                primary.flushes.needed = True
                pending = self._register(session, ticket, change, copied, True, alone_since_ns)
        if not attached:
            primary.settle(session, change.offset, change.length, False, None)
            return True
        assert primary.batches is not None
        with contextlib.suppress(LinkLost):  # then whoever ended the session has seen to it
            primary.batches.put(pending)
        return False

    def _register(
        self, session: Session, ticket: Ticket, change: Change, payload: bytes, queued: bool, alone_since_ns: int
    ) -> Pending:
        """Note what is answered from now on; the client's buffer itself is not kept."""
        pending = Pending(
            self,
            session,
            self._next,
            ticket,
            change.message_type,
            change.flags,
            change.offset,
            change.length,
            payload,
            change.payload_crc,
            queued,
            alone_since_ns,
            0 if queued else QUICK_ANSWER_US * 1000,
        )
        self._next += 1
        self._pending[pending.number] = pending
        ticket.answered = True
        return pending

    @staticmethod
    def check(session: Session, header: Header) -> None:
        """Raises PeerError when the peer could not do what it was asked: the session must end then."""
        if header.code:
            session.disk_trouble = True
            raise PeerError(f"the peer could not carry out a write (errno {header.code})")

    def _change_sent(
        self, session: Session, ticket: Ticket, change: Change, spin_us: int, wanted: int, alone_since_ns: int = 0
    ) -> bool:
        """Sent by this worker, which waits for the word that protocol B wants (ACK_RECEIVED), if any.

        What comes after that is left to the reaper, unless it comes while this worker looks for it anyway.
        """
        primary = self.primary
        peer_us = primary.spin.peer_us if spin_us else 0
        flags = wanted | Flag.SPIN if peer_us else wanted
        stream = change.ask_peer(session, flags, peer_us, lent=wanted != 0)
        error = change.apply_here(primary.replica.store)
        change.waits_for = LINK
        peer_has_it = False
        if stream is not None:
            try:
                told = spin_us > 0 and stream.spin(spin_us if wanted else min(spin_us, QUICK_ANSWER_US))
                if not (told or wanted or error is not None):
                    return not self._hand_over(session, stream, ticket, change, alone_since_ns)
                header, _ = stream.receive()
                if header.type not in (MessageType.RECEIVED, MessageType.ANSWER):
                    raise ProtocolError(f"a {header.type.name} message where an answer was due")
                # Mostly the rest has come before this thread was awake.
                applied = header.type is MessageType.ANSWER or stream.spin(APPLIED_US if spin_us else 0)
                if error is not None or applied:
                    # Its answer is here, where no poller need see it, or our own error is to be settled.
                    if header.type is MessageType.RECEIVED:
                        header, _ = stream.receive_answer()
                    peer_has_it = header.code == 0
                    session.give_back(stream)
                else:
                    return not self._hand_over(session, stream, ticket, change)
            except (LinkLost, ProtocolError) as lost:
                session.end(lost.message)
        if not peer_has_it:
            session.disk_trouble = stream is not None
            session.end("the peer could not carry out a write")
            primary.detach(session)
        primary.settle(session, change.offset, change.length, peer_has_it, error)
        return True

    def _hand_over(
        self, session: Session, stream: Stream, ticket: Ticket, change: Change, alone_since_ns: int = 0
    ) -> bool:
        """The peer has it in memory: let the reaper wait for the rest. False when the session ended meanwhile."""
        primary = self.primary
        with self._books:
            poller = self._poller if primary.session is session else None
            if poller is not None:
                # First, for it may refuse: what is registered is unlocked by whoever ends the session.
                poller.add(stream)
                primary.flushes.needed = True
                self._by_stream[stream] = self._register(session, ticket, change, b"", False, alone_since_ns)
        if poller is None:
            primary.settle(session, change.offset, change.length, False, None)
            return False
        return True

    def _reap(self, session: Session, poller: Poller) -> None:
        """Body of the reaper thread: the later word on changes that were sent and are answered."""
        while ready := poller.wait():
            for stream in ready:
                try:
                    header, _ = stream.receive_answer()
                    self.check(session, header)
                except PeerError as lost:
                    session.end(lost.message)
                    self.primary.detach(session)
                    return
                with self._books:
                    poller.remove(stream)
                    pending = self._by_stream.pop(stream, None)
                if pending is not None:
                    self.applied(pending)
                session.give_back(stream)

    def applied(self, pending: Pending) -> None:
        """The peer has it as well."""
        with self._books:
            if self._pending.pop(pending.number, None) is None:
                return  # the session ended first, and detach has seen to it
            if pending.queued:
                self._window.done(len(pending.payload))
            replica = self.primary.replica
            # Between the two steps of a detachment what is unstable has been taken as dirty already.
            attached = self.primary.session is not None
            (replica.unstable if attached else replica.dirty).mark(pending.offset, pending.length)
            if replica.suspects.any and attached:
                replica.suspects.written(pending.offset, pending.length)
        self.primary.unlock(pending.ticket, *extents_of(pending.offset, pending.length))
        if pending.alone_since_ns:
            # A look in vain counts twice, for the client has nothing of it.
            since_ns = pending.alone_since_ns - pending.looked_ns
            self.primary.spin.note(pending.looked_ns > 0, since_ns, self.primary.trace.start())
        with self._books:
            self._changed.notify_all()

    def wait_applied(self) -> None:
        """Wait until the peer has applied every change answered so far, or the session ended."""
        if self.protocol == "C":
            return
        with self._books:
            limit = self._next
            self._changed.wait_for(lambda: next(iter(self._pending), limit) >= limit)

    def attach(self, session: Session) -> None:
        with self._books:
            if self.protocol != "C":
                self._poller = Poller()
            self._session = session

    def start(self, session: Session) -> None:
        """Let the reaper begin; `detach` and `join` do without it too."""
        if self._poller is not None:
            self._threads = [self.primary.replica.runtime.spawn("reaper", self._reap, session, self._poller)]

    def detach(self, session: Session) -> bool:
        """Mark whatever is not applied as dirty and let it go. True when there was any."""
        with self._books:
            if self._session is not session:
                return False
            self._session = None
            lost = list(self._pending.values())
            self._pending.clear()
            self._by_stream.clear()
            self._window = InFlight(IN_FLIGHT_COUNT_MAX, IN_FLIGHT_BYTES_MAX)
            for pending in lost:
                self.primary.replica.dirty.mark(pending.offset, pending.length)
            if self._poller is not None:
                self._poller.close()
            self._changed.notify_all()
        for pending in lost:
            self.primary.unlock(pending.ticket, *extents_of(pending.offset, pending.length))
        return bool(lost)

    def join(self) -> None:
        """Wait for the threads of an ended session, and leave nothing of it behind."""
        for thread in self._threads:
            if not self.primary.replica.runtime.is_current(thread):
                thread.join()
        self._threads = []
        if self._poller is not None:
            self._poller.free()
            self._poller = None
