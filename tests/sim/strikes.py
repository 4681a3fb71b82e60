"""Events that look at the state of the replicas and strike in a moment which chance hardly ever meets.

Each does only what a client, a disk, a link or a process can do.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from tests.sim.cluster import Machine  # isort: skip  the limits come before the product

from mirror.core.limits import BLOCK_BYTES, EXTENT_BYTES
from nbd_server.volume import Volume
from tests.sim.disk import SECTOR_BYTES
from tests.sim.plan import EXTENTS, ClientOperation

if TYPE_CHECKING:
    from tests.sim.life import Life

SECTORS_PER_EXTENT = EXTENT_BYTES // SECTOR_BYTES
SECTORS_PER_BLOCK = BLOCK_BYTES // SECTOR_BYTES
# How often is looked whether the moment has come.
LOOK_S = 0.004


def strike_source(life: "Life", number: float) -> None:
    """A block is written and zeroed; as the latter begins the primary's disk hangs, and the peer is killed that has it.

    It is back before the disk: what that still has to zero, and the flush of the handshake, end in one moment.
    """
    served = _served_in_step(life)
    if served is None:
        return
    truth, draw = life.truth, life.scheduler.random
    other = truth.held[life.world.other(served).name]
    # Nothing else is asked for meanwhile: what is answered alone begins a new generation.
    later = list(life.queue)
    life.queue.clear()
    life.scheduler.at(0.7, lambda: life.queue.extend(later))
    written = _draw_write(life, sorted(_hot(served)) or [0])

    def begin() -> None:
        if not life.healing and _served_in_step(life) is served:
            truth.on_answered = hang
            life.queue.append(written)

    def hang() -> None:
        truth.on_answered = lambda: None
        other.on_applied = kill
        served.disk.stalled_until_s = life.scheduler.now_s + draw.uniform(0.1, 0.3)
        # No write, which the primary's disk may begin with before it is told to flush.
        life.queue.append(replace(written, kind="zero"))

    def kill() -> None:
        other.on_applied = lambda: None
        if served.volume is not None and _offset(written) in _under_way(served):
            # Not before its answer has arrived.
            life.strike(draw.uniform(0.001, 0.01), life._kill_nbdkit, other.machine, number)

    life.scheduler.at(0.2, begin)


def strike_late(life: "Life") -> None:
    """As a flush has what is parked applied, that hangs; when one more write waits to be parked, the link breaks.

    The place of that one the client then writes anew.
    """
    served = _served_in_step(life)
    if served is not None:
        # Records take long, so that several cold writes are on their way, and no flush is alone.
        served.disk.slow = life.scheduler.random.uniform(10.0, 40.0)
        _Late(life, served).look()


class _Late:
    """One such strike."""

    def __init__(self, life: "Life", served: Machine) -> None:
        self._life = life
        self._served = served
        self._other = life.world.other(served)
        self._until_s = life.scheduler.now_s + 0.5
        self._cold: list[ClientOperation] = []
        self._hung = False

    def look(self) -> None:
        life = self._life
        if life.healing or _served_in_step(life) is not self._served or life.scheduler.now_s > self._until_s:
            return
        late = self._late()
        if late:
            for connection in life.world.links.live():
                connection.reset()
            life.queue.extendleft(late)
            return
        self._press()
        life.scheduler.at(LOOK_S, self.look)

    def _late(self) -> list[ClientOperation]:
        """What waits to be parked behind what hangs, which hangs as soon as there is something parked."""
        assert self._other.volume is not None
        disk, parking = self._other.disk, self._other.volume._peer._parking
        if parking.writes and not self._hung:
            self._hung = True
            disk.stick_s = self._life.scheduler.random.uniform(0.1, 0.5)
        if not self._hung or disk.stick_s or not parking._lock._held:
            return []
        under_way = _under_way(self._other)
        return [one for one in self._cold if _offset(one) in under_way]

    def _press(self) -> None:
        cold = _cold(self._served)
        if cold and len(self._cold) < 12:
            self._cold.append(_draw_write(self._life, cold))
            self._life.queue.extendleft((ClientOperation("flush"), self._cold[-1]))


def strike_settled(life: "Life", machine: Machine, number: float) -> None:
    """As the next write has been parked there the session breaks and the primary loses power; once what is parked has
    been applied, nbdkit is killed there too."""
    held = life.truth.held[machine.name]

    def part() -> None:
        volume = machine.volume
        if life.healing or volume is None:
            return
        for connection in life.world.links.live():
            connection.reset()
        life._power(life.world.other(machine), number)
        look(volume, times=100)

    def look(volume: Volume, times: int) -> None:
        if life.healing or machine.volume is not volume:
            return
        if volume._peer.session is None:
            life._kill_nbdkit(machine, number)
        elif times:
            life.scheduler.at(LOOK_S, lambda: look(volume, times - 1))

    def strike() -> None:
        held.on_parked = lambda: None
        life.scheduler.at(0.0, part)

    held.on_parked = strike


def strike_flush(life: "Life", machine: Machine) -> None:
    """A flush takes long there; the client presses on cold extents, and on those that just give way without it."""
    served = _served_in_step(life)
    if served is None:
        return
    draw = life.scheduler.random
    long_s = machine.disk.stick_flush_s = draw.uniform(0.2, 0.8)
    # So does what makes their dirty bits durable.
    served.disk.slow = draw.uniform(5.0, 40.0)
    until_s = life.scheduler.now_s + long_s

    def press() -> None:
        if life.healing or served.volume is None or life.scheduler.now_s > until_s:
            return
        writer = served.volume._primary._log_writer
        victims = served.volume._replica.log.victims_waiting()
        gives_way = sorted(writer._left_dirty.intersection(victims) & _hot(served))
        wanted = gives_way or ([] if writer._waiting else _cold(served))
        if wanted:
            life.queue.appendleft(_draw_write(life, wanted))
        life.scheduler.at(LOOK_S, press)

    press()


def _served_in_step(life: "Life") -> Machine | None:
    """The primary, if its session lives."""
    held = life.truth.held.values()
    return next((one.machine for one in held if one.machine.is_primary and life.truth.connected(one)), None)


def _hot(machine: Machine) -> set[int]:
    """But for those behind the volume's first size, which no client writes."""
    return set() if machine.volume is None else machine.volume._replica.log.hot_extents() & {*range(EXTENTS)}


def _cold(machine: Machine) -> list[int]:
    return sorted({*range(EXTENTS)} - _hot(machine))


def _under_way(machine: Machine) -> set[int]:
    """Where what it carries out begins."""
    return set() if machine.volume is None else {one.offset for one in machine.volume._replica.under_way}


def _draw_write(life: "Life", extents: list[int]) -> ClientOperation:
    """Of some block of one of these."""
    first = life.scheduler.random.choice(extents) * SECTORS_PER_EXTENT
    blocks = range(first, first + SECTORS_PER_EXTENT, SECTORS_PER_BLOCK)
    return ClientOperation("write", life.scheduler.random.choice(blocks), SECTORS_PER_BLOCK)


def _offset(operation: ClientOperation) -> int:
    return operation.first * SECTOR_BYTES
