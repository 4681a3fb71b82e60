"""One life: what a seed makes happen to a cluster, and how the world is put right at its end.

A life is a list of client operations and a list of events (faults, crashes, commands), both drawn from the seed before
anything runs, so that a failing life can be shrunk by leaving some out. At its end everything is healed: machines run,
links pass, the operator does what the runbook says. Then both replicas must be in step and equal, and every answer
that a client ever got must have been true.
"""

import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.sim.cluster import Machine, World  # isort: skip  the limits come before the product

from mirror.core.errors import ConnectionCut, MirrorError, NotPrimary
from mirror.core.limits import EXTENT_BYTES
from mirror.core.states import DiskState
from nbd_server.volume import Volume
from tests.sim import strikes
from tests.sim.disk import SECTOR_BYTES
from tests.sim.history import Operation, Reign
from tests.sim.network import drop, flip_a_bit, stray
from tests.sim.plan import NAMES, SIZE_BYTES, ClientOperation, Event, Plan
from tests.sim.runbook import Runbook
from tests.sim.scheduler import Process, Stuck
from tests.sim.truth import SECTORS_PER_PAGE, Held, Truth, pattern, tags_of

# How long everything may take to be in step again, in virtual seconds, once nothing is broken any more.
HEAL_S = 90.0


@dataclass
class Result:
    plan: Plan
    violations: list[tuple[str, str]]
    timeline: list[str]
    steps: int
    virtual_s: float


