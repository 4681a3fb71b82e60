"""Changes the size of the activity log while the volume is served, and chooses it by the operator's goal.

A change begins a new epoch of the log, as a start does. Its steps, and why a crash at any of them finds one log whole:

 1. what can be written before is: a flush of both, the dirty map, the bits of DIR/unproven. Requests go on meanwhile.
 2. the requests are held, and those on their way end: no extent is held any more.
 3. all that the old log names is stable on both or durably dirty, and durably to be proven     (log-before-write)
 4. the superblock names the new epoch and its slots. Until its first copy is durable, the ring of the old epoch counts,
    and its records name too much at worst; from then on they are of a former epoch, and the ring is empty.
 5. the log in memory begins anew, and the requests go on.

When requests do not end soon the change is left for later: held requests are what a client waits for. Shrinking is the
same as growing: what the old log named is not needed any more.

What lost: records of several sizes in one ring (each rule of reading it would have to say which slots it means, and a
torn record could be the one that says so), copying the hot extents into the first records of the new epoch (up to 32 of
them before the first request may go on, against an extent that is hot again with its next write).
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from mirror.core import log_size
from mirror.core.errors import DeviceError, MirrorError, OperatorError
from mirror.core.layout import Geometry
from mirror.core.states import Role
from mirror.primary import Primary
from mirror.replica import Replica
from mirror.runtime import Thread

log = logging.getLogger(__name__)

# How often the size is thought about; a change of what clients do is met within a few looks.
LOOK_INTERVAL_S = 10.0
# Held requests wait for the running ones at most so long before the change is put off.
PAUSE_S = 0.1
# A stop waits so long for a change that has begun.
STOP_PATIENCE_S = 2.0


# The durable steps. Each may be repeated.


def leave_nothing_behind(replica: Replica) -> None:
    """Whatever the log names is stable or durably dirty, and durably to be proven. Raises DeviceError."""
    with replica.books:
        bits_durable = replica.unproven.evict(replica.log.hot_extents())
    if not bits_durable:
        replica.unproven.persist()
    replica.persist_map()


def begin_epoch(replica: Replica, slots: int) -> None:
    """The superblock names an empty log of this size, then the memory follows. Raises DeviceError."""
    epoch = replica.superblock.log_epoch + 1
    replica.update(log_epoch=epoch, log_slots=slots)
    with replica.books:
        replica.log.begin_epoch(epoch, slots)


class LogSizer:
    """That of one replica. `at_rest`: inside, no role changes, nobody shakes hands, and the replica is not closed.

    Without a goal it leaves the size as it is, and only tells what another one would do.
    """

    def __init__(
        self, primary: Primary, goal_s: float | None, at_rest: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._primary = primary
        self._replica = primary.replica
        self._goal_s = goal_s
        self._at_rest = at_rest
        self._changed = self._replica.runtime.condition()
        self._stopping = False
        self._thread: Thread | None = None

    def start(self) -> None:
        if self._goal_s is not None:
            self._thread = self._replica.runtime.spawn("log-size", self._run)

    def stop(self) -> None:
        """No change begins any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join(STOP_PATIENCE_S)

    def _run(self) -> None:
        while not self._wait():
            decision = self._decide()
            if decision.slots is None or self._replica.role is not Role.PRIMARY:
                continue
            try:
                if self.change(decision.slots):
                    log.info("the activity log has %d extents now: %s", decision.slots, decision.reason)
            except MirrorError as error:
                log.info("the activity log keeps its size for now: %s", error.message)

    def _wait(self) -> bool:
        """Until the next look. True: there is none."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._stopping, LOOK_INTERVAL_S))

    # Deciding

    def _decide(self) -> log_size.Decision:
        with self._replica.books:
            decision = log_size.decide(self._look())
            reuse = self._replica.log.reuse
            if reuse is not None:
                reuse.fade()
        return decision

    def _look(self) -> log_size.Look:
        """Call with the books held."""
        replica = self._replica
        reuse = replica.log.reuse
        if reuse is not None:
            reuse.tell(replica.log.hits + replica.log.misses)
        return log_size.Look(
            slots=replica.log.slots,
            volume_extents=Geometry(replica.size_bytes).extents,
            goal_s=self._goal_s or 0.0,
            bytes_per_s=self._bytes_per_s(),
            misses=reuse.misses if reuse is not None else lambda _: None,
        )

    def _bytes_per_s(self) -> float | None:
        return log_size.resync_bytes_per_s(self._replica.superblock.last_resync)

    # Changing

    def change(self, slots: int) -> bool:
        """Give the log this many slots. False when running requests did not end soon. Raises MirrorError."""
        replica, primary = self._replica, self._primary
        self._check_keeps_log()
        if primary.session is not None:
            # Fewer blocks are durably dirty then, so fewer are compared after a crash.
            primary.flushes.run_round()
        leave_nothing_behind(replica)
        with self._at_rest():
            self._check_keeps_log()
            try:
                changed = primary.pause(PAUSE_S) and self._change_held(slots)
            finally:
                primary.resume()
        # Those that a flush has made stable since.
        replica.persist_map()
        return changed

    def _check_keeps_log(self) -> None:
        """Not on a secondary: a flush round that loses the link there would begin a history."""
        replica = self._replica
        if replica.role is not Role.PRIMARY or replica.failed or not replica.tracked:
            raise OperatorError("only a primary with a sound disk and a peer keeps a log", remedy="see its status")

    def _change_held(self, slots: int) -> bool:
        """No request runs; under A and B the peer may still have to apply what was answered."""
        replica = self._replica
        with replica.books:
            if not replica.changed.wait_for(lambda: replica.log.quiet, PAUSE_S):
                return False
        leave_nothing_behind(replica)
        try:
            begin_epoch(replica, slots)
        except DeviceError as error:
            # Which epoch counts is not known, so that no record of either can be relied on.
            self._primary.disk_failed(error)
            raise
        return True

    # For people

    def status(self) -> dict[str, Any]:
        """The trade, beside what the log counts itself; keys as docs/operations.md describes them."""
        with self._replica.books:
            look = self._look()
            decision = log_size.decide(look) if self._goal_s is not None else None
            sizes = log_size.SIZES
            smaller = max((size for size in sizes if size < look.slots), default=None)
            larger = None if look.holds_all else min((size for size in sizes if size > look.slots), default=None)
            return {
                **self._trade(look, look.slots),
                "goal_s": self._goal_s,
                "bytes_per_s": None if look.bytes_per_s is None else round(look.bytes_per_s),
                "reason": self._reason(decision),
                "smaller": self._trade(look, smaller) if smaller is not None else None,
                "larger": self._trade(look, larger) if larger is not None else None,
            }

    def _reason(self, decision: log_size.Decision | None) -> str | None:
        if decision is not None and self._replica.role is not Role.PRIMARY:
            return f"a primary chooses, within {LOOK_INTERVAL_S:g} s once it is one"
        return None if decision is None else decision.reason

    @staticmethod
    def _trade(look: log_size.Look, slots: int) -> dict[str, Any]:
        misses = look.misses(slots)
        return {
            "extents": slots,
            "miss_rate": None if misses is None else round(misses, 4),
            "resync_s": round(log_size.resync_s(slots, look.volume_extents, look.bytes_per_s), 1),
        }
