"""Protocol B: the word that a write is in memory, sent apart only where carrying the write out takes long.

A message costs the peer's receiver about as much as a write into the page cache (8 µs), and its sender a second look
at the socket: so mostly the answer says both. A thread looks every few milliseconds whether one and the same write is
still being carried out, and says RECEIVED in its place. So the write that a stalling disk meets costs its client a look
or two, and not the stall; after that, each write is confirmed at once for a while.
"""

import logging

from mirror.core.errors import LinkLost, OperatorError
from mirror.core.wire import MessageType
from mirror.link import Stream
from mirror.runtime import Runtime, Thread

log = logging.getLogger(__name__)

# Between two looks: a write waits for one to two of them.
LOOK_S = 0.005
# Looks without a write before the thread sleeps until there is one.
IDLE_LOOKS = 200
# Larger ones are carried out slowly anyway.
QUICK_BYTES_MAX = 32 * 1024
# Confirmed at once after one that was slow.
AFTER_A_SLOW_ONE = 1024


class Confirmer:
    """That of one receiver, which carries out one such write at a time."""

    def __init__(self, runtime: Runtime, name: str) -> None:
        """Its thread begins with the first write; `name` is the thread's."""
        self._runtime = runtime
        self._name = name
        self._looking: Thread | None = None
        self._changed = runtime.condition()
        # The stream of the write that is carried out and not confirmed, and its number.
        self._stream: Stream | None = None
        self._number = 0
        self._at_once = 0
        self._asleep = False
        self._ended = False

    def begin(self, stream: Stream, length: int) -> None:
        """A write of this length is in memory. Raises LinkLost."""
        if self._looking is None:
            self._spawn()
        if length > QUICK_BYTES_MAX or self._at_once or self._looking is None:
            self._at_once = max(0, self._at_once - 1)
            stream.send(MessageType.RECEIVED)
            return
        self._number += 1
        self._stream = stream
        if self._asleep:
            with self._changed:
                self._changed.notify_all()

    def end(self, stream: Stream) -> None:
        """It is carried out, and about to be answered: nothing else is sent on its stream from now on."""
        with self._changed:
            if self._stream is stream:
                self._stream = None

    def close(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def join(self) -> None:
        """After `close`, and after whoever calls `begin`."""
        if self._looking is not None:
            self._looking.join()

    def _spawn(self) -> None:
        try:
            self._looking = self._runtime.spawn(self._name, self._serve)
        except OperatorError as error:
            log.debug("writes are confirmed at once: %s", error)

    def _serve(self) -> None:
        seen, idle_looks = 0, 0
        with self._changed:
            while not self._ended:
                idle_looks = idle_looks + 1 if self._number == seen else 0
                stream = self._stream
                if stream is not None and self._number == seen:
                    self._stream = None
                    self._at_once = AFTER_A_SLOW_ONE
                    try:
                        stream.send(MessageType.RECEIVED)
                    except LinkLost:
                        return  # as the receiver finds, too
                seen = self._number
                if idle_looks > IDLE_LOOKS:
                    self._sleep(seen)
                else:
                    self._changed.wait(LOOK_S)

    def _sleep(self, seen: int) -> None:
        """Until there is a write; called with the lock held, which whoever begins one need not have."""
        self._asleep = True
        # Whoever did not see that has said before that there is one.
        if self._number == seen:
            self._changed.wait()
        self._asleep = False
