"""nbdmirror disconnect: stay apart from the peer."""

from pathlib import Path

import click

from cli.ask import DISCONNECT_S, ask
from cli.parameters import directory_argument


@click.command()
@directory_argument
def disconnect(directory: Path) -> None:
    """Let the replica in DIR stay apart from its peer until `connect`.

    The primary goes on alone and notes what the peer misses.

    \b
    Example:
      nbdmirror disconnect /srv/vol
    """
    ask(directory, "disconnect", DISCONNECT_S)
