"""One session of two replicas: its streams, its control requests, its heartbeats, its end.

A session has a number that both sides agreed on, one control stream, and data streams in both directions: the
`outgoing` ones carry this side's requests, the `incoming` ones the peer's. Whoever sends a request on an outgoing
stream waits for its answer on the same stream, so a worker needs no other thread on the way. Resync has streams of
its own, so that foreground writes never wait behind a megabyte of it.

A session ends once and for all (invariant one-session): by either side's word, a lost connection, a message out of
order, or silence. Its end wakes everybody who waits in it with LinkLost.
"""

import json
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from mirror.core.errors import LinkLost, MirrorError, OperatorError, PeerError, ProtocolError
from mirror.core.generation import Outcome, Standing
from mirror.core.limits import CONTROL_BYTES_MAX, DATA_STREAMS, REQUEST_BYTES_MAX, SILENT_S, SYNC_STREAMS
from mirror.core.parked import ParkedNumbers
from mirror.core.wire import MessageType, decode_object, words
from mirror.link import Stream
from mirror.runtime import Runtime

# Heartbeats in one peer timeout: a lost one must not count, and the loss be seen well within the timeout.
HEARTBEATS_PER_TIMEOUT = 20
# However long the timeout, so that a silence is known as one long before it ends the session.
HEARTBEAT_INTERVAL_S_MAX = 0.2
SILENCES_KEPT = 8
# The part of the peer timeout after which silence ends a session; the rest is for recording the loss durably, so that
# writes are held up for no longer than the timeout altogether.
SILENCE_PART = 0.75

# A peer that does not take its leave in this time finds out by itself.
GOODBYE_TIMEOUT_S = 1.0

COUNTER = struct.Struct("<Q")


