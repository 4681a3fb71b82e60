"""`python -m bench`: everybody's requests side by side, in one run.

For each kind of work, rounds are interleaved over all targets and medians taken: what disturbs the machine disturbs
all. Before each measurement everything dirty is written to the disk, or one target would pay for another's writes.
The measure of most is nbdkit's own file plugin. Results go to bench/results/ as JSON and pictures.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from bench import budget, fio, machine, pictures, processor, report
from bench.figures import Record, Round
from bench.processes import BenchError, Unavailable
from bench.rows import DRBD_ROWS, ROWS, Row, matching, needed
from bench.scale import FULL, QUICK, Scale
from bench.servers import Target
from bench.works import BUDGET, EXPERIMENTS, TARGETS, WORKS

# Below it somebody else is at work, and even ratios move (docs/performance.md says how).
IDLE_PERCENT_LEAST = 90
# A virtual machine whose host takes more of its processors measures its neighbours.
STOLEN_PERCENT_MOST = 2

console = Console(width=None if sys.stdout.isatty() else 140)


class Run:
    """One run of the rows that are wanted, in a directory of its own that goes away with it."""

    def __init__(self, directory: Path, scale: Scale, rows: list[Row], record: Record, progress: Progress) -> None:
        self.directory, self.scale, self.record = directory, scale, record
        wanted = needed(rows)
        self.works = {name: targets for name, targets in wanted.items() if name in WORKS}
        self.experiments = [name for name in EXPERIMENTS if name in wanted]
        self.targets = [name for name in TARGETS if any(name in targets for targets in self.works.values())]
        steps = len(self.targets) + sum(EXPERIMENTS[name].steps(scale) for name in self.experiments)
        steps += scale.rounds * sum(len(targets) for targets in self.works.values())
        self.progress, self.task = progress, progress.add_task("", total=steps)
        self.steps_begun = 0

    def say(self, what: str) -> None:
        """The next step begins, so all before it are done."""
        self.progress.update(self.task, description=what, completed=self.steps_begun)
        self.steps_begun += 1

    def all(self) -> None:
        with self.standing() as targets:
            for name, doers in self.works.items():
                self.measure(name, [targets[doer] for doer in TARGETS if doer in doers and doer in targets])
        for number, name in enumerate(self.experiments):
            directory = self.directory / f"experiment{number}"
            try:
                EXPERIMENTS[name].run(name, directory, self.scale, self.record, self.say)
            except Unavailable as reason:
                self.record.absent[name] = str(reason)
            shutil.rmtree(directory, ignore_errors=True)

    @contextlib.contextmanager
    def standing(self) -> Iterator[dict[str, Target]]:
        """All targets, serving and filled; what can't be had is noted and left out."""
        targets: dict[str, Target] = {}
        with contextlib.ExitStack() as cleanup:
            for number, name in enumerate(self.targets):
                self.say(f"starting {name}")
                directory = self.directory / str(number)
                directory.mkdir()
                target = TARGETS[name](name, directory, self.scale)
                cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
                cleanup.callback(target.stop)
                try:
                    target.start()
                except Unavailable as reason:
                    self.record.absent[name] = str(reason)
                    target.stop()
                    continue
                if target.filled_bytes:
                    fio.fill(target.uri, target.filled_bytes)
                targets[name] = target
            yield targets

    def measure(self, name: str, targets: list[Target]) -> None:
        """Each round begins with another target."""
        found: dict[str, list[Round]] = {target.name: [] for target in targets}
        for number in range(self.scale.rounds if targets else 0):
            first = number % len(targets)
            for target in targets[first:] + targets[:first]:
                self.say(f"{name}: {target.name}")
                os.sync()
                found[target.name].append(WORKS[name].measure(target, self.scale, number))
                target.alive()
        for target_name, rounds in found.items():
            self.record.add(name, target_name, rounds)


def save_json(record: Record, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record.as_json(), ensure_ascii=False, indent=1) + "\n")


def save(record: Record, path: Path) -> None:
    save_json(record, path)
    draw(record, path)
    console.print(f"written to {path} and beside it", highlight=False)


def draw(record: Record, path: Path) -> None:
    for name, picture in pictures.all_of(record).items():
        report.picture_path(name, path).write_text(picture)


