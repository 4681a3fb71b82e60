"""nbdmirror disconnect: stay apart from the peer."""

from pathlib import Path

import click

from cli.ask import DISCONNECT_S, ask
from cli.parameters import directory_argument


@click.command()
@directory_argument
def disconnect(directory: Path) -> None:
    """Keep a replica apart from its peer.

    Until `connect`. The primary goes on alone and notes what the peer misses.

    \b
    Example:
      nbdmirror disconnect /srv/vol
    """
    ask(directory, "disconnect", DISCONNECT_S)
