"""One change of the volume on its way: what the peer is sent, and how this side applies it.

A write, a zero and a trim differ in nothing else, so every protocol takes the same object.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from mirror.batches import Awaited, Batches
from mirror.core.errors import DeviceError, LinkLost
from mirror.core.stages import INTERPRETER, OWN_DISK, SEND
from mirror.core.wire import Flag, MessageType
from mirror.link import Request, Stream
from mirror.runtime import Lock
from mirror.session import Session
from mirror.spans import Span

# Twice the pages of databases.
TYPICAL_BYTES_MAX = 16 * 1024
# Larger ones go by streams of their own: copying them is what takes time, and several are copied at once.
SHARED_BYTES_MAX = 32 * 1024


class Change(NamedTuple):
    """`apply(*arguments)` carries it out here; the last argument says whether durably. The payload is the client's
    buffer, valid until the answer.

    `payload_crc` was taken when the client's request came in: whatever happens to the payload from then on, in this
    process or on the way, the peer sees it before it writes.
    """

    kind: MessageType
    flags: int
    offset: int
    length: int
    payload: memoryview | bytes
    apply: Callable[..., None]
    arguments: tuple[Any, ...]
    payload_crc: int = 0
    # It is one of those whose stages are measured.
    span: Span | None = None

    @property
    def is_typical(self) -> bool:
        """A small write that waits for no disk: its latency may be compared with those of others."""
        return self.kind is MessageType.WRITE and self.length <= TYPICAL_BYTES_MAX and not self.flags & Flag.FUA

    def made_durable(self) -> "Change":
        """The same, stable on both sides before it is answered."""
        return self._replace(flags=self.flags | Flag.FUA, arguments=(*self.arguments[:-1], True))

    @property
    def may_share(self) -> bool:
        """The peer carries it out at once, and it is small: it may go in a batch with others."""
        return self.length <= SHARED_BYTES_MAX and not self.flags & Flag.FUA

    def queue_for_peer(self, batches: Batches, done: Lock) -> Awaited | None:
        """Send it together with others. None when the session has ended."""
        flags = self.flags
        span = self.span
        if span is not None:
            flags |= Flag.TIMED
            span.lap(INTERPRETER)
        awaited = Awaited(Request(self.kind, flags, self.offset, self.length, self.payload, self.payload_crc), done)
        try:
            batches.put(awaited)
        except LinkLost:
            return None
        if span is not None:
            span.lap(SEND)
        return awaited

    def ask_peer(self, session: Session, flags: int = 0, spin_us: int = 0) -> Stream | None:
        """Send it; the answer comes on the stream returned. None when the link is lost: the session has ended then.

        With `spin_us` the peer looks so long for the next one before it sleeps.
        """
        if spin_us:
            flags |= Flag.SPIN
        span = self.span
        if span is not None:
            flags |= Flag.TIMED
            span.lap(INTERPRETER)
        try:
            stream = session.borrow()
            stream.send(
                self.kind,
                self.flags | flags,
                self.offset,
                self.length,
                self.payload,
                number=spin_us,
                payload_crc=self.payload_crc,
            )
        except LinkLost as lost:
            session.end(lost.message)
            return None
        if span is not None:
            span.lap(SEND)
        return stream

    def apply_here(self) -> DeviceError | None:
        """What the own disk said to it, if it refused."""
        span = self.span
        if span is not None:
            span.lap(INTERPRETER)
        try:
            self.apply(*self.arguments)
        except DeviceError as error:
            return error
        if span is not None:
            span.lap(OWN_DISK)
        return None
