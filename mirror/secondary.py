"""Apply what the peer sends, and answer.

One thread waits for all streams of a kind and applies plain writes itself: a hand-over to another thread costs more
than the write. What waits for the disk (flushes, FUA writes beside others, reads) goes to a few workers, so that it
holds up nobody else. The order of overlapping changes is the sender's business: it keeps a range locked until this
side has answered.

A *parked* write is kept and answered, and applied when it may be (mirror.parking).

A disk error here is answered with its errno, and the peer then drops this replica: a full disk leaves it Outdated,
any other error Failed (invariants flush, say-why). Of a flush it also says that the session shall end.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

import lz4.block

from mirror.confirmer import Confirmer
from mirror.core import resync
from mirror.core.errors import DeviceError, LinkLost, ProtocolError
from mirror.core.limits import BLOCK_BYTES, REQUEST_BYTES_MAX, SPIN_US_MAX
from mirror.core.parked import News, decode_news, split_number
from mirror.core.stages import APPLY, APPLY_FLUSH, DISK, DURABLE_APPLY, RECEIVE, REPLY
from mirror.core.wire import Flag, Header, MessageType, crc32c
from mirror.link import Poller, Spare, Stream
from mirror.parking import Parking
from mirror.replica import Replica
from mirror.running import Running
from mirror.runtime import Thread
from mirror.session import Session
from mirror.spans import SAMPLE_EVERY, Spans

log = logging.getLogger(__name__)

# Flushes, FUA writes and reads that wait for the disk at one time.
WORKERS = 4
# Beside a flush that takes less nobody else waits for long.
QUICK_FLUSH_S = 0.001


class Receiver:
    """Serves one group of incoming streams of one session until it ends."""

    def __init__(
        self,
        replica: Replica,
        session: Session,
        streams: list[Stream],
        name: str,
        spans: Spans,
        parking: Parking,
    ) -> None:
        self._replica = replica
        self._parking = parking
        self._spans = spans
        self._under_way = replica.under_way
        self._session = session
        self._streams = streams
        spare = Spare()
        for stream in streams:
            stream.spare = spare
        self._poller = Poller()
        self._lock = replica.runtime.condition()
        self._queue: deque[tuple[Stream, Header, memoryview]] = deque()
        # What a notice said last of parked writes, until a worker has seen to it.
        self._told: News | None = None
        # Streams whose request waits for a worker or is with one.
        self._busy: set[Stream] = set()
        self._ended = False
        self._confirmer = Confirmer(replica.runtime, f"{name}-confirms")
        # How long to look for the next request before sleeping.
        self._spin_us = 0
        # What flushes take of late.
        self._flush_s = QUICK_FLUSH_S
        self._name = name
        self._threads: list[Thread] = []

    def start(self) -> None:
        """Begin to serve; `join` does without some of the threads too."""
        spawn = self._replica.runtime.spawn
        # First, because it ends the others.
        self._threads.append(spawn(self._name, self._serve))
        for number in range(min(WORKERS, len(self._streams))):
            self._threads.append(spawn(f"{self._name}-{number}", self._work))

    def join(self) -> None:
        """Wait until nothing of the ended session can touch the disk any more (invariant drain-before-next)."""
        for thread in self._threads:
            thread.join()
        self._confirmer.join()
        self._poller.free()

    def _serve(self) -> None:
        poller = self._poller
        try:
            for stream in self._streams:
                poller.add(stream)
            while not self._session.ended:
                ready = poller.wait(self._spin_us)
                self._spin_us = 0
                for stream in ready:
                    self._receive(stream, alone=len(ready) == 1)
        except (LinkLost, ProtocolError) as error:
            self._session.end(error.message)
        except Exception as bug:
            # Nobody else serves these streams: the peer must not wait for them.
            self._session.end(f"a bug of ours: {bug!r}")
            raise
        finally:
            with self._lock:
                self._ended = True
                self._lock.notify_all()
            self._confirmer.close()

    def _receive(self, stream: Stream, alone: bool) -> None:
        while True:
            began_ns = 0 if stream.received & (SAMPLE_EVERY - 1) else time.perf_counter_ns()
            header, payload = stream.receive()
            received_ns = time.perf_counter_ns() - began_ns if began_ns else 0
            if stream in self._busy:
                raise ProtocolError("a request behind one that was to be awaited")
            self._check(header, payload)
            if header.type is MessageType.FLUSH:
                # Nobody shall wait for the disk who is answered already.
                stream.send_held()
            if self._waits_for_disk(header, alone):
                if header.flags & Flag.ACK_RECEIVED:
                    stream.send(MessageType.RECEIVED)
                with self._lock:
                    self._busy.add(stream)
                    # A copy: another message on this stream would end the session, and overwrite the payload first.
                    self._queue.append((stream, header, memoryview(bytes(payload))))
                    self._lock.notify_all()
                if stream.buffered:
                    raise ProtocolError("a request behind one that was to be awaited")
                return
            if header.flags & Flag.ACK_RECEIVED:
                self._confirmer.begin(stream, header.length)
            self._answer(stream, header, payload, received_ns)
            if header.flags & Flag.SPIN:
                self._spin_us = min(header.number, SPIN_US_MAX)
            if not stream.buffered:
                return

    def _waits_for_disk(self, header: Header, alone: bool) -> bool:
        """Whether a worker takes it, so that nothing waits behind it; waking one costs more than a quick disk takes."""
        if header.type is MessageType.FLUSH:
            return not (header.flags & Flag.SPIN and alone and self._flush_s < QUICK_FLUSH_S)
        if header.type is MessageType.READ:
            return True
        return bool(header.flags & Flag.FUA) and not alone

    def tell(self, news: News) -> None:
        """What a notice says of parked writes; a worker sees to it, since the disk may be slow."""
        with self._lock:
            self._told = news
            self._lock.notify_all()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._queue or self._told or self._ended)
                told, self._told = self._told, None
                if told is None:
                    if not self._queue:
                        return
                    stream, header, payload = self._queue.popleft()
            try:
                if told is None:
                    self._answer(stream, header, payload)
                else:
                    self._parking.release(told)
            except DeviceError as error:
                self._refused_late(error)
            except (LinkLost, ProtocolError) as error:
                self._session.end(error.message)
            except Exception as bug:
                self._session.end(f"a bug of ours: {bug!r}")
                raise

    def _check(self, header: Header, payload: memoryview) -> None:
        if header.type not in HOW_TO_APPLY:
            raise ProtocolError(f"a {header.type.name} message on a data stream")
        if header.offset + header.length > self._replica.size_bytes or header.length > REQUEST_BYTES_MAX:
            raise ProtocolError(f"a request for {header.length} bytes at {header.offset}, outside the volume")
        if header.type == MessageType.WRITE and not header.flags & Flag.LZ4 and len(payload) != header.length:
            raise ProtocolError(f"a write of {header.length} bytes with {len(payload)} bytes of data")
        if header.type == MessageType.SUMS and (header.offset | header.length) % BLOCK_BYTES:
            raise ProtocolError(f"a request for digests of {header.length} bytes at {header.offset}, no whole blocks")

    def _answer(self, stream: Stream, header: Header, payload: memoryview, received_ns: int = 0) -> None:
        """Carry a request out and say so. `received_ns`: what receiving it took, when its stages are to be measured."""
        # What was confirmed as received may be acknowledged already: it is carried out whatever became of the session.
        if self._session.ended and not header.flags & Flag.ACK_RECEIVED:
            raise LinkLost(self._session.reason)
        answer: bytes | memoryview = b""
        code = 0
        measured = received_ns or header.type is MessageType.FLUSH or header.flags & Flag.TIMED
        began_ns = time.perf_counter_ns()
        applied_ns = 0
        running = Running(APPLY, header.offset, header.length, began_ns)
        running.waits_for = DISK
        self._under_way.add(running)
        try:
            if self._parking.writes or header.flags & Flag.PARK or header.type is MessageType.FLUSH:
                answer = self._apply_beside_parked(header, payload)
            else:
                answer = HOW_TO_APPLY[header.type](self._replica, header, payload)
        except DeviceError as error:
            code = error.errno
            if header.type in CHANGING or self._parking.refused:
                self._disk_error(error)
        finally:
            self._under_way.discard(running)
        if measured:
            applied_ns = time.perf_counter_ns() - began_ns
        self._busy.discard(stream)
        if header.flags & Flag.ACK_RECEIVED:
            self._confirmer.end(stream)
        told_ns = applied_ns if header.flags & Flag.TIMED else 0
        stream.send(MessageType.ANSWER, payload=answer, code=code, number=told_ns, more=stream.buffered)
        if header.type is MessageType.WRITE and (self._replica.store.commits.likely or header.flags & Flag.PARK):
            self._after_write(stream, header)
        if code and header.type is MessageType.FLUSH:
            # It may have been sent ahead, and nobody read that answer until the next round.
            self._session.notify("bye", reason="the peer could not flush its disk", disk_trouble=True)
        if measured and header.type in MEASURED:
            self._note(header, received_ns, applied_ns, time.perf_counter_ns() - began_ns - applied_ns)

    def _apply_beside_parked(self, header: Header, payload: memoryview) -> bytes:
        """A request that is to be parked, or tells or implies what may be applied of what is."""
        parking = self._parking
        if header.type is MessageType.FLUSH:
            if payload:
                parking.release(decode_news(payload))
        else:
            parking.make_way(header.offset, header.length)
            if header.flags & Flag.PARK:
                parking.park(header, payload)
                return b""
        return HOW_TO_APPLY[header.type](self._replica, header, payload)

    def _after_write(self, stream: Stream, header: Header) -> None:
        """What need not be done before the answer."""
        try:
            if header.flags & Flag.PARK:
                _, lowest_open = split_number(header.number)
                self._parking.release(News(lowest_open - 1, ()))
            elif not stream.buffered and not header.flags & (Flag.FUA | Flag.RESYNC):
                # Where something is behind it, that is the flush, or another write.
                self._replica.store.write_back_soon(header.offset, header.length)
        except DeviceError as error:
            self._refused_late(error)

    def _note(self, header: Header, received_ns: int, applied_ns: int, reply_ns: int) -> None:
        """What a client's write or flush took on this side."""
        if header.flags & Flag.RESYNC:
            return
        kind = APPLY_FLUSH if header.type is MessageType.FLUSH else DURABLE_APPLY if header.flags & Flag.FUA else APPLY
        if kind is APPLY_FLUSH:
            self._flush_s += (applied_ns / 1e9 - self._flush_s) / 4
            if not header.flags & Flag.TIMED:
                # Of the mirror's own: of a resync, or to make room in the log. A client's is timed.
                return
        durations_ns = {DISK: applied_ns, REPLY: reply_ns}
        if received_ns:
            durations_ns[RECEIVE] = received_ns
        self._spans.applied(kind, time.perf_counter_ns(), durations_ns, header.offset, header.length)

    def _disk_error(self, error: DeviceError) -> None:
        self._session.disk_trouble = True
        self._replica.drop_out(error)

    def _refused_late(self, error: DeviceError) -> None:
        """What the disk refused was answered already, so the end of the session has to tell."""
        self._disk_error(error)
        self._session.end(str(error))


