"""`python -m bench`: everybody's writes side by side, in one run.

For each kind of work, rounds are interleaved over all targets and medians taken: what disturbs the machine disturbs
all. Before each measurement everything dirty is written to the disk, or one target would pay for another's writes.
The first target, nbdkit's own file plugin, is the measure; ratios are to it. Results go to bench/results/ as JSON.
"""

import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import fio, machine, resync
from bench.servers import BenchError, NbdkitFile, NbdMirror, QemuQuorum, Target

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
MEASURE = "nbdkit file"
GOAL_P50_RATIO = 3.5
GOAL_RESYNC_MEGABYTES_PER_S = 300
GOAL_MEMORY_BYTES = 80 * MIB
GOAL_RESYNC_P99_RATIO = 2.0
GOAL_RESYNC_PART = 0.3

console = Console()
Results = dict[str, dict[str, fio.Figures]]


def make_targets(directory: Path, size_bytes: int, only: str) -> list[Target]:
    wanted: list[tuple[str, Any]] = [
        (MEASURE, NbdkitFile),
        ("nbdmirror alone", NbdMirror),
        ("mirrored, A", functools.partial(NbdMirror, protocol="A")),
        ("mirrored, B", functools.partial(NbdMirror, protocol="B")),
        ("mirrored, C", functools.partial(NbdMirror, protocol="C")),
        ("qemu quorum", QemuQuorum),
    ]
    targets = []
    for number, (name, make) in enumerate(wanted):
        if name == MEASURE or only in name:
            where = directory / str(number)
            where.mkdir()
            targets.append(make(name, where, size_bytes))
    return targets


def median(rounds: list[fio.Figures]) -> fio.Figures:
    columns = [asdict(one) for one in rounds]
    return fio.Figures(**{key: statistics.median(column[key] for column in columns) for key in columns[0]})


def measure(targets: list[Target], rounds: int, seconds: float, size_bytes: int, progress: Progress) -> Results:
    """Median figures by job and target. Each round begins with another target."""
    task = progress.add_task("measuring", total=len(fio.JOBS) * rounds * len(targets))
    results: Results = {}
    for job in fio.JOBS:
        found: dict[str, list[fio.Figures]] = {target.name: [] for target in targets}
        for number in range(rounds):
            first = number % len(targets)
            for target in targets[first:] + targets[:first]:
                progress.update(task, description=f"{job.name}: {target.name}")
                os.sync()
                found[target.name].append(fio.measure(target.uri, job, size_bytes, seconds))
                target.alive()
                progress.advance(task)
        results[job.name] = {name: median(figures) for name, figures in found.items()}
    progress.update(task, description="measured")
    return results


def print_table(results: Results) -> None:
    table = Table(caption="medians of interleaved rounds; × is to nbdkit file; with fsync: write and fsync added up")
    table.add_column("", no_wrap=True)
    for heading in ("p50 µs", "×", "p99 µs", "×", "IOPS", "×", "MB/s"):
        table.add_column(heading, justify="right")
    for job in fio.JOBS:
        base = results[job.name][MEASURE]
        table.add_section()
        table.add_row(f"[bold]{job.name}")
        for name, one in results[job.name].items():
            table.add_row(
                f"  {name}",
                *(f"{one.p50_us:.0f}", f"{one.p50_us / base.p50_us:.2f}"),
                *(f"{one.p99_us:.0f}", f"{one.p99_us / base.p99_us:.2f}"),
                *(f"{one.operations_per_s:.0f}", f"{one.operations_per_s / base.operations_per_s:.2f}"),
                f"{one.bytes_per_s / 1e6:.0f}",
            )
    console.print(table)