class Session:
    """A live session. `end` may be called from any thread; `closed` runs after the last user of a stream is gone."""

    def __init__(
        self,
        runtime: Runtime,
        number: int,
        control: Stream,
        peer: Standing,
        outcome: Outcome,
        on_end: Callable[["Session", str], None],
    ) -> None:
        self.number = number
        self.peer = peer
        self.outcome = outcome
        self.control = control
        self.outgoing: list[Stream] = []
        self.incoming: list[Stream] = []
        self.sync_outgoing: list[Stream] = []
        self.sync_incoming: list[Stream] = []
        self._arrived: dict[tuple[bool, int], Stream] = {}
        self.ended = False
        self.orderly = False
        self.reason = ""
        # It ended because a disk could not do its part, so that beginning anew at once would only fail again.
        self.disk_trouble = False
        self.peer_can_fast_zero = False
        # It keeps suspects and answers what a verify asks; older releases don't.
        self.peer_compares = False
        # It keeps writes that it must not apply yet; older releases don't. Their numbers, under the replica's books.
        self.peer_parks = False
        self.parked = ParkedNumbers()
        # It answers a write before it carries out a flush that came behind it; older releases don't.
        self.peer_answers_first = False
        # The stream of a flush that was sent behind a write, before anybody asked for it.
        self._flushed_ahead: list[Stream] = []
        # Whose request began last.
        self._last_lent: Stream | None = None
        self._runtime = runtime
        self._on_end = on_end
        self._send_lock = runtime.lock()
        self._changed = runtime.condition()
        self._free: list[Stream] = []
        self._sync_free: list[Stream] = []
        self._waiters = 0
        self._requests: dict[int, dict[str, Any] | None] = {}
        self._next_request = 0
        self.heard_at_s = runtime.now_s()
        # The latest silences that ended: from when to when.
        self.silences: deque[tuple[float, float]] = deque(maxlen=SILENCES_KEPT)
        self._progress: dict[int, tuple[int, float]] = {}

    # Streams

    def attach(self, index: int, stream: Stream, ours: bool) -> None:
        """Add data stream `index` of a direction; they may arrive in any order."""
        stream.session = self.number
        stream.asked_from = stream.sent
        stream.payload_bytes_max = REQUEST_BYTES_MAX
        self._arrived[ours, index] = stream

    @property
    def complete(self) -> bool:
        return len(self._arrived) == 2 * (DATA_STREAMS + SYNC_STREAMS)

    def assemble(self) -> None:
        """All streams are here: the first DATA_STREAMS of a direction are for writes, the others for resync."""
        ours, theirs = (
            [self._arrived[direction, index] for index in range(DATA_STREAMS + SYNC_STREAMS)]
            for direction in (True, False)
        )
        self.outgoing, self.sync_outgoing = ours[:DATA_STREAMS], ours[DATA_STREAMS:]
        self.incoming, self.sync_incoming = theirs[:DATA_STREAMS], theirs[DATA_STREAMS:]
        self._free = list(self.outgoing)
        self._sync_free = list(self.sync_outgoing)

    def borrow(self) -> Stream:
        """A stream for one request and its answer, to be given back unless it failed. Raises LinkLost."""
        try:
            stream = self._free.pop()
        except IndexError:
            stream = self._wait_for(self._free)
        self._last_lent = stream
        return stream

    def give_back(self, stream: Stream) -> None:
        self._free.append(stream)
        if self._waiters:
            with self._changed:
                self._changed.notify_all()

    def borrow_sync(self) -> Stream:
        try:
            stream = self._sync_free.pop()
        except IndexError:
            stream = self._wait_for(self._sync_free)
        self._last_lent = stream
        return stream

    def only_one_lent(self) -> bool:
        """Nothing is under way but on the caller's stream: the peer has applied whatever else it was asked.

        Of parked writes that holds where a flush has told it so, which is over: it had a stream lent.
        """
        lent = DATA_STREAMS - len(self._free) + SYNC_STREAMS - len(self._sync_free)
        return lent == 1 and self.parked.all_said

    def flushes_ahead(self, stream: Stream) -> None:
        """A flush was sent behind what was answered on it; to be given back by whoever takes it."""
        self._flushed_ahead.append(stream)

    def take_ahead(self) -> tuple[Stream, bool] | None:
        """The stream of a flush that was sent already, and whether nothing was asked of the peer since."""
        try:
            stream = self._flushed_ahead.pop()
        except IndexError:
            return None
        return stream, self._last_lent is stream

    def give_back_sync(self, stream: Stream) -> None:
        self._sync_free.append(stream)
        if self._waiters:
            with self._changed:
                self._changed.notify_all()

    def _wait_for(self, free: list[Stream]) -> Stream:
        with self._changed:
            # Counted before the list is looked at again: a giver that saw no waiter has appended before that look.
            self._waiters += 1
            try:
                self._changed.wait_for(lambda: free or self.ended)
                if self.ended:
                    raise LinkLost(self.reason)
                return free.pop()
            finally:
                self._waiters -= 1

    # The end

    def rest(self, timeout_s: float) -> None:
        """Let time pass. Raises LinkLost as soon as the session has ended."""
        with self._changed:
            if self._changed.wait_for(lambda: self.ended, timeout_s):
                raise LinkLost(self.reason)

    def end(self, reason: str, orderly: bool = False) -> None:
        """End the session for good; the first reason stands. `orderly`: somebody wanted it so."""
        with self._changed:
            if self.ended:
                return
            self.ended = True
            self.orderly = self.orderly or orderly
            self.reason = reason
            self._changed.notify_all()
        for stream in self.streams():
            stream.shutdown()
        self._on_end(self, reason)

    def part(self, reason: str, **facts: object) -> None:
        """Tell the peer that the session ends by somebody's will, and what else it can know; wait until it does."""
        self.orderly = True
        try:
            self.request("bye", GOODBYE_TIMEOUT_S, reason=reason, **facts)
        except MirrorError:
            pass  # its answer is the end of the session

    def streams(self) -> list[Stream]:
        return [self.control, *list(self._arrived.values())]

    def close(self) -> None:
        """Give the descriptors back; only after every thread that used a stream has ended."""
        for stream in self.streams():
            stream.close()

    # Control: requests and notices in JSON, answered in order of arrival by the peer's control thread

    def notify(self, operation: str, **arguments: Any) -> None:
        """Send a notice that is not answered. A lost link is seen by whoever reads the stream."""
        self._send_control({"op": operation, **arguments})

    def request(self, operation: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Ask the peer and wait for its answer.

        Raises OperatorError with the peer's words when it refuses, LinkLost when the session ends first,
        PeerError when it does not answer in time (the session goes on).
        """
        with self._changed:
            self._next_request += 1
            number = self._next_request
            self._requests[number] = None
        try:
            self._send_control({"op": operation, "request": number, **arguments})
            with self._changed:
                self._changed.wait_for(lambda: self.ended or self._requests[number] is not None, timeout_s)
                answer = self._requests[number]
        finally:
            with self._changed:
                del self._requests[number]
        if answer is None:
            if self.ended:
                raise LinkLost(self.reason)
            raise PeerError(f"the peer did not answer {operation!r} within {timeout_s:g} s")
        if "error" in answer:
            raise OperatorError(words(answer["error"]), remedy=words(answer.get("remedy", "")))
        return answer

    def _send_control(self, message: dict[str, Any]) -> None:
        payload = json.dumps(message).encode()
        if len(payload) > CONTROL_BYTES_MAX:
            raise PeerError(f"a control message of {len(payload)} bytes is over the limit of {CONTROL_BYTES_MAX}")
        with self._send_lock:
            self.control.send(MessageType.CONTROL, payload=payload)

    def serve_control(self, handle: Callable[["Session", dict[str, Any]], dict[str, Any] | None]) -> None:
        """Body of the control thread: read until the session ends. `handle` returns the answer to a request."""
        try:
            while not self.ended:
                header, payload = self.control.receive()
                self._note_sign_of_life()
                if header.type == MessageType.HEARTBEAT:
                    self._check_heartbeat(bytes(payload))
                elif header.type == MessageType.CONTROL:
                    self._dispatch(decode_object(payload, "a control message"), handle)
                else:
                    raise ProtocolError(f"a {header.type.name} message on the control stream")
        except (LinkLost, ProtocolError) as error:
            self.end(error.message)

    def _dispatch(
        self, message: dict[str, Any], handle: Callable[["Session", dict[str, Any]], dict[str, Any] | None]
    ) -> None:
        if "answer" in message:
            number = message["answer"]
            if type(number) is not int:
                raise ProtocolError(f"an answer to the request {words(number)}")
            with self._changed:
                if number in self._requests:
                    self._requests[number] = message
                    self._changed.notify_all()
            return
        try:
            answer = handle(self, message) or {}
        except ProtocolError:
            raise
        except MirrorError as error:
            answer = {"error": error.message, "remedy": error.remedy}
        if "request" in message:
            self._send_control({**answer, "answer": message["request"]})

    def _note_sign_of_life(self) -> None:
        now_s = self._runtime.now_s()
        if now_s - self.heard_at_s > SILENT_S:
            self.silences.append((self.heard_at_s, now_s))
        self.heard_at_s = now_s

    # Heartbeats

    def beat(self) -> None:
        """Tell the peer that we live, and how far each stream has got (a lost tail is seen by it)."""
        counters = [stream.sent for stream in (*self.outgoing, *self.sync_outgoing)]
        payload = b"".join(map(COUNTER.pack, counters))
        with self._send_lock:
            self.control.send(MessageType.HEARTBEAT, payload=payload)

    def _check_heartbeat(self, payload: bytes) -> None:
        incoming = [*self.incoming, *self.sync_incoming]
        if len(payload) != COUNTER.size * len(incoming):
            raise ProtocolError("a heartbeat for another number of streams")
        for index, ((sent,), stream) in enumerate(zip(COUNTER.iter_unpack(payload), incoming, strict=True)):
            self._note_progress(index, stream, stream.received < sent)

    def check_answers(self) -> None:
        """Note for each outgoing stream whether the peer still owes an answer."""
        for index, stream in enumerate((*self.outgoing, *self.sync_outgoing)):
            # A flush that nobody asked for is answered all the same, and its answer left for the next round.
            answered = stream in self._flushed_ahead and stream.has_more
            self._note_progress(-1 - index, stream, stream.owed and not answered)

    def _note_progress(self, key: int, stream: Stream, owed: bool) -> None:
        """Since when nothing has moved on a stream on which something is owed, no message and no byte of one.

        Bytes count, because a large request, or what gathers under protocol A, may be on its way for minutes.
        """
        if not owed:
            self._progress.pop(key, None)
            return
        position = stream.received + stream.moved_bytes
        known = self._progress.get(key)
        if known is None or known[0] != position:
            self._progress[key] = (position, self._runtime.now_s())

    def watch(self, peer_timeout_s: float, disk_timeout_s: float, on_beat: Callable[["Session"], None]) -> None:
        """Body of the monitor thread: beat, and end the session on silence or on a request that is never answered.

        `on_beat` says what else is to be said now and then.
        """
        interval_s = min(peer_timeout_s / HEARTBEATS_PER_TIMEOUT, HEARTBEAT_INTERVAL_S_MAX)
        silence_s = peer_timeout_s * SILENCE_PART
        try:
            while not self.ended:
                self.beat()
                on_beat(self)
                with self._changed:
                    self._changed.wait_for(lambda: self.ended, interval_s)
                now_s = self._runtime.now_s()
                if now_s - self.heard_at_s > silence_s:
                    self.end(f"no sign of life from the peer for {now_s - self.heard_at_s:.1f} s")
                self.check_answers()
                # The peer lives, so an owed answer or an unread message on its own means that its disk is slow.
                oldest_s = min((since for _, since in list(self._progress.values())), default=now_s)
                if now_s - oldest_s > disk_timeout_s:
                    self.end(f"a request was not carried out within {disk_timeout_s:g} s (disk_timeout_s)")
        except (LinkLost, ProtocolError) as error:
            self.end(error.message)
