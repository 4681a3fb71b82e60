"""The secondary's parked writes of one session: mirror.core.parked tells what they are.

A write is applied when it may be, or when the session ends: then nobody knows whether the primary's record is durable,
and the write may have been answered, so its blocks become durably dirty and then it is applied (invariants
log-before-write, ack-c). Several threads come here: whoever carries out a request that overlaps.
"""

from typing import NamedTuple

from mirror.core.errors import DeviceError, ProtocolError
from mirror.core.limits import PARKED_BYTES_MAX
from mirror.core.parked import News, slot_of, split_number
from mirror.core.wire import Flag, Header, MessageType
from mirror.replica import Replica, extents_of


class Parking:
    """Once `settle` has returned nothing is parked any more."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._lock = replica.runtime.lock()
        # The disk did not take one.
        self.refused = False
        # By slot. Whoever has nothing to park need not come here while it is empty.
        self.writes: dict[int, _Parked] = {}

    def park(self, header: Header, payload: memoryview) -> None:
        """Keep it: no killed process loses it when this returns. Raises DeviceError, ProtocolError."""
        if not self._replica.store.parked.exists:
            raise ProtocolError("a write to be parked, for which there is no room here, as was said")
        number, _ = split_number(header.number)
        plain = header.type is MessageType.WRITE and not header.flags & ~(Flag.PARK | Flag.TIMED)
        if not plain or not 0 < header.length <= PARKED_BYTES_MAX:
            raise ProtocolError(f"a {header.type.name} message of {header.length} bytes that can't be parked")
        replica, slot = self._replica, slot_of(number)
        with self._lock:
            if slot in self.writes:
                self._apply(slot)
            replica.store.parked.keep(slot, replica.superblock.log_epoch, header.offset, payload)
            self.writes[slot] = _Parked(number, header.offset, bytes(payload))

    def release(self, news: News) -> None:
        """These may be applied. Raises DeviceError."""
        if self.writes:
            with self._lock:
                for slot, write in list(self.writes.items()):
                    if write.number <= news.through and write.number not in news.open:
                        self._apply(slot)

    def make_way(self, offset: int, length: int) -> None:
        """A request of this range comes, before which the primary must have said the same of all that overlaps.

        So no two parked writes overlap, and their order does not matter. Raises DeviceError.
        """
        if self.writes:
            with self._lock:
                for slot, write in list(self.writes.items()):
                    if write.offset < offset + length and offset < write.offset + len(write.data):
                        self._apply(slot)

    def settle(self) -> None:
        """The session has ended. Raises DeviceError."""
        replica = self._replica
        with self._lock:
            if self.writes:
                extents: set[int] = set()
                with replica.books:
                    for write in self.writes.values():
                        replica.dirty.mark(write.offset, len(write.data))
                for write in self.writes.values():
                    first, last = extents_of(write.offset, len(write.data))
                    extents.update(range(first, last + 1))
                replica.persist_extents(extents)
                for slot in list(self.writes):
                    self._apply(slot)

    def give_up(self) -> None:
        """This side lacks what is left, and durably says so: no later start may bring it back. Raises DeviceError."""
        with self._lock:
            for slot in list(self.writes):
                self._replica.store.parked.drop(slot)
                del self.writes[slot]

    def _apply(self, slot: int) -> None:
        write = self.writes[slot]
        try:
            self._replica.store.write(write.data, write.offset, False)
            self._replica.store.parked.drop(slot)
        except DeviceError:
            self.refused = True
            raise
        del self.writes[slot]


class _Parked(NamedTuple):
    number: int
    offset: int
    data: bytes
