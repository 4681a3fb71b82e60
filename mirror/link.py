"""The link between two replicas: messages over ZMTP streams; the only module that knows ZeroMQ and sockets.

A `Stream` is one TCP connection that speaks ZMTP 3 (ZeroMQ's wire protocol, NULL mechanism), a DEALER at either end. It
carries whole messages in order, each with the session it belongs to and its number in the stream: a gap, a repeat,
a bad checksum or a message of another session raises ProtocolError, and the caller ends the session (invariant
one-session). A lost connection raises LinkLost. Nothing reconnects by itself.

libzmq's own sockets lost: every message changes threads twice at each end (2.5 to 3.4 times the latency of a local
write, measured), and they reconnect silently. The bytes on the wire stay ZeroMQ's; the conformance tests hold each end
against a real libzmq socket.

Threads: one thread sends on a stream and one receives at a time. The control stream has several senders, under a lock.
"""

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

from mirror import lending
from mirror.core import wire
from mirror.core.errors import LinkLost, MirrorError, OperatorError, ProtocolError
from mirror.core.limits import ACCEPT_PAUSE_S, CONTROL_BYTES_MAX, HELLO_BYTES_MAX
from mirror.core.wire import Header, MessageType
from mirror.runtime import Runtime, Thread

# One receive takes a whole 4 KiB write with its headers, and what a sender under protocol A has queued behind it.
RECEIVE_BUFFER_BYTES = 64 * 1024
# Enough for a few large requests in the kernel; more would only hide a slow peer.
SOCKET_BUFFER_BYTES = 1024 * 1024
# Larger payloads are rare, and not worth keeping their memory.
SPARE_BYTES_MAX = 4 * 1024 * 1024
NO_PAYLOAD = memoryview(b"")
# In the kernel's struct tcp_info: bytes that the other end has confirmed, bytes that came from it.
TCP_INFO_MOVED = struct.Struct("=120x2Q")
# A stranger that connects and says nothing is dropped after this time.
GREETING_TIMEOUT_S = 2.0
LISTEN_BACKLOG = 64
# Strangers that are being greeted at one time; each may have a buffer and a first message (128 x 96 KiB).
GREETINGS_MAX = 128


class Request(NamedTuple):
    """A message that asks for something; the parameters of `Stream.send`."""

    kind: MessageType
    flags: int
    offset: int
    length: int
    payload: bytes | memoryview
    payload_crc: int
    number: int = 0


class Spare:
    """Memory for large payloads of streams that one thread receives on, one payload at a time.

    New memory for each would be zeroed, and its pages be got from the kernel, before anything is received into it.
    """

    def __init__(self) -> None:
        self._view = memoryview(b"")

    def view(self, length: int) -> memoryview:
        if length > len(self._view):
            whole = memoryview(bytearray(length))
            if length > SPARE_BYTES_MAX:
                return whole
            self._view = whole
        return self._view[:length]