def _write(replica: Replica, header: Header, payload: memoryview) -> bytes:
    data: memoryview | bytes = payload
    if header.flags & Flag.LZ4:
        try:
            data = lz4.block.decompress(payload, uncompressed_size=header.length)
        except lz4.block.LZ4BlockError as error:
            raise ProtocolError(f"compressed data that can't be read: {error}") from error
        if len(data) != header.length:
            raise ProtocolError(f"compressed data of {len(data)} bytes for {header.length}")
        if crc32c(data) != header.number:
            raise ProtocolError(f"the data of message {header.sequence} is damaged once it is decompressed")
    flags = header.flags
    replica.store.write(data, header.offset, bool(flags & Flag.FUA), bool(flags & Flag.RESYNC))
    return b""


def _zero(replica: Replica, header: Header, _: memoryview) -> bytes:
    flags = header.flags
    replica.store.zero(header.offset, header.length, bool(flags & Flag.MAY_TRIM), bool(flags & Flag.FUA))
    return b""


def _trim(replica: Replica, header: Header, _: memoryview) -> bytes:
    replica.store.trim(header.offset, header.length, bool(header.flags & Flag.FUA))
    return b""


def _flush(replica: Replica, _header: Header, _: memoryview) -> bytes:
    replica.store.flush()
    return b""


def _read(replica: Replica, header: Header, _: memoryview) -> bytes:
    return replica.store.read(header.length, header.offset)


def _sums(replica: Replica, header: Header, _: memoryview) -> bytes:
    return resync.encode_sums(resync.block_sums(replica.store.read(header.length, header.offset)))


# What a disk must not refuse, or the copies differ.
CHANGING = (MessageType.WRITE, MessageType.ZERO, MessageType.TRIM, MessageType.FLUSH)
# Of these a secondary keeps the times.
MEASURED = (MessageType.WRITE, MessageType.FLUSH)

HOW_TO_APPLY: dict[MessageType, Callable[[Replica, Header, memoryview], bytes]] = {
    MessageType.WRITE: _write,
    MessageType.ZERO: _zero,
    MessageType.TRIM: _trim,
    MessageType.FLUSH: _flush,
    MessageType.READ: _read,
    MessageType.SUMS: _sums,
}
