"""Simulated `socket` and `select` for mirror.link: segments that travel between machines in virtual time.

One `send` call is one segment, and mirror.link sends one message a call: a dropped segment is a message that ZeroMQ
would lose in a silent reconnect, with what follows arriving. Segments of one connection keep their order, different
connections overtake each other. A cut holds segments back (TCP repeats them) until it heals or the connection is reset.
"""

import errno
import socket as real_socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from mirror.core import wire
from tests.sim.scheduler import Process, Scheduler, Task

EPOLLIN = 1
# Whoever reads a message sees at once that one before it is missing.
GAP_SEEN_S = 0.2
# Unread bytes a connection holds before its sender must wait.
# A look that finds nothing takes as much time as some real ones do, or a spin would be most of a life's steps.
LOOK_S = 1e-5
# What is kept to come back astray: messages with data.
STRAY_BYTES_MIN = 500
WINDOW_BYTES = 256 * 1024


class Links:
    """The state of every direction between two machines, and the faults that wait for their next segments."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.latency_s = 0.0002
        self.cut: set[tuple[str, str]] = set()
        self.off: set[str] = set()
        self.listeners: dict[str, Socket] = {}
        self.connections: list[Connection] = []
        # (from, to) -> what happens to the next segments: functions of (connection, segment) -> segment or None
        # Segments of each direction as they were sent, for a stray one of an ended connection to come back.
        self.sent: dict[tuple[str, str], list[tuple[Connection, bytes]]] = {}
        self.faults: dict[tuple[str, str], deque[Callable[[bytes], bytes | None]]] = {}
        self.descriptors: dict[int, Any] = {}
        # Told of a connection that reads on after a message of it was lost.
        self.on_gap: Callable[[Connection], None] = lambda connection: None
        self._next = 1000

    def descriptor(self, owner: object) -> int:
        self._next += 1
        self.descriptors[self._next] = owner
        return self._next

    def passes(self, source: str, target: str) -> bool:
        return (source, target) not in self.cut and source not in self.off and target not in self.off

    def set_cut(self, source: str, target: str, cut: bool) -> None:
        if cut:
            self.cut.add((source, target))
            return
        self.cut.discard((source, target))
        for connection in self.connections:
            connection.release()

    def live(self) -> list["Connection"]:
        """The connections between machines that stand."""
        return [
            one for one in self.connections if one.names[0] != one.names[1] and not any(end.closed for end in one.ends)
        ]

    def drop_machine(self, name: str) -> None:
        """It lost power: nothing leaves it and nobody is told."""
        for connection in self.connections:
            if name in connection.names:
                connection.silent = True
        self.listeners.pop(name, None)

    def process_died(self, process: Process) -> None:
        """The kernel of a killed process closes its sockets."""
        for descriptor, owner in list(self.descriptors.items()):
            if owner.process is process:
                owner.abandon()
                del self.descriptors[descriptor]


class Connection:
    """Two ends; what each sends arrives at the other one, later, in order."""

    def __init__(self, links: Links, names: tuple[str, str]) -> None:
        self.links = links
        self.names = names
        self.ends: list[Socket] = []
        self.silent = False
        self.held: list[deque[tuple[bytes | None, bool]]] = [deque(), deque()]
        self.due_s = [0.0, 0.0]
        self.stalled_until_s = 0.0
        self.lost = [False, False]
        links.connections.append(self)
        if len(links.connections) > 200:
            links.connections = [one for one in links.connections if not all(end.closed for end in one.ends)]

    def reset(self) -> None:
        for end in self.ends:
            end.reset = True
            end._wake()

    def transmit(self, side: int, segment: bytes | None) -> None:
        """Send a segment (None: the end of the stream) from one side."""
        if self.silent:
            return
        links = self.links
        source, target = self.names[side], self.names[1 - side]
        if segment is not None:
            if len(segment) > STRAY_BYTES_MIN:
                history = links.sent.setdefault((source, target), [])
                history.append((self, segment))
                del history[:-200]
            faults = links.faults.get((source, target))
            if faults:
                changed = faults.popleft()(segment)
                if changed is None:
                    self.lost[side] = True
                    return
                segment = changed
        after_a_lost_one = self.lost[side] and segment is not None
        if after_a_lost_one:
            self.lost[side] = False
        if not links.passes(source, target):
            self.held[side].append((segment, after_a_lost_one))
            return
        self._arrive(side, segment, after_a_lost_one)

    def _arrive(self, side: int, segment: bytes | None, after_a_lost_one: bool) -> None:
        scheduler = self.links.scheduler
        delay_s = self.links.latency_s * (0.2 + 1.6 * scheduler.random.random())
        self.due_s[side] = max(self.due_s[side], scheduler.now_s + delay_s, self.stalled_until_s)
        target = self.ends[1 - side]

        def deliver() -> None:
            if not self.silent:
                target.deliver(segment)
                if after_a_lost_one:
                    scheduler.at(GAP_SEEN_S, lambda: self._check_gap(target))

        scheduler.at(self.due_s[side] - scheduler.now_s, deliver)

    def _check_gap(self, target: "Socket") -> None:
        """A message after a lost one was read some time ago: the reader must have hung up (invariant one-session)."""
        busy = target.readable and not target.ended
        if not (busy or target.ended or target.process.dead or target.process.stopped or self.silent):
            self.links.on_gap(self)

    def release(self) -> None:
        """The cut is healed: what was held back is repeated."""
        for side in (0, 1):
            if self.links.passes(self.names[side], self.names[1 - side]):
                while self.held[side]:
                    self._arrive(side, *self.held[side].popleft())


class Socket:
    """One end of a connection, or a listening socket."""

    def __init__(self, links: Links, process: Process) -> None:
        self.links = links
        self.process = process
        self.closed = False
        self.ended = False
        self.shut = False
        self.reset = False
        self.timeout_s: float | None = None
        self.unread_bytes = 0
        self.came_bytes = 0
        self.connection: Connection | None = None
        self.side = 0
        self.address = ""
        self.backlog: deque[Socket] = deque()
        self.readers: list[Task] = []
        self.writers: list[Task] = []
        self.watchers: list[Epoll] = []
        self._inbox: deque[bytes] = deque()
        self._descriptor = links.descriptor(self)

    # What production calls

    def fileno(self) -> int:
        return -1 if self.closed else self._descriptor

    def setsockopt(self, *arguments: object) -> None:
        pass

    def getsockopt(self, _level: int, option: int, size: int) -> bytes:
        """TCP_INFO, as far as it counts bytes: what arrived is confirmed."""
        assert option == SocketModule.TCP_INFO
        if self.closed:
            raise OSError(errno.EBADF, "Bad file descriptor")
        confirmed = self.connection.ends[1 - self.side].came_bytes if self.connection is not None else 0
        return struct.pack("=120x2Q", confirmed, self.came_bytes)[:size]

    def settimeout(self, seconds: float | None) -> None:
        self.timeout_s = seconds

    def bind(self, address: tuple[str, int]) -> None:
        self.address = address[0]

    def listen(self, backlog: int) -> None:
        if self.address in self.links.listeners:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        self.links.listeners[self.address] = self

    def accept(self) -> tuple["Socket", tuple[str, int]]:
        scheduler = self.links.scheduler
        scheduler.point()
        while not self.backlog:
            if self.shut or self.closed:
                raise OSError(errno.EINVAL, "closed")
            scheduler.wait(self.readers, None, "a connection")
        end = self.backlog.popleft()
        assert end.connection is not None
        return end, (end.connection.names[1 - end.side], 1)

    def sendall(self, data: bytes | memoryview) -> None:
        self.sendmsg((data,))

    def send(self, data: bytes) -> int:
        return self.sendmsg((data,))

    def sendmsg(self, parts: tuple[bytes | memoryview, ...]) -> int:
        scheduler = self.links.scheduler
        scheduler.point()
        connection = self.connection
        if self.closed or connection is None:
            raise OSError(errno.EBADF, "Bad file descriptor")
        deadline_s = None if self.timeout_s is None else scheduler.now_s + self.timeout_s
        while True:
            if self.shut or self.reset:
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            target = connection.ends[1 - self.side]
            if (
                target.unread_bytes < WINDOW_BYTES
                and not sum(len(held or b"") for held, _ in connection.held[self.side]) > WINDOW_BYTES
            ):
                break
            left_s = None if deadline_s is None else deadline_s - scheduler.now_s
            if left_s is not None and left_s <= 0:
                raise TimeoutError("timed out")
            scheduler.wait(self.writers, min(0.05, left_s if left_s is not None else 0.05), "room to send")
        segment = b"".join(parts)
        connection.transmit(self.side, segment)
        return len(segment)

    def recv_into(self, view: memoryview) -> int:
        scheduler = self.links.scheduler
        scheduler.point()
        deadline_s = None if self.timeout_s is None else scheduler.now_s + self.timeout_s
        while not self._inbox:
            if self.closed:
                raise OSError(errno.EBADF, "Bad file descriptor")
            if self.reset:
                raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
            if self.ended or self.shut:
                return 0
            left_s = None if deadline_s is None else deadline_s - scheduler.now_s
            if left_s is not None and left_s <= 0:
                raise TimeoutError("timed out")
            scheduler.wait(
                self.readers,
                left_s,
                f"a message from {self.connection.names[1 - self.side]}" if self.connection else "",
            )
        first = self._inbox[0]
        count = min(len(first), len(view))
        view[:count] = first[:count]
        if count == len(first):
            self._inbox.popleft()
        else:
            self._inbox[0] = first[count:]
        self.unread_bytes -= count
        if self.connection is not None:
            writer = self.connection.ends[1 - self.side]
            for task in writer.writers:
                scheduler.wake(task)
        return count

    def shutdown(self, how: int) -> None:
        if self.connection is None and not self.address:
            raise OSError(errno.ENOTCONN, "not connected")
        if not self.shut:
            self.shut = True
            if self.connection is not None:
                self.connection.transmit(self.side, None)
        self._wake()

    def close(self) -> None:
        if self.closed:
            return
        if self.connection is not None and not self.shut:
            self.connection.transmit(self.side, None)
        if self.links.listeners.get(self.address) is self:
            del self.links.listeners[self.address]
        self.closed = True
        self.links.descriptors.pop(self._descriptor, None)
        self._wake()

    # What the network does

    def deliver(self, segment: bytes | None) -> None:
        if self.closed:
            return
        if segment is None:
            self.ended = True
        elif not self.shut:
            self._inbox.append(segment)
            self.unread_bytes += len(segment)
            self.came_bytes += len(segment)
        self._wake()

    def abandon(self) -> None:
        self.closed = True
        if self.links.listeners.get(self.address) is self:
            del self.links.listeners[self.address]
        if self.connection is not None and not self.shut:
            self.connection.transmit(self.side, None)

    @property
    def readable(self) -> bool:
        return bool(self._inbox or self.ended or self.shut or self.reset or self.closed)

    def _wake(self) -> None:
        scheduler = self.links.scheduler
        for task in (*self.readers, *self.writers):
            scheduler.wake(task)
        for watcher in self.watchers:
            for task in watcher.waiting:
                scheduler.wake(task)


class Epoll:
    """select.epoll, level-triggered; it reports the ready ones in any order."""

    def __init__(self, links: Links, process: Process) -> None:
        self.links = links
        self.process = process
        self.waiting: list[Task] = []
        self._watched: dict[int, Socket] = {}

    def register(self, descriptor: int, events: int) -> None:
        if descriptor < 0:
            raise ValueError("file descriptor cannot be a negative integer")
        socket = self.links.descriptors.get(descriptor)
        if socket is None:
            raise OSError(errno.EBADF, "Bad file descriptor")
        self._watched[descriptor] = socket
        socket.watchers.append(self)

    def unregister(self, descriptor: int) -> None:
        socket = self._watched.pop(descriptor, None)
        if socket is None:
            raise FileNotFoundError(errno.ENOENT, "not registered")
        socket.watchers.remove(self)

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        scheduler = self.links.scheduler
        scheduler.point()
        while True:
            ready = [(fd, EPOLLIN) for fd, socket in self._watched.items() if socket.readable and not socket.closed]
            if ready:
                if len(ready) > 1:
                    scheduler.random.shuffle(ready)
                return ready
            if timeout == 0:
                scheduler.elapse(LOOK_S)
                return []
            scheduler.wait(self.waiting, None, "any message")

    def close(self) -> None:
        for descriptor in list(self._watched):
            self.unregister(descriptor)


class Poll:
    """select.poll, as far as one socket is looked at without waiting."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._socket: Socket | None = None

    def register(self, descriptor: int, _events: int) -> None:
        self._socket = self._links.descriptors[descriptor]

    def poll(self, timeout_ms: int) -> list[tuple[int, int]]:
        assert timeout_ms == 0
        assert self._socket is not None
        self._links.scheduler.point()
        if not self._socket.readable:
            self._links.scheduler.elapse(LOOK_S)
        return [(0, EPOLLIN)] if self._socket.readable else []


