"""nbdmirror switch: a planned hand-over."""

from pathlib import Path

import click

from cli.ask import SWITCH_S, ask
from cli.parameters import directory_argument


@click.command()
@directory_argument
def switch(directory: Path) -> None:
    """Swap the roles of a replica and its peer.

    Nothing is lost: running requests end, both replicas flush, the roles change. Clients are cut off and attach at the
    other replica. It can be asked of either side.

    \b
    Example:
      nbdmirror switch /srv/vol
    """
    ask(directory, "switch", SWITCH_S)
