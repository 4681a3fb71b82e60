"""Machines that run the production volume on the simulated runtime, disks and network."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.sim import stand_ins  # isort: skip  comes before the product

import mirror.core.log_size
import mirror.log_sizer
import mirror.session
import mirror.store.data_file
import nbd_server.volume
from cli.create import Wish, _first_superblock
from mirror.core import layout, recovery
from mirror.core.errors import MirrorError
from mirror.core.layout import Superblock
from mirror.core.policy import Policy
from mirror.core.stages import APPLY
from mirror.core.states import Role
from mirror.store import create_replica_files
from nbd_server.config import Address, Config
from nbd_server.volume import StartOptions, Volume
from tests.sim.disk import Disk, File, OsModule
from tests.sim.network import Links, SelectModule, SocketModule, TimeModule
from tests.sim.plan import NAMES, Plan
from tests.sim.scheduler import Process, Runtime, Scheduler

# Fewer heartbeats make a second of virtual time cheaper, and change nothing that is tested.
HEARTBEATS_PER_TIMEOUT = 4
# A life is short, and the size of a log is to change in it.
LOG_LOOK_INTERVAL_S = 0.5


class World:
    """One life's machines, links and clock; everything in it is drawn from one seed."""

    def __init__(self, plan: Plan, size_bytes: int) -> None:
        self.scheduler = Scheduler(plan.seed, plan.preempt)
        self.links = Links(self.scheduler)
        self.size_bytes = size_bytes
        self.protocol = plan.protocol
        self.timeline: list[str] = []
        self.violations: list[tuple[str, str]] = []
        self.machines = {name: Machine(self, name, plan) for name in NAMES}
        self.os = OsModule(self.scheduler, lambda path: self.machines[path.split("/")[1]].disk)
        self._logs = _Log(self)
        self.links.on_gap = lambda connection: self.violate(
            "one-session", f"a message between {connection.names} was lost, and what followed it was read on"
        )

    def note(self, who: str, text: str) -> None:
        self.timeline.append(f"{self.scheduler.now_s:9.4f}  {who:<4} {text}")

    def violate(self, invariant: str, text: str) -> None:
        """An invariant is broken: the life ends here."""
        self.note("", f"VIOLATED {invariant}: {text}")
        self.violations.append((invariant, text))

    def install(self) -> None:
        """Put the simulated parts where the product looks for the real ones."""
        stand_ins.SOCKET.target = SocketModule(self.links)
        stand_ins.SELECT.target = SelectModule(self.links)
        stand_ins.TIME.target = TimeModule(self.links)
        stand_ins.OS.target = self.os
        # These are variables also where the product is compiled; its functions are called without a look at them.
        mirror.store.data_file._libc_fallocate = self.os.fallocate  # type: ignore[assignment]
        mirror.store.data_file._libc_sync_file_range = self.os.sync_file_range  # type: ignore[assignment]
        mirror.session.HEARTBEATS_PER_TIMEOUT = HEARTBEATS_PER_TIMEOUT
        mirror.log_sizer.LOOK_INTERVAL_S = LOG_LOOK_INTERVAL_S
        mirror.core.log_size.USES_MIN = 5
        mirror.core.log_size._EVERY = ((float("inf"), 1),)
        nbd_server.volume.control = SimpleNamespace(ControlServer=_NoControl, FILE_NAME="")  # type: ignore[assignment]
        nbd_server.volume.load = lambda directory: self.machines[str(directory)[1:]].config
        root = logging.getLogger()
        root.handlers[:] = [self._logs]
        root.setLevel(logging.INFO)

    def end(self) -> None:
        self.scheduler.end()

    def other(self, machine: "Machine") -> "Machine":
        return self.machines[NAMES[1 - NAMES.index(machine.name)]]


class _NoControl:
    """Commands come straight to the volume: its socket is tried on real processes."""

    def __init__(self, *arguments: object) -> None:
        pass

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


