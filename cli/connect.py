"""nbdmirror connect: look for the peer again, or resolve a split brain."""

from pathlib import Path

import click

from cli import output
from cli.ask import CONNECT_S, ask
from cli.parameters import directory_argument, yes_option


@click.command()
@directory_argument
@click.option(
    "--discard-my-data",
    is_flag=True,
    help="After a split brain: give up what was written here since, and copy it from the peer.",
)
@yes_option
def connect(directory: Path, discard_my_data: bool, yes: bool) -> None:
    """Connect a replica to its peer again.

    After `disconnect`, or after the replicas refused each other.

    \b
    Examples:
      nbdmirror connect /srv/vol
      nbdmirror connect /srv/vol --discard-my-data     on the loser of a split brain
    """
    if discard_my_data and not yes and output.at_terminal():
        output.confirm(f"Give up everything that was written to {directory} since the replicas parted?")
    ask(directory, "connect", CONNECT_S, discard_my_data=discard_my_data)
