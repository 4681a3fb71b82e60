"""nbdmirror promote: make a secondary primary."""

from pathlib import Path

import click

from cli.ask import PROMOTE_S, ask
from cli.parameters import directory_argument


@click.command()
@directory_argument
@click.option("--force", is_flag=True, help="Also when this copy is Outdated: what it lacks is then given up.")
def promote(directory: Path, force: bool) -> None:
    """Make a replica primary.

    For example after its peer was lost.

    The old primary must not be running any more, or both go on by themselves (split brain). For a planned change use
    `switch`.

    \b
    Examples:
      nbdmirror promote /srv/vol
      nbdmirror promote /srv/vol --force     an older copy is better than none
    """
    ask(directory, "promote", PROMOTE_S, force=force)
