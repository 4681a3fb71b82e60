"""Makes cold extents hot: group commit of the activity log, and the stabilisation that frees its slots.

A write may not begin before its extents are in the durable log (invariant log-before-write). All cold requests that
arrive while one record is being written share the next one. The thread that finds no writer at work becomes the
writer; nobody waits for a thread of its own. An extent leaves the log only after a stabilisation: a flush on both
replicas while connected, its dirty bits made durable otherwise; neither needs a slot (invariant log-never-deadlocks).
It begins before the last slot is gone, beside the records that go on meanwhile; who finds none left waits for it.

A flush of much that was written takes as long as the disk does, seconds it may be. Nobody waits so long for a slot:
after a moment some extents give way with their dirty bits made durable, as where there is no peer. Once a flush
has made them stable these say too much, which is mended by whoever makes room.
"""

from collections.abc import Callable

from mirror.core import layout
from mirror.core.activity_log import NEED_STABLE
from mirror.core.limits import LEFT_DIRTY_EXTENTS_MAX, LOG_ROOM_WAIT_S
from mirror.replica import Replica
from mirror.runtime import Lock


class _Waiting:
    """A request whose extents are cold. `woken` is let go when it has them, or when it is its turn to write."""

    __slots__ = ("extents", "granted", "woken")

    def __init__(self, extents: tuple[int, int], woken: Lock) -> None:
        self.extents = extents
        self.granted = False
        self.woken = woken
        woken.acquire()


class LogWriter:
    """`stabilise` makes all finished writes stable on both replicas, or their dirty bits durable.

    `stabilise_beside`, called with the books held, begins the same in a thread, which calls `room_made` in the end.
    """

    def __init__(self, replica: Replica, stabilise: Callable[[], None], stabilise_beside: Callable[[], None]) -> None:
        self._replica = replica
        self._stabilise = stabilise
        self._stabilise_beside = stabilise_beside
        self._making_room = False
        self._making_room_since_s = 0.0
        self._room_failed = False
        # What it took of late to make dirty bits durable.
        self._leave_took_s = 0.0
        # Those that gave way with their dirty bits durable; a flush makes them stable.
        self._left_dirty: set[int] = set()
        # In the order of arrival. Each sleeps on a lock of its own: woken all at once, most would only sleep again.
        self._waiting: list[_Waiting] = []
        # One of them writes a record, or waits for room.
        self._writing = False
        self.waits_for_release = False

    def hold(self, first: int, last: int) -> None:
        """Return when the extents first..last are held in the durable log. Raises DeviceError."""
        books = self._replica.books
        own = _Waiting((first, last), self._replica.runtime.lock())
        with books:
            self._waiting.append(own)
            writes, self._writing = not self._writing, True
        if not writes:
            own.woken.acquire()
            if own.granted:
                return
        with books:
            try:
                while not own.granted:
                    self._write_one()
            except BaseException:
                if own.granted:
                    self._replica.log.release(first, last, self._replica.round)
                else:
                    self._waiting.remove(own)
                raise
            finally:
                self._hand_over()

    def _hand_over(self) -> None:
        """Let the one that has waited longest write the next record; called with the books held."""
        if self._waiting:
            self._waiting[0].woken.release()
        else:
            self._writing = False

    def _write_one(self) -> None:
        """Write one record, or make room for it. Called with the books held; lets them go while it does I/O."""
        replica = self._replica
        transaction = replica.log.plan([one.extents for one in self._waiting])
        if transaction is NEED_STABLE:
            self._wait_for_room()
            return
        assert transaction is not None, "one writer at a time, and something is wanted"
        record = layout.encode_log_record(transaction.record) if transaction.record.changes else b""
        bits_durable = replica.unproven.evict(transaction.victims)
        replica.books.release()
        try:
            if not bits_durable:
                # Once the record says that they left the log, only their bits tell that they are to be compared.
                replica.unproven.persist()
            if record:
                replica.store.write_log_record(transaction.position, record)
        except BaseException:
            replica.books.acquire()
            replica.log.abort(transaction)
            raise
        replica.books.acquire()
        replica.log.commit(transaction)
        # Those that have waited longest; whoever came meanwhile stands behind them.
        count = len(transaction.granted)
        granted, self._waiting = self._waiting[:count], self._waiting[count:]
        for one in granted:
            one.granted = True
            one.woken.release()
        if not self._making_room and replica.log.runs_short and replica.log.victims_waiting():
            self._begin_beside()

    def _begin_beside(self) -> None:
        """Begin to make room; called with the books held."""
        self._making_room = True
        self._making_room_since_s = self._replica.runtime.now_s()
        self._stabilise_beside()

    def _wait_for_room(self) -> None:
        """Until something changed about it. Called with the books held; lets them go meanwhile."""
        replica = self._replica
        victims = replica.log.victims_waiting()
        # On a disk that seeks a flush always takes longer, and so do dozens of pages of the map: leaving would not pay.
        patience_s = max(LOG_ROOM_WAIT_S, 2 * self._leave_took_s)
        if self._making_room:
            patience_s -= replica.runtime.now_s() - self._making_room_since_s
        if not victims:
            # Running writes hold every slot: the next one that ends makes room.
            self.waits_for_release = True
            replica.changed.wait()
            self.waits_for_release = False
        elif not self._making_room and not self._room_failed:
            self._begin_beside()
        elif not self._making_room:
            # It could not begin beside, or it failed: whoever needs room tries himself, and is told.
            self._room_failed = False
            replica.books.release()
            try:
                self._stabilise()
            finally:
                replica.books.acquire()
        elif patience_s > 0:
            replica.changed.wait(patience_s)
        else:
            self._leave_dirty(victims[:LEFT_DIRTY_EXTENTS_MAX])

    def _leave_dirty(self, extents: list[int]) -> None:
        """Let these give way without a flush. Called with the books held; lets them go meanwhile."""
        replica = self._replica
        # One step: whatever ends later belongs to the next round, and its dirty bits are not durable yet.
        number = replica.round
        replica.round += 1
        self._left_dirty.update(extents)
        since_s = replica.runtime.now_s()
        replica.books.release()
        try:
            replica.persist_extents(extents)
        finally:
            replica.books.acquire()
        self._leave_took_s = replica.runtime.now_s() - since_s
        replica.log.left_dirty(extents, number)

    def mend_left_dirty(self) -> None:
        """Of what gave way so some is stable by now: let the durable bits say so. Raises DeviceError."""
        replica = self._replica
        with replica.books:
            stable = [one for one in self._left_dirty if not replica.unstable.bits(one) | replica.flushing.bits(one)]
            self._left_dirty.difference_update(stable)
        replica.persist_extents(stable)

    def room_made(self, well: bool) -> None:
        """What `stabilise_beside` began is over, or could not begin; called with the books held."""
        self._making_room = False
        self._leave_took_s /= 2
        self._room_failed = not well
        self._replica.changed.notify_all()
