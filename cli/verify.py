"""nbdmirror verify: compare both replicas online, and repair by the operator's word."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from cli import output
from cli.output import duration_text
from cli.parameters import SIZE, directory_argument
from cli.status_view import verify_text
from mirror.core.errors import MirrorError, OperatorError
from mirror.core.units import size_text
from nbd_server import config, control

EQUAL, DIFFER, COULD_NOT = 0, 1, 3
# Starting and asking take a round trip to the primary at most, which answers at once or after a durable write.
COMMAND_S = 30.0
POLL_S = 0.1
# Whoever waits longer wants to see that something happens.
QUIET_S = 2.0
PIPE_LINE_S = 10.0
STOP_PATIENCE_S = 10.0
NEXT = "the next verify begins there"
SAME = "both have the same there"


@click.command()
@directory_argument
@click.option("--repair", is_flag=True, help="Copy what differs from the side that --from names.")
@click.option("--from", "side", type=click.Choice(["primary", "secondary"]), help="The side that is right.")
@click.option("--suspects", is_flag=True, help="Only the blocks that were found different before.")
@click.option("--rate", type=SIZE, help="At most so many bytes a second (100M).")
@click.option("--background", is_flag=True, help="Return at once; `status` shows the progress and the result.")
@click.option("--restart", is_flag=True, help="From 0, though the last one was cut short.")
@click.option("--stop", is_flag=True, help="Stop a running one; the next one begins there.")
@click.option("--json", "as_json", is_flag=True, help="The result for machines.")
def verify(
    directory: Path,
    repair: bool,
    side: str | None,
    suspects: bool,
    rate: int | None,
    background: bool,
    restart: bool,
    stop: bool,
    as_json: bool,
) -> None:
    """Compare both replicas, while clients write.

    Blocks that differ are listed and kept as suspects.

    One that was cut short goes on where it was while the replicas stay connected. If they were apart since, or changed
    roles, the next one begins there and goes once round the whole volume, so that "equal" is always said of all of it.

    Exit status 0: they are equal (with --repair: now). 1: they differ. 2: wrong usage. 3: it could not be done.

    \b
    Examples:
      nbdmirror verify /srv/vol
      nbdmirror verify /srv/vol --rate 50M --background
      nbdmirror verify /srv/vol --suspects --repair --from primary
    """
    if repair != (side is not None):
        raise click.UsageError("--repair and --from belong together: only you know which side is right")
    if stop and (repair or suspects or rate or background or restart):
        raise click.UsageError("--stop goes alone")
    try:
        with output.errors_as_json(as_json):
            if stop:
                run = _stop(directory)
                click.echo(json.dumps(run, indent=2)) if as_json else output.say(f"stopped; {NEXT}")
                return
            wish = {"repair": side or "", "rate": rate or 0, "suspects_only": suspects, "restart": restart}
            run = _ask(directory, act="start", **wish)
            if beginning := _beginning(run):
                _say(as_json, beginning)
            if background:
                _say(as_json, "verifying in the background; `nbdmirror status` shows how it goes")
                if as_json:
                    click.echo(json.dumps(run, indent=2))
                return
            status_code = _finish(directory, run, as_json)
    except MirrorError as error:
        output.fail(error.message, error.remedy)
        status_code = COULD_NOT
    except KeyboardInterrupt:
        # While it was asked for: 1, as `main` has it for others, would say that the copies differ.
        output.fail("stopped while the server was asked", "`nbdmirror status` shows whether a verify runs")
        status_code = COULD_NOT
    sys.exit(status_code)


def _beginning(run: dict[str, Any]) -> str:
    """Where a run begins that does not begin at 0, and how much it will compare."""
    # An older release, which may be the primary's, names no beginning.
    if run["resumed_bytes"]:
        at, compared = run.get("cursor", run["resumed_bytes"]), size_text(run["resumed_bytes"])
        return f"goes on at {size_text(at)}, where the last one was stopped: {compared} were compared by then"
    if run.get("begin"):
        return (
            f"begins at {size_text(run['begin'])}, where the last one ended, and goes once round the whole volume, "
            "because the replicas were apart or changed roles since (--restart begins at 0)"
        )
    return ""


def _finish(directory: Path, run: dict[str, Any], as_json: bool) -> int:
    """Wait for the end and tell of it; returns the exit status."""
    try:
        run = _watch(directory, run)
    except KeyboardInterrupt:
        with contextlib.suppress(control.CommandRefused):  # it has just ended
            _stop(directory)
        if as_json:
            output.fail_as_json("stopped", NEXT)
        output.fail("stopped", NEXT)
        return COULD_NOT
    error, remedy = None, None
    if run["state"] != "done":
        compared = size_text(run["resumed_bytes"] + run["done_bytes"])
        error, remedy = f"the verify stopped after {compared}: {run['reason']}", NEXT
    elif _still_suspect(run):
        remedy = f"`nbdmirror verify {directory} --suspects --repair --from primary` clears them (or secondary: {SAME})"
    if as_json:
        click.echo(json.dumps({**run, "error": error, "remedy": remedy}, indent=2))
    else:
        _tell(run, remedy)
    if error is not None:
        output.fail(error, NEXT)
        return COULD_NOT
    return DIFFER if run["result"] == "differs" else EQUAL


def _still_suspect(run: dict[str, Any]) -> int:
    """Bytes that are listed as suspects though all is equal: only a word or a client's whole write takes them off."""
    # An older release, which may be the primary's, names none.
    suspects = run.get("suspects", {"bytes": 0})
    return int(suspects["bytes"]) if run["result"] == "equal" else 0


