"""Makes cold extents hot: group commit of the activity log, and the stabilisation that frees its slots.

A write may not begin before its extents are in the durable log (invariant log-before-write). All cold requests that
arrive while one record is being written share the next one. The thread that finds no writer at work becomes the
writer; nobody waits for a thread of its own. An extent leaves the log only after a stabilisation: a flush on both
replicas while connected, its dirty bits made durable otherwise; neither needs a slot (invariant log-never-deadlocks).
It begins before the last slot is gone, beside the records that go on meanwhile; who finds none left waits for it.
"""

from collections.abc import Callable

from mirror.core import layout
from mirror.core.activity_log import NEED_STABLE
from mirror.replica import Replica


class LogWriter:
    """`stabilise` makes all finished writes stable on both replicas, or their dirty bits durable.

    `stabilise_beside`, called with the books held, begins the same in a thread, which calls `room_made` in the end.
    """

    def __init__(self, replica: Replica, stabilise: Callable[[], None], stabilise_beside: Callable[[], None]) -> None:
        self._replica = replica
        self._stabilise = stabilise
        self._stabilise_beside = stabilise_beside
        self._making_room = False
        self._waiting: list[tuple[int, int]] = []
        self._granted: list[tuple[int, int]] = []
        self._writing = False
        self.waits_for_release = False

    def hold(self, first: int, last: int) -> None:
        """Return when the extents first..last are held in the durable log. Raises DeviceError."""
        replica = self._replica
        wanted = (first, last)
        with replica.books:
            self._waiting.append(wanted)
            try:
                while wanted not in self._granted:
                    if self._writing:
                        replica.changed.wait()
                    else:
                        self._write_one()
                self._granted.remove(wanted)
            except BaseException:
                if wanted in self._granted:
                    self._granted.remove(wanted)
                    replica.log.release(first, last, replica.round)
                else:
                    self._waiting.remove(wanted)
                raise

    def _write_one(self) -> None:
        """Write one record, or make room for it. Called with the books held; lets them go while it does I/O."""
        replica = self._replica
        self._writing = True
        try:
            transaction = replica.log.plan(list(self._waiting))
            if transaction is NEED_STABLE:
                if self._making_room:
                    replica.changed.wait()
                    return
                if not replica.log.victims_waiting():
                    # Running writes hold every slot: the next one that ends makes room.
                    self.waits_for_release = True
                    replica.changed.wait()
                    self.waits_for_release = False
                    return
                replica.books.release()
                try:
                    self._stabilise()
                finally:
                    replica.books.acquire()
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
            for granted in transaction.granted:
                self._waiting.remove(granted)
                self._granted.append(granted)
            if not self._making_room and replica.log.runs_short and replica.log.victims_waiting():
                self._making_room = True
                self._stabilise_beside()
        finally:
            self._writing = False
            replica.changed.notify_all()

    def room_made(self) -> None:
        """What `stabilise_beside` began is over, well or not; called with the books held."""
        self._making_room = False
        self._replica.changed.notify_all()
