"""One change of the volume on its way: what the peer is sent, and how this side applies it.

A write, a zero and a trim differ in nothing else, so every protocol takes the same object.
"""

from mirror.batches import Awaited, Batches
from mirror.core.errors import DeviceError, LinkLost
from mirror.core.limits import PARKED_BYTES_MAX
from mirror.core.stages import DISK, INTERPRETER, LINK, OWN_DISK, SEND, WRITE
from mirror.core.wire import Flag, MessageType
from mirror.flush import AHEAD
from mirror.link import Request, Stream
from mirror.running import Running
from mirror.runtime import Lock
from mirror.session import Session
from mirror.spans import Span
from mirror.store import Store

# Up to what NFS servers and copying programs mostly write; in larger ones a wake-up is little.
TYPICAL_BYTES_MAX = 64 * 1024
# Larger ones go by streams of their own: copying them is what takes time, and several are copied at once.
SHARED_BYTES_MAX = 32 * 1024

KINDS = {MessageType.WRITE: WRITE, MessageType.ZERO: "zero", MessageType.TRIM: "trim"}


class Change(Running):
    """`message_type` says what it is, `flags` whether durably and whether a zero may leave a hole.

    The payload is the client's buffer, valid until the answer. `payload_crc` was taken when the client's request came
    in: whatever happens to the payload from then on, in this process or on the way, the peer sees it before it writes.
    """

    __slots__ = (
        "awaited",
        "flags",
        "flush_behind",
        "message_type",
        "parked_as",
        "parked_in",
        "payload",
        "payload_crc",
        "stream",
    )

    def __init__(
        self,
        message_type: MessageType,
        flags: int,
        offset: int,
        length: int,
        started_ns: int = 0,
        payload: memoryview | bytes = b"",
        payload_crc: int = 0,
        span: Span | None = None,
    ) -> None:
        super().__init__(KINDS[message_type], offset, length, started_ns, span)
        self.message_type = message_type
        self.flags = flags
        self.payload = payload
        self.payload_crc = payload_crc
        # A session and what is said in it, where it is sent to be parked; and how the peer's answer comes.
        self.parked_in: Session | None = None
        self.parked_as = 0
        self.stream: Stream | None = None
        self.awaited: Awaited | None = None
        # On the stream, behind what is asked for here.
        self.flush_behind = False

    @property
    def is_typical(self) -> bool:
        """A small write that waits for no disk: its latency may be compared with those of others."""
        return self.message_type is MessageType.WRITE and self.length <= TYPICAL_BYTES_MAX and not self.flags & Flag.FUA

    @property
    def may_share(self) -> bool:
        """The peer carries it out at once, and it is small: it may go in a batch with others."""
        return self.length <= SHARED_BYTES_MAX and not self.flags & Flag.FUA

    @property
    def may_be_parked(self) -> bool:
        """The peer may keep it until it may be applied."""
        small = 0 < self.length <= PARKED_BYTES_MAX
        return small and self.message_type is MessageType.WRITE and not self.flags & Flag.FUA

    def _request(self, flags: int, number: int) -> Request:
        flags |= self.flags
        return Request(self.message_type, flags, self.offset, self.length, self.payload, self.payload_crc, number)

    def queue_for_peer(self, batches: Batches, done: Lock, flags: int = 0, number: int = 0) -> None:
        """Send it together with others. When the session has ended no answer is awaited."""
        span = self.span
        if span is not None:
            flags |= Flag.TIMED
            span.lap(INTERPRETER)
        awaited = Awaited(self._request(flags, number), done)
        try:
            batches.put(awaited)
        except LinkLost:
            return
        self.awaited = awaited
        if span is not None:
            span.lap(SEND)

    def ask_peer(
        self, session: Session, flags: int = 0, number: int = 0, lent: bool = True, flush_follows: bool = False
    ) -> Stream | None:
        """Send it; the answer comes on the stream returned. None when the link is lost: the session has ended then.

        `number`: what `flags` say. `lent`: the client is not answered, so its buffer is not used again, before the peer
        has the payload. `flush_follows`: it may go with it.
        """
        span = self.span
        if span is not None:
            flags |= Flag.TIMED
            span.lap(INTERPRETER)
        self.waits_for = LINK
        try:
            stream = session.borrow()
            if flush_follows and session.only_one_lent():
                stream.send_requests((self._request(flags, number), AHEAD))
                self.flush_behind = True
            else:
                stream.send(
                    self.message_type,
                    self.flags | flags,
                    self.offset,
                    self.length,
                    self.payload,
                    number=number,
                    payload_crc=self.payload_crc,
                    lent=lent,
                )
        except LinkLost as lost:
            session.end(lost.message)
            return None
        if span is not None:
            span.lap(SEND)
        return stream

    def apply_here(self, store: Store) -> DeviceError | None:
        """What the own disk said to it, if it refused."""
        span = self.span
        if span is not None:
            span.lap(INTERPRETER)
        self.waits_for = DISK
        durable = self.flags & Flag.FUA != 0
        try:
            if self.message_type is MessageType.WRITE:
                store.write(self.payload, self.offset, durable)
                if not durable and store.commits.likely:
                    # Now, because the peer's answer has yet to come, mostly.
                    store.write_back_soon(self.offset, self.length)
            elif self.message_type is MessageType.ZERO:
                store.zero(self.offset, self.length, self.flags & Flag.MAY_TRIM != 0, durable)
            else:
                store.trim(self.offset, self.length, durable)
        except DeviceError as error:
            return error
        if span is not None:
            span.lap(OWN_DISK)
        return None