class _Log(logging.Handler):
    """The product's log becomes part of the timeline."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        task = self._world.scheduler.current
        self._world.note(task.process.name if task else "", f"log: {record.getMessage()}")


class Machine:
    """A computer with a disk, and the process that serves its replica, if one does."""

    def __init__(self, world: World, name: str, plan: Plan) -> None:
        self.world = world
        self.name = name
        self.directory = Path(f"/{name}")
        self.disk = Disk(world.scheduler, name)
        self.boots = 1
        self.on = True
        self.process: Process | None = None
        self.volume: Volume | None = None
        self.busy = False
        self.cut = False
        # The last run did not end in order, so that only the parent can prove that nothing was forgotten.
        self.unclean = False
        # What its parent knows: how it was told to start, or what it said since that it is; whether it was ready.
        self.as_primary = False
        self.crowd = (1, 2, 9)[plan.seed // 2 % 3]
        self.was_ready = False
        other = NAMES[1 - NAMES.index(name)]
        self.config = Config(
            name="vol",
            protocol=world.protocol,  # type: ignore[arg-type]
            listen=Address(name, 1),
            peer=Address(other, 1),
            peer_timeout_s=1.0,
            wait_for_peer_s=0.5,
            disk_timeout_s=3.0,
            # Not what it measures of itself: that is real time.
            spin=100 if plan.seed % 2 else "off",
            activity_log_extents=plan.log_slots,
            resync_after_crash="1s" if plan.log_by_goal else None,
            split_brain_no_primary=Policy(plan.policies[0]),
            split_brain_one_primary=Policy(plan.policies[1]),
        )

    # Files

    @property
    def data(self) -> File:
        return self.disk.files[f"/{self.name}/data"]

    @property
    def meta(self) -> File:
        return self.disk.files[f"/{self.name}/meta"]

    def create(self, join: bool) -> None:
        """A replica of its own, on an empty disk."""
        runtime = self._runtime(Process(self.name))
        other = self.world.other(self).superblock() if join and self.world.other(self).disk.files else None
        size_bytes = other.size_bytes if other is not None else self.world.size_bytes
        self.unclean = False
        self.disk.files.clear()
        self.disk.failing.clear()
        self.disk.full = False
        superblock = _first_superblock(self.config, size_bytes, Wish(None, join=join), runtime)  # type: ignore[arg-type]
        create_replica_files(self.directory, size_bytes, None, layout.encode_superblock(superblock))
        for file in self.disk.files.values():
            file.make_durable(file.snapshot())

    def superblock(self) -> Superblock | None:
        """What is durable of it."""
        copies = [self.meta.durable_page(offset // 4096) for offset in layout.Geometry.superblock_offsets]
        return recovery.choose_superblock(copies[0], copies[1]).superblock

    # Life

    def _runtime(self, process: Process) -> Runtime:
        boot_id = f"{self.name} boot {self.boots}".encode().ljust(16, b"-")
        return Runtime(self.world.scheduler, process, boot_id)

    def start(self, primary: bool = False, resume: bool = False, memory_kept: bool = False) -> None:
        """Serve the replica, as `nbdmirror serve` would."""
        if not self.on or self.process is not None:
            return
        if self.unclean and not memory_kept:
            self.on_forgotten()
        self.unclean = True
        self.as_primary = primary
        self.was_ready = self.was_ready and resume
        options = StartOptions(primary=primary, resume=resume, memory_kept=memory_kept)
        process = self.process = Process(self.name)
        self.world.note(self.name, f"starts{' as primary' if primary else ''}{' again (resume)' if resume else ''}")
        runtime = self._runtime(process)

        def tell_role(role: Role) -> None:
            self.as_primary = role is Role.PRIMARY

        def body() -> None:
            try:
                volume = Volume.open(
                    self.directory,
                    options,
                    runtime,  # type: ignore[arg-type]
                    self._cut_connections,
                    tell_role,
                )
                if process.dead:
                    return
                # Also few clients share messages.
                volume._primary.crowd = self.crowd
                self.volume = volume
                volume.start()
                self.was_ready = True
            except MirrorError as error:
                self.world.note(self.name, f"does not start: {error}")
                self.kill("gave up")

        self.world.scheduler.spawn(process, "start", body)

    def _cut_connections(self) -> None:
        self.cut = True

    def start_again(self) -> None:
        """nbdkit is gone and its parent starts it anew, as nbd_server.serve does."""
        ready = self.was_ready
        self.start(primary=self.as_primary, resume=ready, memory_kept=ready)

    def kill(self, why: str = "killed") -> None:
        """The process is gone; the machine and its page cache stay."""
        process = self.process
        if process is None:
            return
        self.world.note(self.name, why)
        if self.volume is not None and any(one.kind == APPLY for one in self.volume._replica.under_way):
            self.on_killed_at_work()
        process.dead = True
        self.process = None
        self.volume = None
        self.world.links.process_died(process)
        self.world.os.process_died(process)

    def power_cut(self) -> None:
        """Process and page cache are gone, and nobody is told."""
        if not self.on:
            return
        self.world.links.drop_machine(self.name)
        self.world.links.off.add(self.name)
        self.kill("loses power")
        self.on = False
        self.disk.power_cut()
        self.boots += 1

    def boot(self) -> None:
        if not self.on:
            self.on = True
            self.world.links.off.discard(self.name)
            self.world.note(self.name, "has power again")

    def run(self, name: str, function: Callable[[Volume], Any], done: Callable[[], None] = lambda: None) -> None:
        """Run a command in the server's process; its refusal is noted."""
        volume, process = self.volume, self.process
        if volume is None or process is None or process.dead:
            self.world.note(self.name, f"{name}: nothing is served")
            done()
            return

        def body() -> None:
            try:
                self.world.note(self.name, f"operator: {name}")
                answer = function(volume)
                words = answer.get("message") if isinstance(answer, dict) else answer
                self.world.note(self.name, f"{name}: {words}")
            except MirrorError as error:
                self.world.note(self.name, f"{name} refused: {error}")
            finally:
                done()

        self.world.scheduler.spawn(process, name, body)

    def stop(self) -> None:
        """`nbdmirror serve` is told to end."""

        def body(volume: Volume) -> str:
            clean = volume.stop(3.0)
            process = self.process
            self.world.note(self.name, "stopped, clean" if clean else "stopped, not clean")
            self.unclean = not clean
            self.on_stopped(clean)
            if process is not None:
                self.kill("ended")
            return ""

        self.run("stop", body)

    def on_stopped(self, clean: bool) -> None:
        pass

    def on_killed_at_work(self) -> None:
        """It was carrying out what the peer had asked."""

    def on_forgotten(self) -> None:
        pass

    @property
    def is_primary(self) -> bool:
        return self.volume is not None and self.volume._replica.role is Role.PRIMARY
