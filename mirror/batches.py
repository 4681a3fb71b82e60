"""Requests of many writers in one message after the other, sent by one system call and answered by one.

With several writes on their way a stream for each would cost each two system calls and a wake-up at either end, which
is most of what a write costs then. So they are queued, and a sender takes all that have gathered while it was away. A
write that is alone on its way does without: the change of threads would cost it more than it saves.

Two senders, so that one batch is sent while the answers to the other are awaited.
"""

from typing import Protocol

from mirror.core.errors import LinkLost, PeerError
from mirror.core.limits import SEND_BATCH_COUNT_MAX
from mirror.core.wire import Header
from mirror.link import Request
from mirror.runtime import Lock, Runtime, Thread
from mirror.session import Session

SENDERS = 2


class Queued(Protocol):
    """Something to be sent. Its payload stays valid until one of the two is called, by a sender."""

    @property
    def request(self) -> Request: ...
    def answered(self, header: Header) -> None:
        """Raises PeerError where that must end the session."""

    def lost(self, reason: str) -> None:
        """The session ended: the peer may have carried it out or not."""


class Awaited:
    """One that a worker waits for."""

    __slots__ = ("_done", "_header", "_reason", "request")

    def __init__(self, request: Request, done: Lock) -> None:
        self.request = request
        self._done = done
        self._header: Header | None = None
        self._reason = ""
        done.acquire()

    def answered(self, header: Header) -> None:
        self._header = header
        self._done.release()

    def lost(self, reason: str) -> None:
        self._reason = reason
        self._done.release()

    def answer(self) -> Header:
        """Wait for it. Raises LinkLost when the session ended first."""
        self._done.acquire()
        if self._header is None:
            raise LinkLost(self._reason)
        return self._header


class Batches:
    """The queue of one session and its senders, which end with it. `close` and `join` do without some of them too."""

    def __init__(self, session: Session, runtime: Runtime) -> None:
        self._session = session
        self._runtime = runtime
        self._lock = runtime.lock()
        self._queue: list[Queued] = []
        # What senders sleep on, and whether one of them was woken and has not looked yet.
        self._asleep: list[Lock] = []
        self._woken = False
        self._closed = False
        self._threads: list[Thread] = []

    def start(self) -> None:
        for number in range(SENDERS):
            self._threads.append(self._runtime.spawn(f"sender-{number}", self._send, self._runtime.lock()))

    def put(self, queued: Queued) -> None:
        """To be sent behind what was put before. Raises LinkLost when the session has ended."""
        sleeper: Lock | None = None
        with self._lock:
            if self._closed:
                raise LinkLost(self._session.reason)
            self._queue.append(queued)
            if self._asleep and not self._woken:
                self._woken = True
                sleeper = self._asleep.pop()
        if sleeper is not None:
            sleeper.release()

    def close(self) -> None:
        """The session has ended: nothing more is sent, and whatever still waits is lost."""
        with self._lock:
            self._closed = True
            left, self._queue = self._queue, []
            sleepers, self._asleep = self._asleep, []
        for sleeper in sleepers:
            sleeper.release()
        for queued in left:
            queued.lost(self._session.reason)

    def join(self) -> None:
        """Wait for the senders, but for the one that calls this."""
        for thread in self._threads:
            if not self._runtime.is_current(thread):
                thread.join()

    def _take(self, own: Lock) -> list[Queued]:
        """What is to be sent next; nothing once it is closed."""
        while True:
            with self._lock:
                if self._queue:
                    self._woken = False
                    batch = self._queue[:SEND_BATCH_COUNT_MAX]
                    del self._queue[:SEND_BATCH_COUNT_MAX]
                    return batch
                if self._closed:
                    return []
                # It may have been woken for what another one took.
                self._woken = False
                self._asleep.append(own)
            own.acquire()

    def _send(self, own: Lock) -> None:
        """Body of a sender."""
        own.acquire()
        session = self._session
        while batch := self._take(own):
            done = 0
            try:
                stream = session.borrow()
                stream.send_requests([queued.request for queued in batch])
                for queued in batch:
                    header, _ = stream.receive_answer()
                    done += 1
                    queued.answered(header)
                session.give_back(stream)
            except PeerError as lost:
                self._give_up(batch[done:], lost.message)
                return
            except Exception as bug:
                # Workers wait for this thread alone: they must not wait for ever.
                self._give_up(batch[done:], f"a bug of ours: {bug!r}")
                raise

    def _give_up(self, unanswered: list[Queued], reason: str) -> None:
        self._session.end(reason)
        for queued in unanswered:
            queued.lost(self._session.reason)
        self.close()
