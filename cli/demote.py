"""nbdmirror demote: make a primary secondary."""

from pathlib import Path

import click

from cli.ask import DEMOTE_S, ask
from cli.parameters import directory_argument


@click.command()
@directory_argument
@click.option("--force", is_flag=True, help="Also while clients are connected: they are cut off.")
def demote(directory: Path, force: bool) -> None:
    """Make a replica secondary.

    It stops serving NBD clients.

    \b
    Examples:
      nbdmirror demote /srv/vol
      nbdmirror demote /srv/vol --force
    """
    ask(directory, "demote", DEMOTE_S, force=force)