def _tell(run: dict[str, Any], remedy: str | None) -> None:
    for offset, length in run["ranges"]:
        output.say(f"differs: offset {offset}, length {length}")
    if run["more"]:
        output.say("differs: and more; `nbdmirror status --json` counts them")
    if run["state"] != "done":
        return
    compared = size_text(run["resumed_bytes"] + run["done_bytes"])
    differing = size_text(run["differing_bytes"])
    if run["result"] == "equal" and run.get("suspects_only") and not run["total_bytes"]:
        output.say("no block is suspect, so nothing was compared; `nbdmirror verify` without --suspects compares all")
    elif run["result"] == "equal":
        output.say(f"equal: {compared} compared{' (the suspects)' if run['suspects_only'] else ''}")
        if suspect_bytes := _still_suspect(run):
            output.warn(f"{size_text(suspect_bytes)} stay listed as suspects: found different before, equal now")
            output.say_aside(f"what to do: {remedy}")
    elif run["result"] == "repaired":
        output.say(f"repaired: {compared} compared, {differing} differed and were copied from the {run['repair']}")
    else:
        output.say(f"the copies differ: {compared} compared, {differing} differ and are suspects now")


def _watch(directory: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Until it is over; shows how it goes when that takes its time."""
    number = run["number"]
    with _shown(run) as show:
        while run["state"] == "running":
            time.sleep(POLL_S)
            run = _ask(directory, act="progress")
            if run["number"] != number:
                raise OperatorError("another verify has begun since", remedy="`nbdmirror status` shows the last result")
            show(run)
    return run


@contextlib.contextmanager
def _shown(run: dict[str, Any]) -> Iterator[Any]:
    """A bar on a terminal, now and then a line in a pipe; nothing for what is over at once."""
    begun_s = time.monotonic()
    if not sys.stderr.isatty():
        told_s = begun_s

        def tell(now: dict[str, Any]) -> None:
            nonlocal told_s
            if time.monotonic() - told_s >= PIPE_LINE_S:
                told_s = time.monotonic()
                click.echo(f"verify {verify_text(now)}", err=True)

        yield tell
        return
    bar = Progress(
        TextColumn("verify"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[words]}"),
        console=Console(stderr=True),
    )
    task = bar.add_task("verify", total=run["total_bytes"], words="")
    try:

        def draw(now: dict[str, Any]) -> None:
            if time.monotonic() - begun_s < QUIET_S:
                return
            bar.start()
            left = f", {duration_text(now['eta_s'])} left" if now["eta_s"] else ""
            found = f", {size_text(now['differing_bytes'])} differ" if now["differing_bytes"] else ""
            words = f"{size_text(now['done_bytes'])} at {size_text(now['bytes_per_s'])}/s{left}{found}"
            bar.update(task, completed=now["done_bytes"], words=words)

        yield draw
    finally:
        bar.stop()


def _ask(directory: Path, **request: object) -> dict[str, Any]:
    try:
        answer = control.request(directory, "verify", COMMAND_S, **request)
    except control.NotServing:
        config.load(directory)  # a directory that is no replica is the better reason
        raise
    run = answer.get("run")
    if not isinstance(run, dict):
        raise OperatorError("the server knows of no verify any more", remedy="`nbdmirror status` shows the last result")
    return run


def _stop(directory: Path) -> dict[str, Any]:
    run = _ask(directory, act="stop")
    deadline_s = time.monotonic() + STOP_PATIENCE_S
    while run["state"] == "running":
        if time.monotonic() > deadline_s:
            raise OperatorError("the verify does not stop: a disk is slow", remedy="look at the server's log")
        time.sleep(POLL_S)
        run = _ask(directory, act="progress")
    return run


def _say(as_json: bool, text: str) -> None:
    """Beside a result for machines, people are told on stderr."""
    if as_json:
        click.echo(text, err=True)
    else:
        output.say(text)
