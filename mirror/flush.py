"""Flush rounds of the primary: local disk and peer in parallel, one round shared by all who came before it began.

A round covers the writes that were answered before it began; a flush that arrives later may not join it (invariant
flush). A flush is elided only when no write was answered since the last round began and that round is over; after a
start or a promotion nothing is known to be flushed.

The peer's part may have been sent ahead, behind the write that a client's flush follows as a habit. It stands for the
round if it covers all that was answered when that begins: nothing else was under way when it was sent, and nothing was
begun since (Session.only_one_lent, take_ahead). It has nothing to say of parked writes, for a round that begins
before the write is answered does not wait for it; where there is news of them, no flush is sent ahead.
"""

from typing import TYPE_CHECKING

from mirror.core.errors import DeviceError, LinkLost, MirrorError, PeerError
from mirror.core.parked import encode_news
from mirror.core.stages import ANSWER, DISK, FLUSH, LINK, OWN_DISK, ROUND, SEND
from mirror.core.wire import Flag, MessageType
from mirror.link import Request
from mirror.running import Running
from mirror.spans import Span

if TYPE_CHECKING:
    from mirror.link import Stream
    from mirror.primary import Primary
    from mirror.session import Session


# That part, to be sent behind the write.
AHEAD = Request(MessageType.FLUSH, Flag.SPIN | Flag.TIMED, 0, 0, b"", 0)


class FlushRounds:
    """`needed`: a write was answered since the last round began. Set before the write's answer."""

    def __init__(self, primary: "Primary") -> None:
        self.needed = True
        self._primary = primary
        self._changed = primary.replica.runtime.condition()
        self._begun = 0
        self._finished = 0
        self._errors: dict[int, MirrorError] = {}
        # What is known so far of the round that runs.
        self._failed: MirrorError | None = None

    def flush(self, request: Running | None = None) -> None:
        """Make everything answered so far stable on every connected replica; nothing to do is free."""
        if not self.needed:
            with self._changed:
                if not self.needed and self._begun == self._finished:
                    return
        self.run_round(request)

    def run_round(self, request: Running | None = None) -> None:
        """Take part in the next round to begin; lead it when nobody else does. Raises what the round ended with."""
        span = None if request is None else request.span
        if request is not None:
            request.waits_for = FLUSH
        with self._changed:
            mine = self._begun + 1
            while self._finished < mine:
                if self._begun == self._finished:
                    self._begun = mine
                    break
                self._changed.wait()
            else:
                if span is not None:
                    span.lap(ROUND)
                if mine in self._errors:
                    raise self._errors[mine]
                return
        # Until it has ended well, whoever shares the round must not take it for done.
        self._failed = PeerError("the flush ended on a bug of ours; the log tells more")
        try:
            self._round(request)
            self._failed = None
        except MirrorError as error:
            self._failed = error
            self.needed = True
            raise
        finally:
            self._end_round(mine)

    def _end_round(self, number: int) -> None:
        """Wake those who shared it; they look at its result before two further rounds can end."""
        with self._changed:
            self._finished = number
            self._errors = {past: error for past, error in self._errors.items() if past > number - 64}
            if self._failed is not None:
                self._errors[number] = self._failed
            self._changed.notify_all()

    def _round(self, request: Running | None) -> None:
        span = None if request is None else request.span
        primary, replica = self._primary, self._primary.replica
        with replica.books:
            number = replica.round
            replica.round += 1
            self.needed = False
            session = primary.session
            replica.flushing.merge(replica.unstable)
            replica.unstable.clear_all()
        if span is not None:
            span.lap(ROUND)
        primary.wait_applied()
        asked = self._ask_peer(session, primary.is_alone(), span)
        if request is not None:
            request.waits_for = DISK
        error = self._flush_here()
        if request is not None:
            request.waits_for = LINK
        if span is not None:
            span.lap(OWN_DISK)
        peer_ok = session is not None and self._await_peer(session, asked, span)
        if error is not None:
            # Known to the peer first, which then is the only good copy.
            if not primary.disk_failed(error) or not peer_ok:
                raise error
        elif not peer_ok:
            primary.record_alone()
        with replica.books:
            if peer_ok and primary.session is session:
                replica.flushing.clear_all()
                replica.log.stable_through(number)

    def _ask_peer(self, session: "Session | None", alone: bool, span: Span | None) -> list["Stream"]:
        """The streams whose answers are the peer's part of the round; none where the session has ended."""
        if session is None:
            return []
        asked = []
        ahead = session.take_ahead()
        if ahead is not None:
            stream, covers_all = ahead
            asked.append(stream)
        if ahead is None or not covers_all:
            flags = (Flag.SPIN if alone else 0) | (Flag.TIMED if span is not None else 0)
            try:
                stream = session.borrow()
                with self._primary.replica.books:
                    news = session.parked.flush_says()
                stream.send(MessageType.FLUSH, flags, payload=b"" if news is None else encode_news(news))
            except LinkLost as lost:
                session.end(lost.message)
                return []
            asked.append(stream)
        if span is not None:
            span.lap(SEND)
        return asked

    def _flush_here(self) -> DeviceError | None:
        if not self._primary.peer_only:
            try:
                self._primary.replica.store.flush()
            except DeviceError as error:
                return error
        return None

    def _await_peer(self, session: "Session", streams: list["Stream"], span: Span | None) -> bool:
        """Whether the peer's disk is flushed; if not, the session has ended and its blocks are dirty."""
        try:
            if not streams:
                raise LinkLost(session.reason)
            for stream in streams:
                header, _ = stream.receive_answer()
                if header.code:
                    session.disk_trouble = True
                    raise PeerError("the peer could not flush its disk")
                session.give_back(stream)
            if span is not None:
                span.lap(ANSWER)
                span.peer_ns = header.number
            return True
        except PeerError as lost:
            session.end(lost.message)
        self._primary.detach(session)
        return False