class SocketModule:
    """In place of `socket` in mirror."""

    AF_INET, AF_INET6, SOCK_STREAM = real_socket.AF_INET, real_socket.AF_INET6, real_socket.SOCK_STREAM
    SOL_SOCKET, SO_REUSEADDR, SO_SNDBUF, SO_RCVBUF = 1, 2, 7, 8
    IPPROTO_TCP, TCP_NODELAY, TCP_INFO, SHUT_RDWR = 6, 1, 11, 2

    def __init__(self, links: Links) -> None:
        self._links = links

    def _process(self) -> Process:
        task = self._links.scheduler.current
        assert task is not None
        return task.process

    def socket(self, family: int = 0, kind: int = 0) -> Socket:
        return Socket(self._links, self._process())

    def _pair(self, names: tuple[str, str], other: Process) -> tuple[Socket, Socket]:
        connection = Connection(self._links, names)
        one, two = Socket(self._links, self._process()), Socket(self._links, other)
        one.connection = two.connection = connection
        two.side = 1
        connection.ends = [one, two]
        return one, two

    def socketpair(self) -> tuple[Socket, Socket]:
        process = self._process()
        return self._pair((process.name, process.name), process)

    def create_connection(self, address: tuple[str, int], timeout: float) -> Socket:
        links, host = self._links, address[0]
        here = self._process().name
        links.scheduler.elapse(links.latency_s)
        waited_s = 0.0
        while not (links.passes(here, host) and links.passes(host, here)):
            step_s = min(0.25, timeout - waited_s)
            if step_s <= 0:
                raise TimeoutError("timed out")
            links.scheduler.elapse(step_s)
            waited_s += step_s
        listener = links.listeners.get(host)
        if listener is None or listener.shut:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        mine, theirs = self._pair((here, host), listener.process)
        listener.backlog.append(theirs)
        listener._wake()  # the kernel does it
        return mine