class Life:
    """Runs a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world = World(plan, SIZE_BYTES)
        self.world.install()
        self.scheduler = self.world.scheduler
        self.truth = Truth(self.world)
        self.queue = deque(plan.operations)
        self.next_tag = 0
        self.runbook = Runbook(self)
        self.finished = False
        self.healing = False
        self.touched: set[int] = set()
        self.at_work: dict[str, int] = {}
        self.in_operation: dict[str, str] = {}

    def run(self) -> Result:
        world = self.world
        try:
            for machine in world.machines.values():
                machine.create(join=self.plan.join_at_start and machine.name == "n1")
                self.truth.held[machine.name].known = machine.superblock()
                machine.on_stopped = lambda clean, machine=machine: self._on_stopped(machine, clean)  # type: ignore[misc,method-assign]
            world.machines["n0"].start(primary=True)
            world.machines["n1"].start()
            self.scheduler.at(0.01, self._tick)
            for event in self.plan.events:
                self.scheduler.at(0.1 + event.at_s, lambda event=event: self._happen(event))
            last_s = max((event.at_s for event in self.plan.events), default=0.0)
            self.scheduler.run(lambda: bool(world.violations) or (not self.queue and self.idle()), last_s + 3.0)
            self.scheduler.run(lambda: bool(world.violations), max(0.0, 0.2 + last_s - self.scheduler.now_s))
            self.healing = True
            if not world.violations:
                self._put_right()
            if not world.violations:
                self.truth.check_history()
            assert self.truth.history.unchecked == 0, "a search was given up: make its life smaller"
            for task, error in self.scheduler.failures[:1]:
                if not world.violations:
                    world.violate("no-crash", f"{task} died of {type(error).__name__}: {error}")
        except Stuck as stuck:
            world.violate("no-deadlock", str(stuck))
        except Exception:  # noqa: BLE001  outermost of a life: told as its failure, with its seed
            world.violate("no-crash", traceback.format_exc())
        finally:
            world.end()
        return Result(self.plan, world.violations, world.timeline, self.scheduler.steps, self.scheduler.now_s)

    def idle(self) -> bool:
        return not any(self.at_work.values())

    # The client

    def _tick(self) -> None:
        """Attach the client to whoever serves; look at it every few milliseconds."""
        if self.world.violations:
            return
        for machine in self.world.machines.values():
            held = self.truth.held[machine.name]
            volume = machine.volume
            serves = machine.is_primary and volume is not None and volume._primary._open
            if not serves or machine.process is None or self.finished:
                continue
            if held.serving_process is not machine.process or machine.cut:
                machine.cut = False
                self.truth.begin_reign(held)
                self.at_work[machine.name] = 0
                for index in range(self.plan.workers):
                    self.scheduler.spawn(machine.process, f"worker-{index}", self._work, held, held.serving)
        self.truth.note_suspects()
        self.scheduler.at(0.01, self._tick)

    def _work(self, held: Held, reign: Reign) -> None:
        """One of nbdkit's threads: carries requests until the connection is cut."""
        machine, process = held.machine, held.machine.process
        volume = machine.volume
        assert volume is not None
        try:
            volume.admit("client", object())
        except MirrorError as error:
            self.world.note(machine.name, f"client turned away: {error}")
        while held.serving is reign and machine.process is process and not machine.cut:
            if not self.queue:
                self.scheduler.elapse(0.05)
                if self.finished:
                    return
                continue
            operation = self.queue.popleft()
            if operation.delay_s:
                self.scheduler.elapse(operation.delay_s)
            if held.serving is not reign or machine.cut:
                self.queue.appendleft(operation)
                return
            try:
                self._request(held, reign, volume, operation)
            except ConnectionCut:
                return

    def _request(self, held: Held, reign: Reign, volume: Volume, wanted: ClientOperation) -> None:
        truth, world, name = self.truth, self.world, held.name
        tag = 0
        if wanted.kind == "write":
            self.next_tag += 1
            tag = self.next_tag
        operation = reign.call(truth.now(), wanted.kind, wanted.first, wanted.count, tag, fua=wanted.fua)
        offset, length = wanted.first * SECTOR_BYTES, wanted.count * SECTOR_BYTES
        what = f"{wanted.kind} {tag or ''} [{wanted.first}+{wanted.count}]{' fua' if wanted.fua else ''}"
        world.note(name, f"  {what} ...")
        if wanted.kind not in ("read", "flush"):
            self.touched.update(range(wanted.first, wanted.first + wanted.count))
        buffer = bytearray(length) if wanted.kind == "read" else bytearray()
        self.at_work[name] = self.at_work.get(name, 0) + 1
        task = self.scheduler.current
        self.in_operation[repr(task)] = what
        process = held.machine.process
        calls = {
            "write": lambda: volume.write(memoryview(pattern(tag) * wanted.count), offset, wanted.fua),
            "read": lambda: volume.read_into(memoryview(buffer), offset),
            "flush": volume.flush,
            "zero": lambda: volume.zero(offset, length, self.next_tag % 2 == 0, False, wanted.fua),
            "trim": lambda: volume.trim(offset, length, wanted.fua),
        }
        try:
            calls[wanted.kind]()
        except ConnectionCut:
            world.note(name, f"  {what}: cut off")
            raise
        except (MirrorError, NotPrimary) as error:
            operation.fail(truth.now())
            if operation.writes:
                truth.failed_change(held, operation)
            world.note(name, f"  {what}: failed: {error}")
            return
        finally:
            if held.machine.process is process:
                self.at_work[name] -= 1
                self.in_operation.pop(repr(task), None)
        if not world.violations:
            self._answered(held, wanted, operation, tags_of(bytes(buffer)), what)

    def _answered(
        self, held: Held, wanted: ClientOperation, operation: Operation, values: list[int], what: str
    ) -> None:
        truth, world = self.truth, self.world
        if wanted.kind == "read" and truth.touches_flipped(operation.sectors):
            operation.fail(truth.now())
        else:
            operation.answer(truth.now(), values if wanted.kind == "read" else None)
        world.note(held.name, f"  {what} = {_short(values)}" if wanted.kind == "read" else f"  {what} ok")
        if wanted.kind == "flush":
            truth.answered_flush(held)
        elif wanted.kind != "read":
            truth.answered_change(held, operation, operation.call_time)

    # Events

    def _on_stopped(self, machine: Machine, clean: bool) -> None:
        held = self.truth.held[machine.name]
        held.lost_at = self.truth.now()
        if clean and held.serving is not None and held.serving_process is machine.process:
            self.truth.ended_in_order.add(held.serving.number)

    def _happen(self, event: Event) -> None:
        if self.healing or self.world.violations:
            return
        machine = self.world.machines[event.machine]
        self.world.note(event.machine, f"EVENT {event}")
        getattr(self, "_" + event.kind.replace("-", "_"))(machine, event.number)

    def killed(self, machine: Machine) -> None:
        self.at_work[machine.name] = 0
        self.truth.held[machine.name].lost_at = self.truth.now()

    def _kill(self, machine: Machine, number: float) -> None:
        was_primary = machine.is_primary
        machine.kill()
        self.killed(machine)
        self._restart(machine, number, primary=was_primary and self.scheduler.random.random() < 0.5)

    def _kill_nbdkit(self, machine: Machine, number: float) -> None:
        if machine.process is None:
            return
        machine.kill("nbdkit killed")
        self.killed(machine)
        self.scheduler.at(0.05, machine.start_again)

    def _strike_parked(self, machine: Machine, number: float) -> None:
        """About when the next write has been parked there its nbdkit is killed, or the link cut.

        Mostly the other side loses power then, so that what was parked is all that is left.
        """
        held, draw = self.truth.held[machine.name], self.scheduler.random

        def strike() -> None:
            held.on_parked = lambda: None
            delay_s = draw.choice((0.0, 0.0005, 0.002)) * draw.random()
            fate = draw.choice((self._kill_nbdkit, self._cut))
            self.strike(delay_s, fate, machine, number)
            if draw.random() < 0.7:
                other = self.world.other(machine)
                self.strike(delay_s + draw.choice((0.0, 0.001, 0.1)), self._power, other, number)

        held.on_parked = strike

    def strike(self, delay_s: float, fate: Callable[[Machine, float], None], victim: Machine, number: float) -> None:
        self.scheduler.at(delay_s, lambda: None if self.healing else fate(victim, number))

    def _strike_source(self, _machine: Machine, number: float) -> None:
        strikes.strike_source(self, number)

    def _strike_late(self, _machine: Machine, _number: float) -> None:
        strikes.strike_late(self)

    def _strike_settled(self, machine: Machine, number: float) -> None:
        strikes.strike_settled(self, machine, number)

    def _strike_flush(self, machine: Machine, _number: float) -> None:
        strikes.strike_flush(self, machine)

    def _restart(self, machine: Machine, delay_s: float, primary: bool = False) -> None:
        def restart() -> None:
            machine.boot()
            machine.start(primary=primary)

        self.scheduler.at(max(0.05, delay_s), restart)

    def _power(self, machine: Machine, number: float) -> None:
        if not machine.on:
            return
        was_primary = machine.is_primary
        machine.power_cut()
        self.killed(machine)
        self.truth.lost_power(self.truth.held[machine.name])
        self._restart(machine, number, primary=was_primary and self.scheduler.random.random() < 0.3)

    def _power_both(self, machine: Machine, number: float) -> None:
        for one in self.world.machines.values():
            self._power(one, number * (1.0 if one is machine else 0.5))

    def _stop(self, machine: Machine, number: float) -> None:
        machine.stop()
        self._restart(machine, number + 3.5)

    def _pause(self, machine: Machine, number: float) -> None:
        process = machine.process
        if process is None:
            return
        process.stopped = True
        self.scheduler.at(number, lambda: self.scheduler.resume(process))

    def _cut(self, machine: Machine, number: float) -> None:
        self._cut_one_way(machine, number)
        self._cut_one_way(self.world.other(machine), number)

    def _cut_one_way(self, machine: Machine, number: float) -> None:
        other = self.world.other(machine)
        self.world.links.set_cut(machine.name, other.name, True)
        if number < 3:
            self.scheduler.at(number, lambda: self.world.links.set_cut(machine.name, other.name, False))

    def _heal(self, _machine: Machine | None = None, _number: float = 0.0) -> None:
        for one in NAMES:
            for two in NAMES:
                self.world.links.set_cut(one, two, False)

    def _segment_fault(self, machine: Machine, fault: Any) -> None:
        # Messages of a moment pass before it strikes, so that it hits data as well as heartbeats.
        direction = (machine.name, self.world.other(machine).name)
        faults = self.world.links.faults.setdefault(direction, deque())
        for _ in range(self.scheduler.random.randrange(4)):
            faults.append(lambda segment: segment)
        faults.append(fault)

    def _drop(self, machine: Machine, _number: float) -> None:
        self._segment_fault(machine, drop)

    def _corrupt(self, machine: Machine, _number: float) -> None:
        self._segment_fault(machine, flip_a_bit(self.scheduler))

    def _stray(self, machine: Machine, _number: float) -> None:
        direction = (machine.name, self.world.other(machine).name)
        self._segment_fault(machine, stray(self.world.links, direction))

    def _stall(self, _machine: Machine, number: float) -> None:
        live = self.world.links.live()
        if live:
            self.scheduler.random.choice(live).stalled_until_s = self.scheduler.now_s + number

    def _reset(self, _machine: Machine, _number: float) -> None:
        live = self.world.links.live()
        if live:
            self.scheduler.random.choice(live).reset()

    def _slow_link(self, _machine: Machine, number: float) -> None:
        self.world.links.latency_s = 0.002 + number / 100

    def _flip(self, machine: Machine, _number: float) -> None:
        """A bit of the secondary's data changes, and no checksum of the disk tells."""
        if machine.volume is None or machine.is_primary:
            return
        pages = [page for page, content in machine.data.cached.items() if content and machine.data.stable(page)]
        if pages:
            page = self.scheduler.random.choice(sorted(pages))
            sector = page * SECTORS_PER_PAGE + machine.data.flip_a_bit(page)
            self.truth.flipped.add(page)
            self.truth.spoilt[sector] = self.truth.now()
            self.world.note(machine.name, f"block {page} has a flipped bit")

    def _strike_suspect(self, machine: Machine, number: float) -> None:
        """A bit flips and is looked for; when a client has written the block anew, power fails or the links are cut."""
        self._flip(machine, number)
        self._verify(machine, number)
        draw = self.scheduler.random

        def strike() -> None:
            self.truth.on_suspect_written = lambda: None
            fate, victim = draw.choice((self._power, self._power, self._power_both, self._cut)), draw.choice(NAMES)
            delay_s = draw.choice((0.0, 0.001, 0.01)) * draw.random()
            self.strike(delay_s, fate, self.world.machines[victim], number)

        self.truth.on_suspect_written = strike

    def _verify(self, machine: Machine, _number: float) -> None:
        machine.run("verify", lambda volume: volume._command({"command": "verify", "act": "start"}))

    def _resize(self, machine: Machine, _number: float) -> None:
        volume = machine.volume
        if volume is not None:
            size_bytes = volume._replica.size_bytes + self.scheduler.random.choice(
                (4096, EXTENT_BYTES, 5 * EXTENT_BYTES)
            )
            machine.run(f"resize to {size_bytes}", lambda volume: volume.resize(size_bytes))

    def _log_size(self, machine: Machine, _number: float) -> None:
        extents = self.scheduler.random.choice((3, 4, 6, 12, 16))
        machine.run(f"a log of {extents} extents", lambda volume: volume.set_log_extents(extents))

    def _fail_flush(self, machine: Machine, _number: float) -> None:
        machine.disk.failing["flush"] = 1

    def _fail_write(self, machine: Machine, _number: float) -> None:
        machine.disk.failing["write"] = 1

    def _fail_read(self, machine: Machine, _number: float) -> None:
        machine.disk.failing["read"] = 1

    def _full(self, machine: Machine, number: float) -> None:
        machine.disk.full = True

        def room() -> None:
            machine.disk.full = False

        self.scheduler.at(number, room)

    def _stall_disk(self, machine: Machine, number: float) -> None:
        machine.disk.stalled_until_s = self.scheduler.now_s + number

    def _stick_write(self, machine: Machine, number: float) -> None:
        machine.disk.stick_s = number

    def _slow_disk(self, machine: Machine, number: float) -> None:
        machine.disk.slow = 1 + number * 10

    def _promote(self, machine: Machine, _number: float) -> None:
        held = self.truth.held[machine.name]

        def promote(volume: Any) -> Any:
            known, apart = held.known, not self.truth.connected(held)
            answer = volume.promote(False)
            if apart and known is not None and known.disk is DiskState.OUTDATED and not self.truth.connected(held):
                self.world.violate("no-bad-primary", f"{machine.name} is Outdated, and was promoted without force")
            return answer

        machine.run("promote", promote)

    def _force_promote(self, machine: Machine, _number: float) -> None:
        machine.run("promote --force", lambda volume: volume.promote(True))

    def _demote(self, machine: Machine, _number: float) -> None:
        held = self.truth.held[machine.name]

        def demote(volume: Any) -> Any:
            served = machine.is_primary
            answer = volume.demote(True)
            if served and held.serving is not None:
                self.truth.ended_in_order.add(held.serving.number)
            return answer

        machine.run("demote --force", demote)

    def _switch(self, machine: Machine, _number: float) -> None:
        machine.run("switch", lambda volume: volume.switch())

    def _disconnect(self, machine: Machine, _number: float) -> None:
        machine.run("disconnect", lambda volume: volume.disconnect())

    def _connect(self, machine: Machine, _number: float) -> None:
        machine.run("connect", lambda volume: volume.connect(False))

    def _replace(self, machine: Machine, number: float) -> None:
        """The replica is lost; an empty one joins in its place, if the other one is worth joining."""
        other = self.truth.other(self.truth.held[machine.name])
        known = other.known
        if (
            machine.is_primary
            or known is None
            or known.disk is not DiskState.UP_TO_DATE
            or not other.machine.is_primary
        ):
            return
        machine.kill("destroyed")
        self.killed(machine)
        machine.create(join=True)
        self.truth.replaced(self.truth.held[machine.name])
        self._restart(machine, number)

    # The end

    def _put_right(self) -> None:
        """Nothing is broken any more; the operator brings everything back."""
        world = self.world
        world.note("", "everything heals")
        self._heal()
        world.links.faults.clear()
        world.links.latency_s = 0.0002
        for machine in world.machines.values():
            machine.disk.full = False
            machine.disk.failing.clear()
            machine.disk.slow = 1.0
            machine.disk.stick_s = machine.disk.stick_flush_s = 0.0
            if machine.process is not None and machine.process.stopped:
                self.scheduler.resume(machine.process)
        operator = Process("operator")
        self.scheduler.spawn(operator, "operator", self.runbook.operate)

        def over() -> bool:
            return bool(world.violations or self.finished or self.scheduler.failures)

        if not self.scheduler.run(over, HEAL_S):
            world.violate("no-deadlock", self.runbook.why_stuck())


def _short(values: list[int]) -> str:
    parts: list[str] = []
    for value in values:
        if parts and parts[-1].split("x")[0] == str(value):
            times = int(parts[-1].split("x")[1]) if "x" in parts[-1] else 1
            parts[-1] = f"{value}x{times + 1}"
        else:
            parts.append(str(value))
    return " ".join(parts)
