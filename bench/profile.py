"""`python -m bench.profile`: where the processor goes that a write takes, by server and group of functions.

While fio writes, perf looks at all server processes some thousand times a second (cpu-clock: a virtual machine has no
counters of its own) and sees the stack of each that runs. bench/processor.py says which group a stack belongs to. How
much processor there is to divide the system says, so that neither lost nor late samples change the sum. The client
is left out: it is the same for all. The result goes to bench/results/profile.json; `make report` puts it on the page.
"""

import dataclasses
import os
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import fio, machine, processor, report
from bench.__main__ import IDLE_PERCENT_LEAST, heed_signals, save_json
from bench.figures import Record, Round
from bench.processes import BenchError, command, cpu_seconds, family
from bench.processor import ASLEEP
from bench.scale import FULL, QUICK, Scale
from bench.servers import NbdMirror, Target
from bench.works import FILE, LARGE, MIRRORED_C, NO_SPIN, TARGETS, WORKS, WRITE, WRITE_DEEP

LOOKS_PER_S = 1999
# As what is measured and what it is called, and with which mirrored volume.
MEASURED = {WRITE_DEEP: (WRITE_DEEP, MIRRORED_C), LARGE: (LARGE, MIRRORED_C), ASLEEP: (WRITE, NO_SPIN)}
ROLES = {"nbdkit": FILE, "a": "primary", "b": "secondary"}
# In this time a volume has found out on how many cores it serves more.
WARM_UP_S = 3.0
SCALES = {
    False: dataclasses.replace(FULL, rounds=3, seconds=5.0),
    True: dataclasses.replace(QUICK, seconds=1.0),
}

console = Console(width=None if sys.stdout.isatty() else 140)


def find_perf() -> str:
    found = shutil.which("perf")
    if found is None:
        raise BenchError("perf is not there: `make setup-test` installs it (Debian's package linux-perf)")
    return found


def profile(perf: str, target: Target, options: tuple[str, ...], seconds: float) -> dict[str, Round]:
    """By server: µs of processor a write in each group, how many writes there were, and how many samples."""
    options = (*options, *fio.timed(target.filled_bytes, seconds))
    pids = {role: family(process.pid) for role, process in target.processes.items()}
    found = target.directory / "perf.data"
    of_all = ",".join(str(pid) for role in pids for pid in pids[role])
    recording = (perf, "record", "-q", "-e", "cpu-clock", "-F", str(LOOKS_PER_S), "-g", "-o", str(found), "-p", of_all)
    before_s = {role: cpu_seconds(process.pid) for role, process in target.processes.items()}
    # perf begins to look, starts fio, and ends with it.
    written = fio.run(target.uri, options, seconds + 60, before=(*recording, "--"))["write"]
    taken_s = {role: cpu_seconds(process.pid) - before_s[role] for role, process in target.processes.items()}
    said = command([perf, "script", "-i", found, "-F", "pid,ip,sym,dso"], 300)
    found.unlink()
    samples = processor.count(said.splitlines())
    rounds = {}
    for role, members in pids.items():
        of_role = sum((samples.get(pid, Counter()) for pid in members), Counter[str]())
        if not any(of_role[group] for group in (*processor.KERNEL, processor.REST)):
            raise BenchError("perf saw nothing of the kernel: run this as root, or set kernel.perf_event_paranoid to 1")
        values = processor.values_of(of_role, taken_s[role] * 1e6 / written["total_ios"])
        rounds[ROLES[role]] = Round({**values, "operations_per_s": written["iops"], "samples": of_role.total()})
    return rounds


def run(where: Path, scale: Scale, progress: Progress) -> Record:
    """All of MEASURED, in turns with nbdkit's file plugin."""
    perf = find_perf()
    record = Record(machine.facts(where), {key: getattr(scale, key) for key in ("rounds", "seconds", "volume_bytes")})
    task = progress.add_task("starting the servers", total=scale.rounds * 2 * len(MEASURED))
    targets: dict[str, Target] = {}
    with ExitStack() as cleanup:
        for number, name in enumerate((FILE, MIRRORED_C, NO_SPIN)):
            target = targets[name] = TARGETS[name](name, where / str(number), scale)
            target.directory.mkdir()
            cleanup.callback(target.stop)
            target.start()
            fio.fill(target.uri, target.filled_bytes)
            if isinstance(target, NbdMirror):
                target.wait_until_proven()
        for work, (same, mirrored) in MEASURED.items():
            rounds: dict[str, list[Round]] = {}
            for number in range(scale.rounds):
                # Each round begins with another target.
                for name in (FILE, mirrored) if number % 2 else (mirrored, FILE):
                    target, options = targets[name], WORKS[same].fio
                    progress.update(task, description=f"{work}: {name}")
                    os.sync()
                    warm_up = fio.timed(target.filled_bytes, min(WARM_UP_S, scale.seconds))
                    fio.run(target.uri, (*options, *warm_up), 60)
                    for server, one in profile(perf, target, options, scale.seconds).items():
                        rounds.setdefault(server, []).append(one)
                    progress.advance(task)
            for server, found in rounds.items():
                record.add(work, server, found)
    return record


@click.command(epilog="Example, half a minute long, to see that it works:\n\n.venv/bin/python -m bench.profile --quick")
@click.option("--quick", is_flag=True, help="Small and once, to see that it works; kept nowhere that docs quote.")
@click.option("--directory", type=click.Path(path_type=Path, exists=True), default="/var/tmp", show_default=True)
def main(quick: bool, directory: Path) -> None:
    """Find out with perf where the servers' processor time goes, a mirrored volume's beside nbdkit's file plugin's.

    Takes four minutes and needs root, or kernel.perf_event_paranoid at 1. Writes bench/results/profile.json and
    a picture beside it; then `make report`.
    """
    heed_signals()
    where = Path(tempfile.mkdtemp(prefix="nbdmirror-profile-", dir=directory))
    columns = (TextColumn("{task.description:62}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            record = run(where, SCALES[quick], progress)
    except BenchError as error:
        console.print(f"[red]{error}", highlight=False)
        sys.exit(1)
    finally:
        shutil.rmtree(where, ignore_errors=True)
    for table in processor.tables(record):
        if console.is_terminal:
            console.print(Markdown(table))
        else:
            print(table, end="\n\n")
    idle_percent = record.machine["idle_before_percent"]
    if idle_percent < IDLE_PERCENT_LEAST:
        console.print(f"[yellow]This machine was {idle_percent} % idle before: others took of it.", highlight=False)
    path = report.RESULTS / "quick-profile.json" if quick else report.PROFILE
    save_json(record, path)
    path.with_suffix(".svg").write_text(processor.picture(record) or "")
    console.print(f"written to {path} and beside it", highlight=False)


if __name__ == "__main__":
    main()
