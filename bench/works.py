"""What is measured, by name: targets, works that targets do in turn, and experiments that make targets of their own."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import budget, cycles, drbd, experiments, fio
from bench.experiments import Experiment
from bench.figures import Round
from bench.processes import busy_loops
from bench.scale import Scale
from bench.servers import BarePlugin, NbdkitFile, NbdMirror, QemuQuorum, Target, TwoFiles

MIB = 1 << 20
SMALL_LOG_EXTENTS = 64  # the smallest there is
SMALL_LOG_BYTES = SMALL_LOG_EXTENTS * 4 * MIB

FILE = "nbdkit file"
BARE = "bare Python plugin"
TWO_FILES = "nbdkit file, two at a time"
ALONE = "nbdmirror alone"
MIRRORED_A = "mirrored, A"
MIRRORED_B = "mirrored, B"
MIRRORED_C = "mirrored, C"
NO_SPIN = "mirrored, C, no spinning"
APART = "mirrored, C, over veth"
QUORUM = "qemu quorum"
SMALL_LOG = "mirrored, C, small log"
LARGE_FILE = "nbdkit file, as large"
UNTOUCHED = "mirrored, C, never written"
UNTOUCHED_FILE = "nbdkit file, never written"

MakeTarget = Callable[[str, Path, Scale], Target]


def _target(make: Callable[..., Target], name: str, directory: Path, scale: Scale) -> Target:
    """A volume that is written whole before anything is measured."""
    return make(name, directory, scale.volume_bytes, scale.volume_bytes)


def _twenty_logs(make: Callable[..., Target], name: str, directory: Path, scale: Scale) -> Target:
    """20 times the smallest log. In full it is written before: finding room for blocks is the filesystem's work."""
    size_bytes = 20 * SMALL_LOG_BYTES
    return make(name, directory, size_bytes, min(size_bytes, scale.cold_bytes))


def _untouched(make: Callable[..., Target], name: str, directory: Path, scale: Scale) -> Target:
    return make(name, directory, scale.rounds * scale.touched_bytes, 0)


# The order is that of the rounds; whoever is first in one is last in the next.
TARGETS: dict[str, MakeTarget] = {
    FILE: functools.partial(_target, NbdkitFile),
    BARE: functools.partial(_target, BarePlugin),
    TWO_FILES: functools.partial(_target, TwoFiles),
    ALONE: functools.partial(_target, NbdMirror),
    MIRRORED_A: functools.partial(_target, functools.partial(NbdMirror, protocol="A")),
    MIRRORED_B: functools.partial(_target, functools.partial(NbdMirror, protocol="B")),
    MIRRORED_C: functools.partial(_target, functools.partial(NbdMirror, protocol="C")),
    NO_SPIN: functools.partial(_target, functools.partial(NbdMirror, protocol="C", settings='spin = "off"')),
    APART: functools.partial(_target, functools.partial(NbdMirror, protocol="C", apart=True)),
    QUORUM: functools.partial(_target, QemuQuorum),
    SMALL_LOG: functools.partial(
        _twenty_logs,
        functools.partial(NbdMirror, protocol="C", settings=f"activity_log_extents = {SMALL_LOG_EXTENTS}"),
    ),
    LARGE_FILE: functools.partial(_twenty_logs, NbdkitFile),
    UNTOUCHED: functools.partial(_untouched, functools.partial(NbdMirror, protocol="C")),
    UNTOUCHED_FILE: functools.partial(_untouched, NbdkitFile),
}


