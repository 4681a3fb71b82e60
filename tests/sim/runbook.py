"""The operator: what the runbook says until both replicas are in step again, and the last reading of everything."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.sim.cluster import Machine  # isort: skip  the limits come before the product

from mirror.core.generation import Action
from mirror.core.states import ConnectionState, DiskState
from tests.sim.plan import ClientOperation

if TYPE_CHECKING:
    from tests.sim.life import Life

# Within this time all of a volume that small is compared.
PROOF_S = 30.0
# A copy that a replacement may join.
SOUND = (DiskState.UP_TO_DATE, DiskState.OUTDATED)
# The better its own copy, the sooner a replica is promoted.
RANKS = (
    DiskState.UP_TO_DATE,
    DiskState.CONSISTENT,
    DiskState.OUTDATED,
    DiskState.INCONSISTENT,
    DiskState.FAILED,
)


class Runbook:
    """Brings a life's machines back."""

    def __init__(self, life: "Life") -> None:
        self.life = life
        self.world = life.world
        self.scheduler = life.scheduler
        self.truth = life.truth

    def operate(self) -> None:
        """The operator's runbook, until both replicas are in step, every request is answered, and all has been read."""
        scheduler, world = self.scheduler, self.world
        one, two = world.machines.values()
        rounds = 0
        while True:
            scheduler.elapse(0.25)
            rounds += 1
            if world.violations:
                return
            self._start_all()
            if one.volume is None or two.volume is None or one.busy or two.busy or rounds % 4:
                continue
            if not self._decide(one, two):
                if self.life.finished:
                    return
                continue
            if self.life.queue or self.life.idle() is False:
                continue
            if not self._settled():
                continue
            self._read_everything()
            if not world.violations and self._settled():
                self._compare_everything()
                self.truth.check_equal()
                self.truth.check_suspects()
                self.truth.check_flipped(next(held for held in self.truth.held.values() if held.machine.is_primary))
            self.life.finished = True
            return

    def _start_all(self) -> None:
        for machine in self.world.machines.values():
            if machine.process is None and not machine.busy:
                machine.boot()
                self._mend_disk(machine)
                machine.start()

    def _settled(self) -> bool:
        volumes = [machine.volume for machine in self.world.machines.values()]
        peers = [volume._peer for volume in volumes if volume is not None]
        return (
            len(peers) == 2
            and all(peer is not None and peer.state is ConnectionState.CONNECTED for peer in peers)
            and all(
                volume is not None and volume._replica.superblock.disk is DiskState.UP_TO_DATE for volume in volumes
            )
            and any(machine.is_primary for machine in self.world.machines.values())
        )

    def _mend_disk(self, machine: Machine) -> None:
        """A Failed disk is replaced by an empty one that joins, as long as the other copy is sound."""
        known = machine.superblock()
        if known is not None and known.disk is DiskState.FAILED and self._is_sound(self.world.other(machine)):
            machine.create(join=True)
            self.truth.replaced(self.truth.held[machine.name])

    def _is_sound(self, machine: Machine) -> bool:
        if machine.volume is not None and machine.volume._replica.failed:
            # A disk that failed twice may not have taken the record of it: status tells.
            return False
        known = machine.superblock()
        return known is not None and known.disk in SOUND

    def _decide(self, one: Machine, two: Machine) -> bool:
        """One round of the runbook; True when nothing is left to be done."""
        if one.volume is None or two.volume is None:
            return False
        if self._settled():
            return True
        if not any(self._is_sound(machine) for machine in (one, two)):
            return self._give_up()
        for machine in (one, two):
            volume = machine.volume
            if volume is not None and volume._replica.disk_state(connected=False) is DiskState.FAILED:
                if not self._is_sound(self.world.other(machine)):
                    return self._give_up()
                self._act(machine, "stop for a new disk", lambda volume: volume.stop(3.0))
                machine.kill("taken down for a new disk")
                self.life.killed(machine)
                return False
        self._reconnect(one, two)
        return False

    def _give_up(self) -> bool:
        """A broken disk and a copy that is not whole: two failures at once, only a backup helps."""
        self.world.note("", "the volume is lost to two failures")
        self.life.finished = True
        return False

    def _reconnect(self, one: Machine, two: Machine) -> None:
        """Both copies are sound, or one is and the other waits for it: what keeps them apart?"""
        assert one.volume is not None
        assert two.volume is not None
        peers = [one.volume._peer, two.volume._peer]
        linked = any(peer is not None and peer.session is not None for peer in peers)
        if linked:
            if not one.is_primary and not two.is_primary:
                self._act(self._sound(one, two), "promote", lambda volume: volume.promote(False))
            return
        if one.is_primary and two.is_primary:
            # The runbook: look which one is to stay, demote the other one.
            self._act(two, "demote", lambda volume: volume.demote(True))
            return
        actions = [peer.outcome.action for peer in peers if peer is not None and peer.outcome is not None]
        loser = one if two.is_primary else two
        if Action.SPLIT_BRAIN in actions:
            self.truth.held[loser.name].discard_allowed = True
            if loser.is_primary:
                self._act(loser, "demote", lambda volume: volume.demote(True))
            self._act(loser, "connect --discard-my-data", lambda volume: volume.connect(True))
            self._act(self.world.other(loser), "connect", lambda volume: volume.connect(False))
            return
        if any(action in (Action.WAIT, Action.REFUSE) for action in actions) and not (one.is_primary or two.is_primary):
            self._act(self._sound(one, two), "promote --force", lambda volume: volume.promote(True))
        self._rejoin(one, two)
        for machine in (one, two):
            self._act(machine, "connect", lambda volume: volume.connect(False))

    def _rejoin(self, one: Machine, two: Machine) -> None:
        """What can't be connected any other way is made anew, by the runbook."""
        for machine in (one, two):
            other = self.world.other(machine)
            peer = machine.volume._peer if machine.volume is not None else None
            if peer is None or peer.outcome is None or peer.outcome.action is not Action.REFUSE:
                continue
            if not machine.is_primary and other.is_primary and self._is_sound(other):
                machine.kill("destroyed to join anew")
                self.life.killed(machine)
                machine.create(join=True)
                self.truth.replaced(self.truth.held[machine.name])
                machine.start()
                return

    def _sound(self, one: Machine, two: Machine) -> Machine:
        """Which of two secondaries the operator promotes: the one whose disk state is better."""

        def rank(machine: Machine) -> int:
            assert machine.volume is not None
            return RANKS.index(machine.volume._replica.disk_state(False))

        return min((one, two), key=rank)

    def _act(self, machine: Machine, name: str, function: Any) -> None:
        """Run a command and wait for it."""
        done: list[bool] = []
        machine.busy = True

        def end() -> None:
            machine.busy = False
            done.append(True)

        process = machine.process
        machine.run(name, function, end)
        waited_s = 0.0
        while not done and machine.process is process and waited_s < 40.0:
            self.scheduler.elapse(0.1)
            waited_s += 0.1
        machine.busy = False

    def _read_everything(self) -> None:
        """The client reads what it ever wrote, from the primary."""
        primary = next(machine for machine in self.world.machines.values() if machine.is_primary)
        sectors = sorted(self.life.touched)
        runs: list[list[int]] = []
        for sector in sectors:
            if runs and sector == runs[-1][0] + runs[-1][1] and runs[-1][1] < 64:
                runs[-1][1] += 1
            else:
                runs.append([sector, 1])
        self.life.queue.extend(ClientOperation("read", first, count) for first, count in runs)
        self.life.queue.append(ClientOperation("flush"))
        waited_s = 0.0
        while (self.life.queue or not self.life.idle()) and not self.world.violations and waited_s < 30.0:
            self.scheduler.elapse(0.05)
            waited_s += 0.05
            if not any(machine.is_primary for machine in self.world.machines.values()):
                # A command of before, a switch or a stop say, took its time.
                self._start_all()
                self._decide(*self.world.machines.values())
        if waited_s >= 30.0:
            self.world.violate("no-deadlock", f"the last reads from {primary.name} do not end. " + self.why_stuck())

    def _compare_everything(self) -> None:
        """Wait for the proof, and for a verify of everything where a bit was flipped behind it."""
        failed: list[bool] = []

        def proven(status: Any) -> bool:
            if status is None:
                return False  # not connected at the moment
            if status["state"] == "failed":
                # A read error of before: the operator has everything compared.
                failed.append(True)
            return bool(failed) or (status["state"] == "proven" and not status["rest_left_bytes"])

        self._await("proof", proven)
        if (self.truth.flipped or failed) and not self.world.violations:
            self._verify_everything()

    def _verify_everything(self) -> None:
        """One that begins now and comes to its end: neither one of before nor one that a lost link stops."""
        waited_s = 0.0
        accepted: list[None] = []
        request = {"command": "verify", "act": "start", "restart": True}
        while waited_s < PROOF_S and not self.world.violations:
            primary = next((machine for machine in self.world.machines.values() if machine.is_primary), None)
            accepted.clear()
            if primary is not None:
                self._act(primary, "verify", lambda volume: accepted.append(volume._command(request)))
                if not accepted:
                    # What a refusal advises: a new session, in case a disk of before broke what this one compares.
                    self._act(primary, "disconnect", lambda volume: volume.disconnect())
                    self._act(primary, "connect", lambda volume: volume.connect(False))
            self._await("verify", lambda status: status is None)
            if accepted and primary is not None and primary.volume is not None:
                last = primary.volume._replica.superblock.last_verify
                if last is not None and last["result"] in ("equal", "differs"):
                    return
            self.scheduler.elapse(0.5)
            waited_s += 0.5
        self.world.violate("proof", f"no verify came to its end in {PROOF_S:g} virtual seconds")

    def _await(self, key: str, done: Callable[[Any], bool]) -> None:
        waited_s = 0.0
        status: Any = None
        while waited_s < PROOF_S and not self.world.violations:
            primary = next((machine for machine in self.world.machines.values() if machine.is_primary), None)
            if primary is not None and primary.volume is not None:
                status = primary.volume.status()[key]
                if done(status):
                    return
            self.scheduler.elapse(0.1)
            waited_s += 0.1
        self.world.violate("proof", f"no end of {key} after {PROOF_S:g} virtual seconds: {status}")

    def why_stuck(self) -> str:
        lines = ["not in step again, though nothing is broken"]
        for machine in self.world.machines.values():
            volume = machine.volume
            if volume is None or volume._peer is None:
                lines.append(f"{machine.name}: nothing is served")
                continue
            peer = volume._peer
            lines.append(
                f"{machine.name}: {volume._replica.role.value}, {volume._replica.superblock.disk.value},"
                f" {peer.state.value}: {peer.reason}"
            )
        lines += [f"{task}: {what}" for task, what in self.life.in_operation.items()]
        lines += [
            f"{task} waits for {task.waits_for}"
            for task in self.scheduler.tasks
            if not task.done and not task.process.dead
        ]
        return "\n    ".join(lines)
