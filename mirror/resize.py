"""Growing a volume on both replicas, in the steps of mirror.core.sizes.

`Resize` is one side of it. The primary's `grow` runs in the thread of the operator's command. The secondary makes room
in a thread of its own, because its control thread must go on hearing heartbeats, and sends a notice when it is done.
What a lost link leaves behind is settled by the next handshake (`Replica.settle_size`), so no step here is ever undone
by guess: a size is forgotten only when the peer has refused it.

Requests are not held: those that run lie within the old size, which stays right, and the maps change their size under
the books.
"""

import logging
from collections.abc import Callable
from typing import Any

from mirror.core.errors import LinkLost, MirrorError, OperatorError, ProtocolError
from mirror.core.layout import size_is_right
from mirror.core.resize import Wish, may_grow
from mirror.core.states import ConnectionState, DiskState, Refused, Role
from mirror.core.units import exact_size_text
from mirror.core.wire import words
from mirror.peer import Peer
from mirror.replica import Replica
from mirror.runtime import Thread
from mirror.session import Session

log = logging.getLogger(__name__)

# Control requests of a resize; `Resize.answer` takes them.
OPERATIONS = ("resize_prepare", "resize_prepared", "resize_commit")
# The peer answers at once that it begins, and a superblock is written within it.
REQUEST_TIMEOUT_S = 10.0
# A running handshake is waited for before a size is recorded.
HANDSHAKE_PATIENCE_S = 10.0
# A stop waits so long for a thread that makes room: one piece of zeroes.
STOP_PATIENCE_S = 2.0


# The durable steps. Each may be repeated.


def make_room(replica: Replica, size_bytes: int, go_on: Callable[[], None]) -> None:
    """Files that can hold a volume of this size, durable; the volume itself is not touched."""
    replica.store.make_room(size_bytes, go_on)


def record_next(replica: Replica, size_bytes: int) -> None:
    """(S, N): there is room for N here."""
    replica.update(next_size_bytes=size_bytes)


def forget_next(replica: Replica) -> None:
    """(S, 0): the peer has refused N, or there is none."""
    replica.settle_size(replica.size_bytes)


def commit(replica: Replica, size_bytes: int) -> None:
    """(N, 0): both have room, so this replica's volume has N bytes from now on."""
    replica.settle_size(size_bytes)