def write_report() -> None:
    """docs/performance.md and the pictures, from what the last full run wrote."""
    record = report.load()
    profiled = report.load(report.PROFILE)
    others = report.load(report.BESIDE_DRBD), report.load(report.TRIED), profiled, report.elsewhere()
    report.PAGE.write_text(report.page(report.PAGE.read_text(), record, *others))
    draw(record, report.LATEST)
    picture = processor.picture(profiled)
    if picture is not None:
        report.PROFILE.with_suffix(".svg").write_text(picture)


def run(directory: Path, scale: Scale, rows: list[Row], record: Record) -> None:
    """What was measured is in the record, also when this is stopped or something breaks."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < scale.free_bytes:
        short = f"{free_bytes >> 30} GiB free, {scale.free_bytes >> 30} needed: give another --directory"
        raise BenchError(f"{directory}: {short}")
    columns = (TextColumn("{task.description:62}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    where = Path(tempfile.mkdtemp(prefix="nbdmirror-bench-", dir=directory))
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            Run(where, scale, rows, record, progress).all()
    finally:
        shutil.rmtree(where, ignore_errors=True)


def tell(record: Record, rows: list[Row]) -> None:
    console.print(report.terminal_table(record, rows))
    console.print(report.summary(record, rows), highlight=False)
    for table in budget.tables(record, BUDGET):
        console.print(Markdown(table))
    idle_percent = record.machine["idle_before_percent"]
    if idle_percent < IDLE_PERCENT_LEAST:
        console.print(
            f"[yellow]This machine was {idle_percent} % idle before: its figures say little.", highlight=False
        )
    stolen_percent = record.settings["stolen_percent"]
    if stolen_percent > STOLEN_PERCENT_MOST:
        console.print(
            f"[yellow]The host took {stolen_percent} % of this machine's processors: look at the rounds.",
            highlight=False,
        )
    for name, reason in record.absent.items():
        console.print(f"not available: {name}: {reason}", highlight=False)


def keep(record: Record, scale: Scale, part: bool, drbd: bool, broken: bool) -> None:
    """In a file by what it is: only a whole run is one that the docs may quote."""
    if part:
        # A part of a table is nothing to keep, but to look at.
        draw(record, report.RESULTS / "part.json")
    elif broken:
        save(record, report.RESULTS / "broken.json")
    elif scale == FULL:
        save(record, report.BESIDE_DRBD if drbd else report.LATEST)
        console.print("`make report` puts it into docs/performance.md")
    else:
        save(record, report.RESULTS / ("quick.json" if scale == QUICK else "other.json"))


def stopped(*_: Any) -> NoReturn:
    """At Ctrl-C and SIGTERM: end all that was started, undisturbed by a second one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def heed_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stopped)


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes, one short round: to see that it works. Two minutes.")
@click.option("--row", default="", help="Only rows with this in their name, section, work or target.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds to take the median of.")
@click.option("--seconds", type=click.FloatRange(0.1), help="Length of one measurement.")
@click.option("--directory", type=click.Path(path_type=Path, exists=True), default="/var/tmp", show_default=True)
@click.option("--drbd", is_flag=True, help="Instead of the table: beside DRBD, in User-Mode Linux guests.")
@click.option("--report", "only_report", is_flag=True, help="Measure nothing: write docs/performance.md anew.")
def main(
    quick: bool, row: str, rounds: int | None, seconds: float | None, directory: Path, drbd: bool, only_report: bool
) -> None:
    """Measure nbdmirror beside nbdkit's file plugin and qemu's quorum."""
    if only_report:
        write_report()
        return
    rows = matching(row, DRBD_ROWS if drbd else ROWS)
    if not rows:
        raise click.UsageError(f"No row has '{row}' in it. They are:\n" + "\n".join(one.name for one in ROWS))
    scale = QUICK if quick else FULL
    scale = dataclasses.replace(scale, rounds=rounds or scale.rounds, seconds=seconds or scale.seconds)
    heed_signals()
    record = Record(machine.facts(directory), dataclasses.asdict(scale))
    broken = "something broke"
    try:
        with machine.timing(record.settings):
            run(directory, scale, rows, record)
        broken = ""
    except (BenchError, KeyboardInterrupt) as error:
        broken = str(error) or "stopped"
    finally:
        # Also where a traceback follows.
        if record.rounds or not broken:
            tell(record, rows)
        if record.rounds:
            keep(record, scale, part=bool(row), drbd=drbd, broken=bool(broken))
    if broken:
        console.print(f"[red]{broken}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
