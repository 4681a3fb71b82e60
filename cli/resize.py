"""nbdmirror resize: let a volume grow."""

from pathlib import Path

import click

from cli import output
from cli.ask import RESIZE_S, ask
from cli.parameters import SIZE, directory_argument
from mirror.core.limits import BLOCK_BYTES
from mirror.core.units import exact_size_text


@click.command()
@directory_argument
@click.argument("size", metavar="SIZE", type=SIZE)
def resize(directory: Path, size: int) -> None:
    """Let a volume grow, on both replicas.

    DIR is the primary's, served and connected: both replicas grow, or none does. SIZE is the whole size, like 20G. What
    is new reads as zeroes. A client sees it at its next connect. A backing must be large enough before, on both nodes;
    what it holds behind the old end is zeroed.

    If a node dies in the middle, the resize is finished or undone when the two meet again. While the peer is away it is
    refused; a volume that has no peer configured grows by itself. A volume can't shrink.

    \b
    Examples:
      nbdmirror resize /srv/vol 20G
    """
    size_bytes = -(-size // BLOCK_BYTES) * BLOCK_BYTES
    if size_bytes != size:
        output.warn(
            f"the size was rounded up from {size} bytes to {exact_size_text(size_bytes)}, a multiple of {BLOCK_BYTES}"
        )
    ask(directory, "resize", RESIZE_S, size=size_bytes)