class Resize:
    """One replica's side of a resize; one at a time."""

    def __init__(self, replica: Replica) -> None:
        # What is being done, in words for people; nothing while no thread works on it.
        self.stage = ""
        self._replica = replica
        self._lock = replica.runtime.lock()
        self._stopping = False
        self._thread: Thread | None = None
        # The peer's word on the size that it was asked for: what went wrong there, and the remedy.
        self._peers_word: tuple[int, str, str] | None = None

    # On the primary

    def grow(self, peer: Peer | None, size_bytes: int) -> tuple[str, str]:
        """Give the volume this size; what there is to say about it, and a warning. Raises MirrorError.

        Call with the role lock held.
        """
        replica = self._replica
        known = replica.superblock
        session = None if peer is None else peer.session
        verdict = may_grow(
            Wish(
                wanted_bytes=size_bytes,
                size_bytes=known.size_bytes,
                next_size_bytes=known.next_size_bytes,
                role=replica.role,
                disk=replica.disk_state(session is not None),
                connection=ConnectionState.STANDALONE if peer is None else peer.state,
                peer_disk=None if session is None else session.peer.disk,
                alone=peer is None,
            )
        )
        if isinstance(verdict, Refused):
            raise verdict.error()
        if size_bytes == known.size_bytes:
            return f"the volume has {exact_size_text(size_bytes)} already", ""
        self._begin("making room on this replica")
        warning = ""
        try:
            if peer is None:
                self._grow_alone(size_bytes)
            else:
                assert session is not None
                warning = self._grow_both(peer, session, size_bytes)
        finally:
            self.stage = ""
        log.info("the volume has %d bytes now", size_bytes)
        return f"the volume has {exact_size_text(size_bytes)} now; clients see it at their next connect", warning

    def _grow_alone(self, size_bytes: int) -> None:
        if self._replica.superblock.next_size_bytes:
            forget_next(self._replica)
        make_room(self._replica, size_bytes, self._check_not_stopping)
        record_next(self._replica, size_bytes)
        commit(self._replica, size_bytes)

    def _grow_both(self, peer: Peer, session: Session, size_bytes: int) -> str:
        def go_on() -> None:
            self._check_not_stopping()
            if session.ended:
                raise OperatorError(
                    f"the link to the peer was lost ({session.reason}); the volume keeps its size", remedy="try again"
                )

        make_room(self._replica, size_bytes, go_on)
        with peer.no_handshake(HANDSHAKE_PATIENCE_S):
            go_on()
            record_next(self._replica, size_bytes)
        self.stage = "the peer makes room"
        try:
            self._ask_for_room(peer, session, size_bytes)
        except OperatorError:
            forget_next(self._replica)
            raise
        except MirrorError as error:
            session.end(f"a resize with unknown outcome: {error.message}")
            raise OperatorError(
                f"the peer was lost before it said that it has room ({error.message})",
                remedy="when it is back the resize is finished or undone on both; `nbdmirror status` tells",
            ) from error
        self.stage = "both take the new size"
        return self._commit_both(peer, session, size_bytes)

    def _ask_for_room(self, peer: Peer, session: Session, size_bytes: int) -> None:
        """Return when the peer has durably recorded the size. OperatorError: it refused, and has not."""
        self._peers_word = None
        session.request("resize_prepare", REQUEST_TIMEOUT_S, size=self._replica.size_bytes, next_size=size_bytes)
        with peer.changed:
            peer.changed.wait_for(lambda: self._word_on(size_bytes) or session.ended or self._stopping)
            word = self._word_on(size_bytes)
        if word is None:
            raise LinkLost(session.reason or "this replica stops")
        _, error, remedy = word
        if error:
            raise OperatorError(f"the peer can't grow: {error}", remedy=remedy)

    def _word_on(self, size_bytes: int) -> tuple[int, str, str] | None:
        word = self._peers_word
        return word if word is not None and word[0] == size_bytes else None

    def _commit_both(self, peer: Peer, session: Session, size_bytes: int) -> str:
        """Both have room, so the size is settled, whatever happens now: the peer takes it here or at a handshake."""
        warning = ""
        try:
            session.request("resize_commit", REQUEST_TIMEOUT_S, size=size_bytes)
        except MirrorError as error:
            # Nothing behind the old end may travel in a session whose other side may not know of it.
            session.end(f"the peer did not take the new size: {error.message}")
            warning = "the peer was lost in the last moment; it takes the new size when it is back"
        try:
            with peer.no_handshake(HANDSHAKE_PATIENCE_S):
                commit(self._replica, size_bytes)
        except BaseException:
            session.end("this replica did not take the new size yet")
            raise
        return warning

    # On the secondary

    def answer(self, peer: Peer, session: Session, message: dict[str, Any]) -> None:
        """A request of the peer's, in the session's control thread."""
        operation = message["op"]
        if operation == "resize_prepared":
            error, remedy = (words(message.get(key) or "") for key in ("error", "remedy"))
            self._peers_word = (_size(message.get("size")), error, remedy)
        elif operation == "resize_prepare":
            self._begin_preparing(peer, session, _size(message.get("size")), _size(message.get("next_size")))
        else:
            self._commit_for_peer(_size(message.get("size")))

    def _begin_preparing(self, peer: Peer, session: Session, size_bytes: int, next_size_bytes: int) -> None:
        replica = self._replica
        known = replica.superblock
        if replica.role is Role.PRIMARY:
            raise OperatorError("both replicas take themselves for primary", remedy="see `nbdmirror status` on both")
        if known.size_bytes != size_bytes or next_size_bytes <= size_bytes:
            raise OperatorError(
                f"the peer has {exact_size_text(known.size_bytes)}, not {exact_size_text(size_bytes)}",
                remedy="report this",
            )
        if replica.failed or known.disk is not DiskState.UP_TO_DATE:
            raise OperatorError("the peer's disk is not UpToDate", remedy="wait until it is")
        if known.next_size_bytes:
            raise OperatorError(
                f"a resize to {exact_size_text(known.next_size_bytes)} was broken off on the peer",
                remedy="`nbdmirror disconnect DIR`, then `nbdmirror connect DIR` finishes or undoes it",
            )
        self._begin("making room, as the primary asked")
        self._thread = replica.runtime.spawn("resize", self._prepare, peer, session, next_size_bytes)

    def _prepare(self, peer: Peer, session: Session, size_bytes: int) -> None:
        def go_on() -> None:
            self._check_not_stopping()
            if session.ended:
                raise LinkLost(session.reason)

        trouble: dict[str, str] = {}
        try:
            make_room(self._replica, size_bytes, go_on)
            with peer.no_handshake(HANDSHAKE_PATIENCE_S):
                go_on()
                record_next(self._replica, size_bytes)
        except MirrorError as error:
            log.error("no room for %d bytes: %s", size_bytes, error)
            trouble = {"error": error.message, "remedy": error.remedy}
        finally:
            self.stage = ""
        try:
            session.notify("resize_prepared", size=size_bytes, **trouble)
        except LinkLost as lost:
            session.end(lost.message)

    def _commit_for_peer(self, size_bytes: int) -> None:
        known = self._replica.superblock
        if size_bytes not in (known.next_size_bytes, known.size_bytes):
            raise OperatorError(f"the peer has no room for {exact_size_text(size_bytes)}", remedy="report this")
        commit(self._replica, size_bytes)
        log.info("the volume has %d bytes now", size_bytes)

    # Both

    def _begin(self, stage: str) -> None:
        with self._lock:
            if self.stage:
                raise OperatorError(f"a resize is under way: {self.stage}", remedy="wait for it to end")
            self.stage = stage

    def _check_not_stopping(self) -> None:
        if self._stopping:
            raise OperatorError("this replica stops; the volume keeps its size", remedy="resize after the next start")

    def stop(self, peer: Peer | None) -> None:
        """Break off what runs, as soon as that can be."""
        self._stopping = True
        if peer is not None:
            with peer.changed:
                peer.changed.notify_all()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join(STOP_PATIENCE_S)


def _size(value: object) -> int:
    if type(value) is not int or not size_is_right(value):
        raise ProtocolError(f"{words(value)} where a volume's size was due")
    return value
