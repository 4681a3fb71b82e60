"""nbdmirror status: the state of a replica, from its server, or from disk when nothing serves it."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from cli import offline, output, status_view
from cli.ask import STATUS_S
from cli.parameters import directory_argument
from nbd_server import config, control

WATCH_S = 1.0
BAR_WIDTH = 60


@click.command()
@directory_argument
@click.option("--json", "as_json", is_flag=True, help="For machines; docs/operations.md describes the keys.")
@click.option("--watch", is_flag=True, help="Go on each second until Ctrl-C; in a pipe a line each.")
def status(directory: Path, as_json: bool, watch: bool) -> None:
    """Show the state of a replica.

    Role, disk, connection, peer, what the peer misses, resync, latency, warnings.

    When nothing serves it, the state is read from disk. Exit status 1: it can't be told.

    \b
    Examples:
      nbdmirror status /srv/vol
      nbdmirror status /srv/vol --json
      nbdmirror status /srv/vol --watch
    """
    with output.errors_as_json(as_json):
        if not watch:
            now = fetch(directory)
            output.say(status_view.page(now)) if not as_json else click.echo(json.dumps(now, indent=2))
            return
        try:
            if sys.stdout.isatty() and not as_json:
                _watch_on_terminal(directory)
            else:
                _watch_in_pipe(directory, as_json)
        except KeyboardInterrupt:
            pass


def fetch(directory: Path) -> dict[str, Any]:
    """The status of a replica, live or from disk. Raises MirrorError."""
    try:
        return control.request(directory, "status", STATUS_S)
    except control.NotServing:
        return offline.status(directory, config.load(directory))


def _watch_in_pipe(directory: Path, as_json: bool) -> None:
    while True:
        now = fetch(directory)
        click.echo(json.dumps(now) if as_json else status_view.line(now))
        time.sleep(WATCH_S)


def _watch_on_terminal(directory: Path) -> None:
    with Live(Text(""), console=Console(highlight=False), auto_refresh=False) as live:
        while True:
            try:
                live.update(_screen(fetch(directory)), refresh=True)
            except control.ServerSilent as error:
                live.update(Text.assemble(("no answer: ", "bold red"), str(error)), refresh=True)
            time.sleep(WATCH_S)


def _screen(now: dict[str, Any]) -> Group | Text:
    page = status_view.page(now)
    resync = now["resync"]
    if not resync or not resync["total_bytes"]:
        return page
    return Group(page, ProgressBar(total=resync["total_bytes"], completed=resync["done_bytes"], width=BAR_WIDTH))
