"""Compare a range of the volume with the peer's copy while clients write: no false alarm, nothing missed.

The one comparer of `verify` and of the proofs. A range is looked at as a request of its own: it enters through the gate
of the client's requests, so that no role changes and no session begins in between, and locks the range as a write does
(invariant same-order), so that both sides hold the same answered writes. The peer takes its digests while this side
takes its own. What differs and is not dirty is a suspect before the range is let go (invariant suspect-is-not-dirty).
"""

import contextlib
from collections.abc import Iterator

from mirror.core import resync
from mirror.core.errors import DeviceError, LinkLost, PeerError, ProtocolError
from mirror.core.limits import BLOCK_BYTES
from mirror.core.resync import Action
from mirror.core.wire import Flag, MessageType
from mirror.link import Stream
from mirror.primary import Primary, describe_errno
from mirror.replica import FULL
from mirror.session import Session
from mirror.suspects import Runs


class Comparer:
    """Compares in one session, a piece at a time; for one thread."""

    def __init__(self, primary: Primary, session: Session) -> None:
        self._primary = primary
        self._replica = primary.replica
        self._session = session

    def compare(self, offset: int, length: int) -> Runs:
        """The runs in which the copies differ; they are suspects now, not durably yet.

        Raises LinkLost, PeerError and DeviceError for disks that can't be read, ConnectionCut or NotPrimary when this
        replica is no longer primary.
        """
        with self._alone_on(offset, length) as stream:
            stream.send(MessageType.SUMS, Flag.RESYNC, offset, length)
            try:
                local = resync.block_sums(memoryview(self._replica.store.read(length, offset)))
            finally:
                # Also when this disk can't be read: the stream is needed again.
                answer = self._answer(stream, "compare", offset)
            remote = resync.decode_sums(answer, length)
            runs = [run[1:] for run in resync.classify_blocks(local, remote, offset) if run[0] is not Action.SKIP]
            if not runs:
                return []
            with self._replica.books:
                differing = [part for run in runs for part in self._not_dirty(*run)]
            for part in differing:
                self._primary.suspect_locked(self._session, *part)
            return differing

    def _not_dirty(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The parts of a run that no resync would bring up; call with the books held."""
        dirty = self._replica.dirty
        if not dirty.is_dirty(offset, length):
            yield offset, length
            return
        for at in range(offset, offset + length, BLOCK_BYTES):
            if not dirty.is_dirty(at, BLOCK_BYTES):
                yield at, BLOCK_BYTES

    def repair(self, offset: int, length: int, from_primary: bool) -> None:
        """Copy the range from the side that is right, by the operator's word; it is not stable yet.

        The durable suspects cover it until both are stable. A log extent or a dirty bit would not do: after a crash a
        resync would take this side's copy for the right one.
        """
        with self._alone_on(offset, length) as stream:
            if from_primary:
                content = self._replica.store.read(length, offset)
                stream.send(MessageType.WRITE, Flag.RESYNC, offset, length, content)
                try:
                    self._answer(stream, "write", offset)
                except PeerError as error:
                    # Its disk is full or broken, so it has dropped out: a new session finds out how it stands.
                    self._session.disk_trouble = True
                    self._session.end(error.message)
                    raise
            else:
                stream.send(MessageType.READ, Flag.RESYNC, offset, length)
                try:
                    content = bytes(self._answer(stream, "read", offset))
                    if len(content) != length:
                        raise ProtocolError(f"{len(content)} bytes where {length} were asked for")
                    self._replica.store.write(content, offset)
                except DeviceError as error:
                    if error.errno not in FULL:
                        self._primary.disk_failed(error)
                    raise
            self.same(offset, length)

    def same(self, offset: int, length: int) -> None:
        """Both hold the same here, and that is right: suspects in this range go once both are stable."""
        with self._replica.books:
            if self._primary.session is not self._session:
                raise LinkLost(self._session.reason)
            self._replica.unstable.mark(offset, length)
            self._replica.suspects.written(offset, length)
        self._primary.flushes.needed = True

    @contextlib.contextmanager
    def _alone_on(self, offset: int, length: int) -> Iterator[Stream]:
        with self._primary.request_alone(offset, length):
            if self._primary.session is not self._session or self._session.ended:
                raise LinkLost(self._session.reason)
            if self._primary.peer_only:
                raise PeerError("this replica's disk is Failed, so there is nothing to compare the peer's copy with")
            stream = self._session.borrow_sync()
            try:
                yield stream
            finally:
                # One that owes an answer is of no more use.
                if not stream.owed:
                    self._session.give_back_sync(stream)

    def _answer(self, stream: Stream, verb: str, offset: int) -> memoryview:
        header, payload = stream.receive_answer()
        if header.code:
            raise PeerError(f"the peer could not {verb} at {offset}: {describe_errno(header.code)}")
        return payload