@dataclass(frozen=True)
class Work:
    """What a client does with any target: fio's words, or a kind of cycle of bench/cycles.py."""

    fio: tuple[str, ...] = ()
    cycle: str = ""
    # Beside so many processes that take all the processor they can get.
    busy_loops: int = 0
    # Only so much of the volume's beginning, instead of what was filled.
    part: Callable[[Target, Scale], int] = lambda target, _: target.filled_bytes
    # Each round goes on where the last one ended, and writes each byte once, however long it takes.
    goes_on: bool = False
    # The same client does this for as long just before, so that nothing of it is flushed yet.
    after: "Work | None" = None

    def measure(self, target: Target, scale: Scale, round_number: int) -> Round:
        if self.after is not None:
            self.after.measure(target, scale, round_number)
        size_bytes = self.part(target, scale)
        with contextlib.ExitStack() as cleanup:
            if self.busy_loops:
                cleanup.enter_context(busy_loops(self.busy_loops))
            if self.cycle:
                return cycles.measure(target, self.cycle, size_bytes, scale.seconds)
            if self.goes_on:
                extent = f"--offset={round_number * size_bytes}"
                return fio.measure(target.uri, (*self.fio, extent, f"--size={size_bytes}"), 60)
            return fio.measure(target.uri, (*self.fio, *fio.timed(size_bytes, scale.seconds)), scale.seconds)


def _small(kind: str, depth: int) -> tuple[str, ...]:
    return (f"--rw={kind}", "--bs=4k", f"--iodepth={depth}")


def _hot(_: Target, scale: Scale) -> int:
    return scale.hot_bytes


def _all(target: Target, _: Scale) -> int:
    return target.size_bytes


WRITE = "4 KiB random writes, depth 1"
WRITE_BUSY = "4 KiB random writes, depth 1, beside two busy loops"
WRITE_DEEP = "4 KiB random writes, depth 16"
FLUSH = "4 KiB random write and fsync, cycles"
FUA = "4 KiB random FUA writes"
LARGE = "1 MiB sequential writes, depth 4"
HOT = "4 KiB random writes, depth 1, hot extents"
COLD = "4 KiB random writes, depth 1, cold extents"
HOT_DEEP = "4 KiB random writes, depth 16, hot extents"
COLD_DEEP = "4 KiB random writes, depth 16, cold extents"
COLD_AFTER_HOT = "4 KiB random writes, depth 16, cold extents right after hot ones"
TOUCH = "16 KiB sequential writes, depth 1, extents never written"
READ = "4 KiB random reads, depth 1"
READ_DEEP = "4 KiB random reads, depth 16"

_HOT_DEEP = Work(_small("randwrite", 16), part=_hot)

WORKS: dict[str, Work] = {
    WRITE: Work(_small("randwrite", 1)),
    WRITE_BUSY: Work(_small("randwrite", 1), busy_loops=2),
    WRITE_DEEP: Work(_small("randwrite", 16)),
    FLUSH: Work(cycle="flush"),
    FUA: Work(cycle="fua"),
    LARGE: Work(("--rw=write", "--bs=1m", "--iodepth=4")),
    HOT: Work(_small("randwrite", 1), part=_hot),
    COLD: Work(_small("randwrite", 1), part=_all),
    HOT_DEEP: _HOT_DEEP,
    COLD_DEEP: Work(_small("randwrite", 16), part=_all),
    COLD_AFTER_HOT: Work(_small("randwrite", 16), part=_all, after=_HOT_DEEP),
    # 256 writes an extent, so that one in 256 is a first touch: p99 has none of them, and p99.9 is one. With 4 KiB they
    # would be one in 1024, and chance would decide whether p99.9 is one.
    TOUCH: Work(("--rw=write", "--bs=16k", "--iodepth=1"), part=lambda _, scale: scale.touched_bytes, goes_on=True),
    READ: Work(_small("randread", 1)),
    READ_DEEP: Work(_small("randread", 16)),
}

# Under these names they put down what they found.
RESYNC = "resync"
SCATTERED = "resync of 1 % at random"
MEMORY = "memory"
BUDGET = "where the time of one request goes"
GUESTS = "4 KiB random writes in a guest"
NBDCOPY = "nbdcopy"

EXPERIMENTS: dict[str, Experiment] = {
    RESYNC: Experiment(experiments.resync, steps=lambda _: 7),
    SCATTERED: Experiment(experiments.scattered, steps=lambda _: 2),
    MEMORY: Experiment(experiments.memory, steps=lambda _: 2),
    BUDGET: Experiment(budget.measure, steps=budget.steps),
    GUESTS: Experiment(drbd.measure, steps=drbd.steps),
}