class TimeModule:
    """In place of `time` in mirror."""

    def __init__(self, links: Links) -> None:
        self._scheduler = links.scheduler

    def perf_counter_ns(self) -> int:
        return int(self._scheduler.now_s * 1e9)


class SelectModule:
    """In place of `select` in mirror."""

    EPOLLIN = EPOLLIN
    POLLIN = EPOLLIN

    def __init__(self, links: Links) -> None:
        self._links = links

    def poll(self) -> Poll:
        return Poll(self._links)

    def epoll(self) -> Epoll:
        task = self._links.scheduler.current
        assert task is not None
        return Epoll(self._links, task.process)


def flip_a_bit(scheduler: Scheduler) -> Callable[[bytes], bytes]:
    def flip(segment: bytes) -> bytes:
        at = scheduler.random.randrange(len(segment))
        return segment[:at] + bytes([segment[at] ^ (1 << scheduler.random.randrange(8))]) + segment[at + 1 :]

    return flip


def stray(links: Links, direction: tuple[str, str]) -> Callable[[bytes], bytes]:
    """In place of a message comes one of an ended connection that had the same number, as after a silent reconnect."""

    def sequence(segment: bytes) -> int:
        prefix = wire.frame_prefix(memoryview(segment))
        assert prefix is not None
        return wire.decode_header(memoryview(segment)[prefix[0] : prefix[0] + wire.HEADER_BYTES]).sequence

    def replace(segment: bytes) -> bytes:
        ended = [old for one, old in links.sent.get(direction, ()) if any(end.closed for end in one.ends)]
        if len(segment) <= STRAY_BYTES_MIN or not ended:
            links.faults[direction].append(replace)
            return segment
        number = sequence(segment)
        return next((old for old in reversed(ended) if old != segment and sequence(old) == number), segment)

    return replace


def drop(_segment: bytes) -> None:
    return None
