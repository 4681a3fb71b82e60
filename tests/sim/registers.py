"""One sector as a register: which orders of its reads and writes explain what was answered, and what may survive.

Linearizability is a property of each sector alone, so a volume is checked sector by sector. `replay` searches the
orders of one sector's accesses as Wing and Gong do, just in time as Lowe does: an operation is put in its place only
when an answer asks for it. `Survival` says what a disk may hold after a power cut, by the flushes that were answered.
Pure functions; times are numbers that rise with every event.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

# So many orders side by side are a handful of milliseconds; beyond them the sector counts as not checked.
CONFIGURATIONS_MAX = 20_000

# In the way of every real answer: nothing has been cut off.
FOREVER = 1 << 62


class Timed(Protocol):
    """What is asked of an operation. One that has no answer may take effect at any time until the end, or never."""

    @property
    def writes(self) -> bool: ...
    @property
    def fua(self) -> bool: ...
    @property
    def call_time(self) -> int: ...
    @property
    def done_time(self) -> int | None:
        """When it was answered without an error."""


class Access(NamedTuple):
    """An operation as one sector sees it: the tag that it writes there, or the one that it read."""

    operation: Timed
    value: int

    def answered(self, until: int) -> bool:
        done_time = self.operation.done_time
        return done_time is not None and done_time <= until


class Replay(NamedTuple):
    """`values`: what a reader could see at the end. `refused`: reads that no order explains; each was then believed."""

    values: frozenset[int]
    refused: list[Access]
    gave_up: bool = False


class _TooManyOrdersError(Exception):
    pass


class _Pending(NamedTuple):
    bit: int
    value: int
    # Nobody waits for it: it is put in its place only where a read asks for its tag.
    unanswered: bool
    stable: bool


class _Search:
    """The configurations that explain everything up to now.

    A configuration is (value, bits of the pending accesses that have taken effect). Reads change nothing, so one takes
    effect as soon as its value is there; and an unanswered write that nobody reads can wait for ever.
    """

    def __init__(self, starts: Collection[int], mark: int, marked: int) -> None:
        # The bit `mark` says: the write whose bit is `marked` has taken effect, and no stable one may follow.
        self.mark, self.marked = mark, marked
        self.configurations = {(value, 0) for value in starts}
        self.writes: list[_Pending] = []
        self.wanted: dict[int, int] = {}

    def call_write(self, pending: _Pending) -> None:
        self.writes.append(pending)

    def call_read(self, bit: int, value: int) -> None:
        self.wanted[value] = self.wanted.get(value, 0) | bit
        self.configurations = {(now, done | bit if now == value else done) for now, done in self.configurations}

    def answer(self, bit: int) -> bool:
        """Whether some order has it take effect by now; if none has, nothing is changed."""
        found = {(value, done ^ bit) for value, done in self.configurations if done & bit}
        if len(found) == len(self.configurations):
            self.configurations = found
            return True
        seen = set(self.configurations)
        queue = list(seen)
        while queue:
            value, done = queue.pop()
            if done & bit:
                found.add((value, done ^ bit))
                continue
            for following in self._following(done):
                if following not in seen:
                    seen.add(following)
                    queue.append(following)
            if len(seen) > CONFIGURATIONS_MAX:
                raise _TooManyOrdersError
        if found:
            self.configurations = found
        return bool(found)

    def _following(self, done: int) -> list[tuple[int, int]]:
        following = []
        for bit, value, unanswered, stable in self.writes:
            if done & bit or (stable and done & self.mark):
                continue
            gained = self.wanted.get(value, 0) & ~done
            if unanswered and not gained:
                continue
            following.append((value, done | bit | gained | (self.mark if bit == self.marked else 0)))
        return following

    def forget(self, access: Access, bit: int) -> None:
        if access.operation.writes:
            self.writes = [pending for pending in self.writes if pending.bit != bit]
        else:
            self.wanted[access.value] &= ~bit

    def believe(self, value: int, bit: int) -> None:
        self.configurations = {(value, done & ~bit) for _, done in self.configurations}

    def values(self) -> frozenset[int]:
        """What can be there now, with whatever is pending."""
        return frozenset(
            {value for value, _ in self.configurations}
            | {write.value for write in self.writes for _, done in self.configurations if not done & write.bit}
        )


def replay(
    starts: Collection[int],
    accesses: Sequence[Access],
    until: int = FOREVER,
    last: int | None = None,
    stable: Collection[int] = (),
    *,
    stop_at_once: bool = False,
) -> Replay:
    """Search the orders of `accesses`, of which only what happened by `until` counts, from any of the values `starts`.

    With `last`, the index of a write: only orders in which none of those with an index in `stable` follows it.
    """
    events = []
    for index, access in enumerate(accesses):
        answered = access.answered(until)
        if access.operation.call_time <= until and (answered or access.operation.writes):
            events.append((access.operation.call_time, False, index))
            if answered:
                events.append((access.operation.done_time or 0, True, index))
    events.sort()
    search = _Search(starts, 1 << len(accesses), 0 if last is None else 1 << last)
    refused = []
    try:
        for _, is_answer, index in events:
            access, bit = accesses[index], 1 << index
            if is_answer:
                explained = search.answer(bit)
                search.forget(access, bit)
                if not explained:
                    refused.append(access)
                    if stop_at_once:
                        break
                    search.believe(access.value, bit)
            elif access.operation.writes:
                search.call_write(_Pending(bit, access.value, not access.answered(until), index in stable))
            else:
                search.call_read(bit, access.value)
    except _TooManyOrdersError:
        return Replay(frozenset(starts) | {access.value for access in accesses}, refused, gave_up=True)
    return Replay(search.values(), refused)


class Survival:
    """What a disk may hold after a power cut at `until`: each value after which nothing stable was surely written.

    `flush_time` is the latest call of a flush that was answered by then: it made stable what was answered before it,
    and the start. A write with FUA is stable once answered. Without a flush, `older` gives what could have survived
    instead of the start.
    """

    def __init__(
        self,
        starts: frozenset[int],
        older: Callable[[], frozenset[int]],
        accesses: Sequence[Access],
        flush_time: int | None,
        until: int,
    ) -> None:
        self.starts, self.older, self.flush_time, self.until = starts, older, flush_time, until
        self.accesses = [
            access
            for access in accesses
            if access.operation.call_time <= until and (access.operation.writes or access.answered(until))
        ]
        self.stable = {index for index, access in enumerate(self.accesses) if self._is_stable(access)}
        self.last_read_time = max(
            (access.operation.done_time or 0 for access in self.accesses if not access.operation.writes), default=0
        )

    def values(self) -> frozenset[int]:
        written = {access.value for access in self.accesses if access.operation.writes}
        candidates = written | self.starts
        if not self.stable and self.flush_time is None:
            candidates |= self.older()
        return frozenset(value for value in candidates if self.may_hold(value))

    def may_hold(self, value: int) -> bool:
        # The latest first: it is nearly always the one.
        for index in reversed(range(len(self.accesses))):
            access = self.accesses[index]
            if access.value == value and access.operation.writes and self._may_be_last(index):
                return True
        if self.stable:
            return False
        if self.flush_time is None:
            return value in self.starts or value in self.older()
        if value not in self.starts:
            return False
        return len(self.starts) == 1 or self._explained([value]) or self.is_wrong

    @cached_property
    def is_wrong(self) -> bool:
        """A history that nothing explains says nothing here either."""
        return not self._explained(self.starts)

    def _explained(self, starts: Collection[int], last: int | None = None, stable: Collection[int] = ()) -> bool:
        return not replay(starts, self.accesses, self.until, last, stable, stop_at_once=True).refused

    def _is_stable(self, access: Access) -> bool:
        if not access.operation.writes or not access.answered(self.until):
            return False
        covered = self.flush_time is not None and (access.operation.done_time or 0) < self.flush_time
        return access.operation.fua or covered

    def _may_be_last(self, index: int) -> bool:
        """Whether some order that explains the reads has nothing stable after this write."""
        access = self.accesses[index]
        call_time = access.operation.call_time
        others = [self.accesses[other].operation for other in self.stable if other != index]
        if access.answered(self.until):
            done_time = access.operation.done_time or 0
            if any(other.call_time > done_time for other in others):
                return False
        if all((other.done_time or 0) < call_time for other in others):
            return True
        # Without a read at that time or later, whatever times allow is possible.
        if self.last_read_time < call_time:
            return True
        return self._explained(self.starts, index, self.stable - {index}) or self.is_wrong
