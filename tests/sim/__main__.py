"""python -m tests.sim: run lives of the simulator. One that fails is shrunk and shown; the status is 1 then."""

import gc
import itertools
import json
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.sim import stand_ins  # isort: skip  comes before the product

from nbd_server import compiled as compiled_copy
from tests.sim.faults import FAULTS, Fault, planted
from tests.sim.life import Life, Result
from tests.sim.plan import Plan, draw_plan
from tests.sim.shrink import shrink

# Lives that a worker runs at a time: a second or two.
BATCH = 20
# Lives in which each planted fault must be found.
FAULT_LIVES_MAX = 4000
# The life that found each fault when all were last searched for from the first life on: it is tried before the others.
FOUND = Path(__file__).with_name("found.json")
HOURS = click.FloatRange(min=0, min_open=True)
assert stand_ins.OS
# How a violation is told to the parent process: seed, invariant, message.
Failure = tuple[int, str, str]


class Told(NamedTuple):
    """What a worker's lives came to; `timelines` is a sum of checksums, so their order does not matter."""

    lives: int
    steps: int
    timelines: int
    compiled: list[str]
    failures: list[Failure]


def _begin_anew(_context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """Where the sources run and the compiled copy is wanted: the process begins anew, with that first on its path."""
    if wanted and not compiled_copy.is_running():
        if compiled_copy.import_root() != compiled_copy.COPY:
            raise click.UsageError("the compiled copy is absent or not of these sources: `make setup` makes it anew")
        path = os.pathsep.join(map(str, (compiled_copy.COPY, compiled_copy.SOURCES)))
        # -P: not the working directory, which would come first.
        again = [sys.executable, "-P", "-m", "tests.sim", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "PYTHONPATH": path})


may_be_compiled = click.option(
    "--compiled",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_begin_anew,
    help="Run what `make setup` compiled, in place of the sources.",
)


@click.group()
def main() -> None:
    """Whole clusters of the production code under virtual time, with crashes, cuts and torn writes."""


@main.command()
@click.argument("seed", type=int)
@click.option("--events", default="", help="Events that this life shall have more of, with commas.")
@click.option("--protocols", default="CCCCCCBBAA", show_default=True)
@click.option("--fault", "fault_name", default="", help="Plant this fault.")
@click.option("--no-shrink", is_flag=True, help="Show the whole life.")
@may_be_compiled
def one(seed: int, events: str, protocols: str, fault_name: str, no_shrink: bool) -> None:
    """Replay one life and print its timeline."""
    if fault_name and compiled_copy.is_running():
        raise click.UsageError("a fault is planted in a function's source: compiled ones have none")
    fault = next((fault for fault in FAULTS if fault.name == fault_name), None)
    if fault_name and fault is None:
        raise click.UsageError(f"no fault {fault_name!r}; there are: {', '.join(fault.name for fault in FAULTS)}")
    if fault is not None:
        events, protocols = ",".join(fault.events), fault.protocols
    plan = draw_plan(seed, _names(events), protocols, fault is not None and fault.narrow)
    if fault is None:
        result = _live(plan, no_shrink)
    else:
        with planted(fault):
            result = _live(plan, no_shrink)
    _show(result)
    sys.exit(1 if result.violations else 0)


def _live(plan: Plan, no_shrink: bool) -> Result:
    result = Life(plan).run()
    if result.violations and not no_shrink:
        full = len(result.plan.events), len(result.plan.operations)
        result = shrink(result)
        left = len(result.plan.events), len(result.plan.operations)
        click.echo(f"shrunk from {full[0]} events and {full[1]} operations to {left[0]} and {left[1]}")
    return result


def _show(result: Result) -> None:
    plan = result.plan
    click.echo(
        f"seed {plan.seed}: protocol {plan.protocol}, a log of {plan.log_slots} extents, {plan.workers} client threads,"
        f" {len(plan.operations)} operations, {len(plan.events)} events, {result.steps} steps,"
        f" {result.virtual_s:.1f} virtual seconds"
    )
    for line in result.timeline:
        click.echo(line)
    for invariant, message in result.violations:
        click.echo(f"\nBROKEN: {invariant}\n    {message}")