def print_goals(results: Results, resynced: dict[str, Any] | None, memory: dict[str, dict[str, int]]) -> None:
    """What the figures were to reach."""
    depth_1 = results[fio.JOBS[0].name]
    if "mirrored, C" in depth_1:
        ratio = depth_1["mirrored, C"].p50_us / depth_1[MEASURE].p50_us
        print_goal(
            ratio <= GOAL_P50_RATIO, f"mirrored C, depth 1: {ratio:.2f} × p50 of nbdkit file", f"≤ {GOAL_P50_RATIO}"
        )
    if resynced:
        speed = resynced["megabytes_per_s"]
        what = f"resync of {resynced['dirty_bytes'] / MIB:.0f} MiB: {speed:.0f} MB/s"
        print_goal(speed >= GOAL_RESYNC_MEGABYTES_PER_S, what, f"≥ {GOAL_RESYNC_MEGABYTES_PER_S}")
        beside = resynced["beside_writes"]
        what = f"writes beside it: p99 {beside['p99_us_beside']:.0f} µs, {beside['p99_ratio']:.2f} × that without"
        print_goal(beside["p99_ratio"] <= GOAL_RESYNC_P99_RATIO, what, f"≤ {GOAL_RESYNC_P99_RATIO}")
        part = beside["part_of_idle_speed"]
        what = f"the resync beside them: {beside['megabytes_per_s']:.0f} MB/s, {100 * part:.0f} % of its idle speed"
        print_goal(part >= GOAL_RESYNC_PART, what, f"≥ {100 * GOAL_RESYNC_PART:.0f} %")
    worst = max(
        ((size, f"{name}: {process}") for name, sizes in memory.items() for process, size in sizes.items()),
        default=None,
    )
    if worst:
        what = f"most memory of a process: {worst[0] / MIB:.0f} MiB ({worst[1]})"
        print_goal(worst[0] <= GOAL_MEMORY_BYTES, what, f"≤ {GOAL_MEMORY_BYTES // MIB} MiB")


def print_goal(reached: bool, what: str, goal: str) -> None:
    console.print(f"{'[green]reached[/]' if reached else '[red]missed [/]'}  {what} (goal {goal})", highlight=False)


def save(record: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("%Y%m%d-%H%M%S.json")
    path.write_text(json.dumps(record, indent=1) + "\n")
    shutil.copy(path, RESULTS / "latest.json")
    return path


def run_all(
    directory: Path, rounds: int, seconds: float, size_bytes: int, dirty_bytes: int, only: str
) -> dict[str, Any]:
    facts = machine.facts(directory)
    targets = make_targets(directory, size_bytes, only)
    columns = (TextColumn("{task.description:60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting and filling the volumes", total=len(targets))
            for target in targets:
                target.start()
                fio.fill(target.uri, size_bytes)
                progress.advance(task)
            results = measure(targets, rounds, seconds, size_bytes, progress)
            memory = {target.name: target.memory_bytes() for target in targets if isinstance(target, NbdMirror)}
    finally:
        for target in targets:
            target.stop()
    resynced = None
    if dirty_bytes:
        with console.status("resync"):
            resynced = resync.measure(directory / "resync", dirty_bytes, seconds)
        memory["after the resync"] = resynced["memory_bytes"]
    print_table(results)
    print_goals(results, resynced, memory)
    return {
        "machine": facts,
        "settings": {"rounds": rounds, "seconds": seconds, "size_bytes": size_bytes},
        "results": {job: {name: asdict(one) for name, one in row.items()} for job, row in results.items()},
        "resync": resynced,
        "memory_bytes": memory,
    }


@click.command()
@click.option("--quick", is_flag=True, help="One round of a second each, a small resync; not written to latest.json.")
@click.option("--rounds", default=5, show_default=True, help="Rounds to take the median of.")
@click.option("--seconds", default=3.0, show_default=True, help="Length of one measurement.")
@click.option("--size-mib", default=256, show_default=True, help="Size of each volume.")
@click.option("--resync-mib", default=1024, show_default=True, help="Dirty data to be synced; 0: leave it out.")
@click.option("--only", default="", help="Only targets whose name holds this (and nbdkit file).")
@click.option("--directory", type=click.Path(path_type=Path, exists=True), help="Where the copies are put.")
def main(
    quick: bool, rounds: int, seconds: float, size_mib: int, resync_mib: int, only: str, directory: Path | None
) -> None:
    """Measure nbdmirror beside nbdkit's file plugin and qemu's quorum."""
    if quick:
        rounds, seconds, size_mib, resync_mib = 1, 1.0, 64, min(resync_mib, 256)
    where = Path(tempfile.mkdtemp(prefix="nbdmirror-bench-", dir=directory or "/var/tmp"))
    try:
        record = run_all(where, rounds, seconds, size_mib * MIB, resync_mib * MIB, only)
    except BenchError as error:
        console.print(f"[red]{error}", highlight=False)
        sys.exit(1)
    finally:
        shutil.rmtree(where, ignore_errors=True)
    if not quick and not only:
        console.print(f"written to {save(record)}")


if __name__ == "__main__":
    main()
