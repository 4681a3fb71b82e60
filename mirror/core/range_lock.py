"""Overlapping ranges wait for each other in the order of their arrival; others don't (invariant same-order).

A request becomes a ticket at once: granted, or waiting for every earlier ticket that it overlaps, granted or not. So a
large one is not overtaken by a stream of small ones, and since a ticket waits for earlier ones only, there is no circle
to wait in, as long as nobody waits for a second ticket while he holds one.

Tickets lie in buckets by extent, so a request looks at those of its own extents alone: with some dozen requests on the
way, mostly none. An interval tree lost (slower at any depth that occurs), and so did one lock per extent (a sequential
writer would queue behind itself).

Pure: the caller holds a lock around each call, and wakes those whom `unlock` names.
"""

from mirror.core.limits import EXTENT_BYTES


class Ticket:
    """One request's place. `granted` is True from when it may go on.

    `answered` is for the holder to set: a change that was answered and stays locked until the peer has applied it
    (under protocols A and B) no longer makes readers wait.
    """

    __slots__ = ("_blockers", "_end", "_followers", "_offset", "answered", "granted")

    def __init__(self, offset: int, end: int) -> None:
        self._offset = offset
        self._end = end
        self._blockers = 0
        self._followers: list[Ticket] | None = None
        self.granted = True
        self.answered = False

    def __repr__(self) -> str:
        return f"<{'held' if self.granted else 'waiting'} {self._offset}..{self._end}>"


class RangeLock:
    """All tickets of one volume."""

    def __init__(self) -> None:
        self._buckets: dict[int, list[Ticket]] = {}

    def request(self, offset: int, length: int) -> Ticket:
        """A ticket for the range: granted, or waiting behind the earlier ones that it overlaps."""
        assert length > 0, f"a range of {length} bytes"
        end = offset + length
        ticket = Ticket(offset, end)
        buckets = self._buckets
        first = offset // EXTENT_BYTES
        if first not in buckets and end <= (first + 1) * EXTENT_BYTES:
            # Mostly: one extent, which nobody else works on.
            buckets[first] = [ticket]
            return ticket
        for extent in range(first, (end - 1) // EXTENT_BYTES + 1):
            bucket = buckets.get(extent)
            if bucket is None:
                buckets[extent] = [ticket]
                continue
            for earlier in bucket:
                if earlier._offset < end and offset < earlier._end:
                    # Two that share several extents are counted in each, and counted down as often.
                    _follow(earlier, ticket)
            bucket.append(ticket)
        return ticket

    def unlock(self, ticket: Ticket) -> list[Ticket]:
        """Give a ticket back, also one that still waits; returns those that it grants, in order of arrival."""
        buckets = self._buckets
        for extent in range(ticket._offset // EXTENT_BYTES, (ticket._end - 1) // EXTENT_BYTES + 1):
            bucket = buckets[extent]
            if len(bucket) == 1:
                assert bucket[0] is ticket, "a ticket that is not in its bucket"
                del buckets[extent]
            else:
                bucket.remove(ticket)
        if not ticket.granted:
            # Those it waited for still count it down: it must never come to nought.
            ticket._blockers = -1
        followers = ticket._followers
        if followers is None:
            return []
        ticket._followers = None
        granted = []
        for follower in followers:
            follower._blockers -= 1
            if follower._blockers == 0:
                follower.granted = True
                granted.append(follower)
        return granted

    def busy(self, offset: int, length: int) -> bool:
        """Whether the range overlaps a held one whose change was not answered yet."""
        end = offset + length
        buckets = self._buckets
        for extent in range(offset // EXTENT_BYTES, (end - 1) // EXTENT_BYTES + 1):
            bucket = buckets.get(extent)
            if bucket is not None:
                for held in bucket:
                    if held._offset < end and offset < held._end and held.granted and not held.answered:
                        return True
        return False

    def unanswered(self) -> int:
        """How many changes are held or wait, and were not answered yet."""
        return sum(not one.answered for one in self.tickets())

    def tickets(self) -> set[Ticket]:
        """All that are held or wait."""
        return {one for bucket in self._buckets.values() for one in bucket}

    @property
    def idle(self) -> bool:
        """Nothing is held and nobody waits."""
        return not self._buckets


def _follow(earlier: Ticket, later: Ticket) -> None:
    later.granted = False
    later._blockers += 1
    if earlier._followers is None:
        earlier._followers = [later]
    else:
        earlier._followers.append(later)