@main.command()
@click.option("--count", type=click.IntRange(min=1), default=1000, show_default=True, help="How many lives.")
@click.option("--first", default=0, show_default=True, help="The first seed.")
@click.option("--events", default="", help="Events that these lives shall have more of, with commas.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@may_be_compiled
def lives(count: int, first: int, events: str, as_json: bool) -> None:
    """Run this many lives on all cores."""
    sys.exit(_run_many(range(first, first + count), None, as_json, wanted=_names(events)))


@main.command()
@click.option("--hours", type=HOURS, default=1.0, show_default=True, help="How long.")
@may_be_compiled
def soak(hours: float) -> None:
    """Go on with ever new seeds on all cores."""
    first = int(time.time()) * 1000
    sys.exit(_run_many(_forever(first), time.monotonic() + hours * 3600, False, total_s=hours * 3600))


def _forever(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


def _names(events: str) -> tuple[str, ...]:
    return tuple(filter(None, events.split(",")))


def _batch(seeds: list[int], wanted: tuple[str, ...]) -> Told:
    """Run these in a worker."""
    failures: list[Failure] = []
    steps = timelines = 0
    for seed in seeds:
        result = Life(draw_plan(seed, wanted)).run()
        steps += result.steps
        timelines += zlib.crc32("\n".join(result.timeline).encode())
        failures += [(seed, invariant, message) for invariant, message in result.violations[:1]]
    gc.collect()
    return Told(len(seeds), steps, timelines, _compiled_modules(), failures)


def _compiled_modules() -> list[str]:
    """What this process runs of the product that is not Python's bytecode."""
    modules = [(name, str(module.__file__)) for name, module in sys.modules.items() if name.startswith("mirror.")]
    return sorted(name for name, file in modules if not file.endswith(".py"))


def _run_many(
    seeds: Iterable[int], until_s: float | None, as_json: bool, total_s: float = 0.0, wanted: tuple[str, ...] = ()
) -> int:
    started_s = time.monotonic()
    iterator = iter(seeds)
    done = steps = timelines = 0
    compiled: list[str] = []
    failures: list[Failure] = []
    console = Console(stderr=True)
    total = len(seeds) if isinstance(seeds, range) else total_s
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, disable=as_json or not console.is_terminal) as progress,
        ProcessPoolExecutor(os.cpu_count()) as pool,
    ):
        task = progress.add_task("lives", total=total)
        running: set[Future[Told]] = set()
        more = True
        while more or running:
            while more and len(running) < 2 * (os.cpu_count() or 1):
                batch = list(itertools.islice(iterator, BATCH))
                more = bool(batch) and not failures and (until_s is None or time.monotonic() < until_s)
                if more:
                    running.add(pool.submit(_batch, batch, wanted))
            finished, running = wait(running, return_when=FIRST_COMPLETED) if running else (set(), set())
            for future in finished:
                told = future.result()
                done, steps, timelines = done + told.lives, steps + told.steps, timelines + told.timelines
                compiled = told.compiled
                failures += told.failures
            passed_s = time.monotonic() - started_s
            progress.update(
                task,
                completed=done if isinstance(seeds, range) else passed_s,
                description=f"{done} lives, {done / passed_s * 60:.0f} a minute",
            )
    passed_s = time.monotonic() - started_s
    failures.sort()
    if as_json:
        keys = ("seed", "invariant", "message")
        found_as_json = [dict(zip(keys, failure, strict=True)) for failure in failures]
        lives_as_json = {"lives": done, "steps": steps, "timelines": timelines, "failures": found_as_json}
        click.echo(json.dumps({**lives_as_json, "seconds": round(passed_s, 1), "compiled": compiled}))
    else:
        click.echo(f"{done} lives in {passed_s:.0f} s, {done / passed_s * 60:.0f} a minute, {len(failures)} failed")
    if not done:
        click.echo("no life was run, so nothing is known: give it more time", err=True)
        return 1
    if failures:
        for invariant, number in Counter(invariant for _, invariant, _ in failures).items():
            click.echo(f"{number} broke {invariant}", err=True)
        seed = failures[0][0]
        options = f" --events {','.join(wanted)}" * bool(wanted) + " --compiled" * bool(compiled)
        again = f"python -m tests.sim one {seed}{options}" if options else f"make sim SEED={seed}"
        click.echo(f"the first one, shrunk (again: {again}):\n", err=True)
        result = _live(draw_plan(seed, wanted), no_shrink=False)
        if not as_json:
            _show(result)
        return 1
    return 0


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--only", default="", help="Those whose name contains this.")
@click.option("--anew", is_flag=True, help=f"Search from the first life on, and write what finds them to {FOUND.name}.")
def faults(as_json: bool, only: str, anew: bool) -> None:
    """Plant each fault, and say which life finds it, by which invariant, and how many were tried."""
    wanted = [fault for fault in FAULTS if only in fault.name]
    known: dict[str, int] = json.loads(FOUND.read_text())
    searches = [_seeds(None if anew else known.get(fault.name)) for fault in wanted]
    rows = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, disable=as_json or not console.is_terminal) as progress,
        ProcessPoolExecutor(os.cpu_count()) as pool,
    ):
        task = progress.add_task("planted faults", total=len(wanted))
        for fault, row in zip(wanted, pool.map(_find, wanted, searches), strict=True):
            rows.append({"fault": fault.name, **row._asdict()})
            progress.advance(task)
    if anew:
        known |= {row["fault"]: row["life"] for row in rows if row["invariant"]}
        ordered = {fault.name: known[fault.name] for fault in FAULTS if fault.name in known}
        FOUND.write_text(json.dumps(ordered, indent=4) + "\n")
    if as_json:
        click.echo(json.dumps(rows))
    else:
        for row in rows:
            found = f"life {row['life']:4}  {row['invariant']}" if row["invariant"] else "NOT FOUND"
            click.echo(f"{row['fault']:66} {row['tried']:4} tried  {found}")
    sys.exit(0 if all(row["invariant"] for row in rows) else 1)


class Finding(NamedTuple):
    """Which life found a planted fault, by which invariant (no name: none did), after how many tried."""

    life: int
    invariant: str
    tried: int


def _seeds(first: int | None) -> list[int]:
    return [*([] if first is None else [first]), *range(FAULT_LIVES_MAX)]


def _find(fault: Fault, seeds: list[int]) -> Finding:
    for tried, seed in enumerate(seeds, 1):
        plan = draw_plan(seed, fault.events, fault.protocols, fault.narrow)
        with planted(fault):
            found = Life(plan).run().violations
        if found:
            # It is the fault that was found only if the same life without it breaks nothing.
            honest = Life(plan).run()
            if honest.violations:
                raise AssertionError(f"life {seed} of {fault.name!r} fails without the fault: {honest.violations[0]}")
            return Finding(seed, found[0][0], tried)
    return Finding(-1, "", len(seeds))


if __name__ == "__main__":
    main()