class Stream:
    """One ZMTP connection. `session` is 0 until the handshake has agreed on one."""

    def __init__(self, connection: socket.socket, peer_address: str) -> None:
        self.peer_address = peer_address
        self.session = 0
        self.sent = 0
        self.received = 0
        self.answered = 0
        self.asked_from = 0
        # What comes next while it is greeted, and whether it was too long in coming.
        self.awaits = "its greeting"
        self.timed_out = False
        # Nothing large is taken from anybody before a session.
        self.payload_bytes_max = CONTROL_BYTES_MAX
        self._socket = connection
        self._buffer = bytearray(RECEIVE_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._poll: select.poll | None = None
        self.spare: Spare | None = None
        # Messages that wait for those that are to be sent with them.
        self._held = b""
        # Held while the socket is known by its number alone.
        self._lent_lock = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(
        self,
        kind: MessageType,
        flags: int = 0,
        offset: int = 0,
        length: int = 0,
        payload: bytes | bytearray | memoryview = b"",
        code: int = 0,
        number: int = 0,
        payload_crc: int | None = None,
        more: bool = False,
        lent: bool = False,
    ) -> None:
        """Send one message; blocks while the peer's buffers are full. Raises LinkLost.

        `payload_crc` is the checksum that was taken when the payload came into being; without it, it is taken now.
        `more`: there will be another one, so that both go by one system call; at the latest before this side waits.
        `lent`: the payload stays as it is until the peer has said that it has it, so a large one needs no copy.
        """
        self.sent += 1
        size = len(payload)
        if payload_crc is None:
            payload_crc = wire.crc32c(payload) if size else 0
        head = wire.encode_message(
            kind,
            flags,
            self.session,
            self.sent,
            offset,
            length,
            size,
            payload_crc,
            code,
            number,
        )
        if not size:
            self._held += head
            if not more:
                self.send_held()
            return
        if self._held:
            head, self._held = self._held + head, b""
        if lent and size >= lending.LENT_BYTES_MIN:
            self._send_lent(head, payload, size)
        else:
            self._send_parts((head, payload), len(head) + size)

    def send_requests(self, requests: Sequence[Request]) -> None:
        """Send them one after the other by one system call; blocks and raises as `send`."""
        parts: list[bytes | memoryview] = []
        size = 0
        for kind, flags, offset, length, payload, payload_crc, number in requests:
            self.sent += 1
            payload_bytes = len(payload)
            head = wire.encode_message(
                kind, flags, self.session, self.sent, offset, length, payload_bytes, payload_crc, 0, number
            )
            parts.append(head)
            size += len(head) + payload_bytes
            if payload_bytes:
                parts.append(payload)
        self._send_parts(parts, size)

    def _send_parts(self, parts: Sequence[bytes | bytearray | memoryview], size: int) -> None:
        """Send all `size` bytes of them, by one system call if the peer's buffers take it."""
        try:
            sent = self._socket.sendmsg(parts)
            if sent == size:
                return
            for part in parts:
                if sent < len(part):
                    self._socket.sendall(memoryview(part)[sent:])
                    sent = 0
                else:
                    sent -= len(part)
        except OSError as error:
            raise self._lost(error) from error

    def _send_lent(self, head: bytes, payload: bytes | bytearray | memoryview, size: int) -> None:
        """Send a large payload by its pages; what the kernel does not take so is copied."""
        try:
            with self._lent_lock:
                self._socket.sendall(head, socket.MSG_MORE)
                sent = lending.send(self._socket.fileno(), payload)
            if sent < size:
                self._socket.sendall(memoryview(payload)[sent:])
        except OSError as error:
            raise self._lost(error) from error

    def send_held(self) -> None:
        """Send what waits for another message. Raises LinkLost."""
        if not self._held:
            return
        held, self._held = self._held, b""
        try:
            self._socket.sendall(held)
        except OSError as error:
            raise self._lost(error) from error

    def receive(self) -> tuple[Header, memoryview]:
        """Wait for the next message. The payload is valid until the next receive on this stream.

        Raises LinkLost when the connection ended, ProtocolError on anything that a sound peer does not send.
        """
        prefix_bytes, body_bytes = self._next_frame()
        if body_bytes < wire.HEADER_BYTES or body_bytes > wire.HEADER_BYTES + self.payload_bytes_max:
            raise ProtocolError(f"a message of {body_bytes} bytes from {self.peer_address}")
        self._fill(prefix_bytes + wire.HEADER_BYTES)
        start = self._start + prefix_bytes
        header = wire.decode_header(self._view[start : start + wire.HEADER_BYTES])
        self._start = start + wire.HEADER_BYTES
        if header.payload_length != body_bytes - wire.HEADER_BYTES:
            raise ProtocolError(f"a message from {self.peer_address} whose length and frame differ")
        self.received += 1
        if header.session != self.session:
            raise ProtocolError(f"a message of session {header.session:016x} in session {self.session:016x}")
        if header.sequence != self.received:
            raise ProtocolError(f"message {header.sequence} from {self.peer_address} where {self.received} was due")
        if header.type == MessageType.ANSWER:
            self.answered += 1
        if not header.payload_length:
            return header, NO_PAYLOAD
        payload = self._payload(header.payload_length)
        if wire.crc32c(payload) != header.payload_crc:
            raise ProtocolError(f"the payload of message {header.sequence} from {self.peer_address} is damaged")
        return header, payload

    def _next_frame(self) -> tuple[int, int]:
        """The bytes of the next message's prefix and of its body; commands before it are answered."""
        while True:
            start = self._start
            available = self._end - start
            if available > 1 and self._buffer[start] == wire.SHORT_MESSAGE:
                # Every answer without data.
                return 2, self._buffer[start + 1]
            prefix = wire.frame_prefix(self._view[start : self._end]) if available else None
            if prefix is None:
                self._fill(available + 1)
                continue
            prefix_bytes, body_bytes, is_command = prefix
            if not is_command:
                return prefix_bytes, body_bytes
            self._answer_command(prefix_bytes, body_bytes)

    def spin(self, us: int) -> bool:
        """Look for so many microseconds whether there is something to receive, without sleeping.

        By poll: a receive that finds nothing makes an exception, which takes longer than five looks. Whoever else wants
        this processor gets it between two looks: the client who was just answered may be waiting for it.
        """
        if self._end > self._start:
            return True
        if self._poll is None:
            descriptor = self._socket.fileno()
            if descriptor < 0:
                return True  # the session has ended, as whoever receives is told
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLIN)
        look, clock = self._poll.poll, time.perf_counter_ns
        deadline_ns = clock() + us * 1000
        while not look(0):
            if clock() > deadline_ns:
                return False
            os.sched_yield()
        return True

    @property
    def has_more(self) -> bool:
        """Something came that nobody has received yet; for whoever does not receive on this stream."""
        if self._end > self._start:
            return True
        descriptor = self._socket.fileno()
        if descriptor < 0:
            return False  # closed
        look = select.poll()
        look.register(descriptor, select.POLLIN)
        return bool(look.poll(0))

    def receive_answer(self) -> tuple[Header, memoryview]:
        """Wait for the answer to the oldest request; nothing else may come in its place."""
        header, payload = self.receive()
        if header.type is not MessageType.ANSWER:
            raise ProtocolError(f"a {header.type.name} message from {self.peer_address} where an answer was due")
        return header, payload

    @property
    def owed(self) -> bool:
        """The peer has not answered everything that was asked on this stream."""
        return self.answered < self.sent - self.asked_from

    @property
    def moved_bytes(self) -> int:
        """What the peer's system has of what was sent, and ours of what the peer sent: grows while anything moves.

        The kernel counts it anyway, so that a request pays nothing for it. 0 where it can't tell.
        """
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_MOVED.size)
            confirmed, came = TCP_INFO_MOVED.unpack(info)
        except (OSError, struct.error):
            return 0
        return int(confirmed) + int(came)

    @property
    def buffered(self) -> bool:
        """Bytes of a further message are here already, so a poller would not report them."""
        return self._end > self._start

    def shutdown(self) -> None:
        """End both directions; whoever waits in send or receive gets LinkLost. May be called from any thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was quicker

    def close(self) -> None:
        """Give the descriptor back; after `shutdown`, where a thread may still be sending.

        Of a client's request that is so after the end of its session. A socket knows that it is closed; a number, as
        lending has it, is somebody else's by then.
        """
        with self._lent_lock:
            self._socket.close()

    def _payload(self, length: int) -> memoryview:
        available = self._end - self._start
        if length <= available:
            view = self._view[self._start : self._start + length]
            self._start += length
            return view
        if length <= RECEIVE_BUFFER_BYTES:
            self._fill(length)
            view = self._view[self._start : self._start + length]
            self._start += length
            return view
        large = self.spare.view(length) if self.spare else memoryview(bytearray(length))
        large[:available] = self._view[self._start : self._end]
        self._start = self._end = 0
        self._receive_into(large[available:])
        return large

    def _fill(self, needed: int) -> None:
        """Have at least `needed` bytes (at most the buffer's size) behind `_start`."""
        available = self._end - self._start
        if available >= needed:
            return
        if available == 0:
            self._start = self._end = 0
        elif self._start + needed > RECEIVE_BUFFER_BYTES:
            self._buffer[:available] = self._buffer[self._start : self._end]
            self._start, self._end = 0, available
        if self._held:
            self.send_held()
        while self._end - self._start < needed:
            try:
                count = self._socket.recv_into(self._view[self._end :])
            except OSError as error:
                raise self._lost(error) from error
            if count == 0:
                raise self._lost(None)
            self._end += count

    def _receive_into(self, view: memoryview) -> None:
        if self._held:
            self.send_held()
        done = 0
        while done < len(view):
            try:
                count = self._socket.recv_into(view[done:])
            except OSError as error:
                raise self._lost(error) from error
            if count == 0:
                raise self._lost(None)
            done += count

    def _answer_command(self, prefix_bytes: int, body_bytes: int) -> None:
        if body_bytes > wire.COMMAND_BYTES_MAX:
            raise ProtocolError(f"a ZMTP command of {body_bytes} bytes from {self.peer_address}")
        self._fill(prefix_bytes + body_bytes)
        start = self._start + prefix_bytes
        answer = wire.answer_command(bytes(self._view[start : start + body_bytes]))
        self._start = start + body_bytes
        if answer:
            try:
                self._socket.sendall(answer)
            except OSError as error:
                raise self._lost(error) from error

    def _lost(self, error: OSError | None) -> LinkLost:
        # Compiled, a `raise ... from` forgets its cause.
        self.timed_out = isinstance(error, TimeoutError)
        reason = "it closed the connection" if error is None else (error.strerror or str(error))
        return LinkLost(f"lost the connection to {self.peer_address}: {reason}")

    def greet(self) -> None:
        """Do ZMTP's greeting and READY exchange. Raises ProtocolError for strangers, LinkLost for silent ones."""
        self._socket.settimeout(GREETING_TIMEOUT_S)
        try:
            self._socket.sendall(wire.greeting())
            # A stranger is told apart by its first bytes, not after it was given time to send 64 of them.
            while self._end < wire.GREETING_BYTES:
                self._fill(self._end + 1)
                wire.check_greeting_start(bytes(self._view[: min(self._end, wire.GREETING_BYTES)]))
            wire.parse_greeting(bytes(self._view[: wire.GREETING_BYTES]))
            self._start = wire.GREETING_BYTES
            self.awaits = "its READY command"
            self._socket.sendall(wire.ready_command(b"DEALER"))
            while (prefix := wire.frame_prefix(self._view[self._start : self._end])) is None:
                self._fill(self._end - self._start + 1)
            prefix_bytes, body_bytes, is_command = prefix
            if not is_command or body_bytes > wire.COMMAND_BYTES_MAX:
                raise ProtocolError(f"no READY command from {self.peer_address}")
            self._fill(prefix_bytes + body_bytes)
            start = self._start + prefix_bytes
            wire.parse_ready(bytes(self._view[start : start + body_bytes]))
            self._start = start + body_bytes
            self.awaits = "its first message"
        except OSError as error:
            raise self._lost(error) from error
        self._socket.settimeout(None)

    def set_timeout(self, seconds: float | None) -> None:
        """Bound each further send and receive (used during the handshake); None waits for ever."""
        self._socket.settimeout(seconds)


class Listener:
    """Accepts streams at an address; each greeted stream with its first message is handed to `on_stream`.

    `on_stranger` is told who came no further, and why: a LinkLost where it fell silent or hung up in the middle.
    """

    def __init__(
        self,
        runtime: Runtime,
        address: tuple[str, int],
        on_stream: Callable[[Stream, Header, bytes], None],
        on_stranger: Callable[[str, MirrorError], None],
    ) -> None:
        self._runtime = runtime
        self._on_stream = on_stream
        self._on_stranger = on_stranger
        # The oldest first.
        self._greeting: dict[Stream, None] = {}
        self._lock = runtime.lock()
        self._closing = runtime.condition()
        self._closed = False
        host, port = address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(LISTEN_BACKLOG)
        except OSError as error:
            raise OperatorError(
                f"can't listen for the peer at {host}:{port}: {error.strerror or error}",
                remedy="stop what uses that port (ss -ltnp shows it), or change `listen` in volume.toml",
            ) from error
        self._accepting: Thread = runtime.spawn("listener", self._accept)

    def close(self) -> None:
        with self._closing:
            self._closed = True
            self._closing.notify_all()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._accepting.join(GREETING_TIMEOUT_S)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._socket.accept()
            except OSError as error:
                with self._closing:
                    # Who waits in the queue would be refused again at once.
                    if self._closing.wait_for(lambda: self._closed, ACCEPT_PAUSE_S):
                        return
                self._on_stranger("whoever comes", OperatorError(error.strerror or str(error)))
                continue
            stream = Stream(connection, f"{address[0]}:{address[1]}")
            with self._lock:
                if len(self._greeting) >= GREETINGS_MAX:
                    # Whoever has taken longest goes: one that dribbles bytes must not keep the right peer out.
                    oldest = next(iter(self._greeting))
                    del self._greeting[oldest]
                    oldest.shutdown()
                self._greeting[stream] = None
            try:
                self._runtime.spawn("greeting", self._greet, connection, stream)
            except OperatorError as error:
                self._forget(stream)
                stream.close()
                self._on_stranger(stream.peer_address, error)

    def _forget(self, stream: Stream) -> None:
        with self._lock:
            self._greeting.pop(stream, None)

    def _broken_off(self, stream: Stream) -> str:
        """What was wrong with one whose first message did not come. Nothing, where it left between two steps: so does
        a peer that reached us while we reached it."""
        with self._lock:
            made_room = stream not in self._greeting
        if made_room:
            return f"hung up on it, which took longest of {GREETINGS_MAX} that were being greeted"
        torn = stream.buffered or stream.received > 0
        if stream.timed_out:
            return f"silent for {GREETING_TIMEOUT_S:g} s {'within' if torn else 'before'} {stream.awaits}"
        return f"it hung up within {stream.awaits}" if torn else ""

    def _greet(self, connection: socket.socket, stream: Stream) -> None:
        address = stream.peer_address
        try:
            _tune(connection)
            stream.greet()
            stream.set_timeout(GREETING_TIMEOUT_S)
            stream.payload_bytes_max = HELLO_BYTES_MAX
            header, payload = stream.receive()
            stream.payload_bytes_max = CONTROL_BYTES_MAX
            stream.set_timeout(None)
        except LinkLost:
            why = self._broken_off(stream)
            stream.close()
            if why:
                self._on_stranger(address, LinkLost(why))
            return
        except ProtocolError as error:
            stream.close()
            self._on_stranger(address, error)
            return
        finally:
            self._forget(stream)
        self._on_stream(stream, header, bytes(payload))


def dial(address: tuple[str, int], timeout_s: float) -> Stream:
    """Connect to a listener and greet it. Raises LinkLost or ProtocolError."""
    name = f"{address[0]}:{address[1]}"
    try:
        connection = socket.create_connection(address, timeout=timeout_s)
    except OSError as error:
        raise LinkLost(f"can't reach the peer at {name}: {error.strerror or error}") from error
    stream = Stream(connection, name)
    try:
        _tune(connection)
        stream.greet()
    except BaseException:
        stream.close()
        raise
    return stream


def _tune(connection: socket.socket) -> None:
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    except OSError as error:
        raise LinkLost(f"lost a connection while it was set up: {error.strerror or error}") from error


class Poller:
    """Waits for several streams at once. `wait` belongs to one thread; add and remove to any."""

    def __init__(self) -> None:
        """Raises OperatorError when the system has no descriptor for it."""
        self._streams: dict[int, Stream] = {}
        self._closed = False
        try:
            self._wake_reader, self._wake_writer = socket.socketpair()
            try:
                self._epoll = select.epoll()
                self._epoll.register(self._wake_reader.fileno(), select.EPOLLIN)
            except OSError:
                self._wake_reader.close()
                self._wake_writer.close()
                raise
        except OSError as error:
            raise OperatorError(
                f"can't wait for what the peer sends: {error.strerror or error}",
                remedy="see what uses all descriptors, or allow more (ulimit -n; LimitNOFILE of a systemd unit)",
            ) from error

    def add(self, stream: Stream) -> None:
        """Raises LinkLost for a stream that was closed already."""
        try:
            self._epoll.register(stream.fileno(), select.EPOLLIN)
        except (OSError, ValueError) as error:
            raise LinkLost(f"the connection to {stream.peer_address} was closed already") from error
        self._streams[stream.fileno()] = stream

    def remove(self, stream: Stream) -> None:
        descriptor = stream.fileno()
        if self._streams.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def wait(self, spin_us: int = 0) -> list[Stream]:
        """Block until streams have something to receive (or ended); an empty list after `close`.

        Before it sleeps it looks for so many microseconds, as `Stream.spin` does.
        """
        deadline_ns = time.perf_counter_ns() + spin_us * 1000 if spin_us else 0
        while spin_us and not self._closed:
            ready = [self._streams[fd] for fd, _ in self._epoll.poll(0) if fd in self._streams]
            if ready:
                return ready
            if time.perf_counter_ns() > deadline_ns:
                break
            os.sched_yield()
        while not self._closed:
            ready = [self._streams[fd] for fd, _ in self._epoll.poll() if fd in self._streams]
            if ready:
                return ready
        return []

    def close(self) -> None:
        """Let `wait` return for good; may be called from any thread."""
        self._closed = True
        try:
            self._wake_writer.send(b"x")
        except OSError:
            pass

    def free(self) -> None:
        """Give the descriptors back; only when nobody waits any more."""
        self._epoll.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def __enter__(self) -> "Poller":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()
