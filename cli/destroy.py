"""nbdmirror destroy: remove a replica. Only files of its own, by name; a backing never."""

import contextlib
from pathlib import Path

import click

from cli import output
from cli.parameters import directory_argument, yes_option
from mirror.core.errors import MirrorError, OperatorError
from mirror.runtime import Runtime
from mirror.store import META_NAME, REPLICA_FILES
from nbd_server import config, control, hold

# volume.toml first: from then on it is a replica no more, however this ends. The lock last: it is held meanwhile.
OWN_FILES = (
    config.FILE_NAME,
    *REPLICA_FILES,
    config.SOCKET_NAME,
    control.FILE_NAME,
    config.INTERRUPTED_NAME,
    hold.FILE_NAME,
)


@click.command()
@directory_argument
@yes_option
def destroy(directory: Path, yes: bool) -> None:
    """Remove a replica and its data.

    For good. A --backing is left as it is.

    \b
    Examples:
      nbdmirror destroy /srv/vol
      nbdmirror destroy /srv/vol --yes
    """
    what = _what_is_there(directory)
    with hold.held_for_change(directory, "destroyed", Runtime()):
        if not yes:
            output.confirm(f"Remove {what}, for good?")
        for name in OWN_FILES:
            (directory / name).unlink(missing_ok=True)
    left = sorted(path.name for path in directory.iterdir())
    if left:
        output.warn(f"{directory} was not removed: it holds {', '.join(left[:5])}, which nbdmirror did not make")
    elif not _removed(directory):
        output.warn(f"{directory} was emptied but could not be removed")
    output.say(f"destroyed {directory}")


def _what_is_there(directory: Path) -> str:
    """Names it for the question. Raises OperatorError for what is no replica."""
    try:
        replica = config.load(directory)
    except MirrorError as error:
        if not directory.exists():
            raise OperatorError(f"{directory} does not exist", remedy="check the path") from None
        # A damaged or interrupted one may go too, but not just any directory.
        signs = (META_NAME, config.FILE_NAME, config.INTERRUPTED_NAME)
        if not directory.is_dir() or not any((directory / name).is_file() for name in signs):
            raise OperatorError(f"{directory} is not a replica", remedy="remove it with rm, if it is to go") from None
        return f"{directory}, a replica that can't be used ({error.message}), with its data"
    if replica.backing is not None:
        return f'{directory}, a replica of "{replica.name}" (its data in {replica.backing} stays)'
    return f'{directory}, a replica of "{replica.name}", with its data'


def _removed(directory: Path) -> bool:
    with contextlib.suppress(OSError):  # the root of a filesystem, or a parent that is not ours
        directory.rmdir()
    return not directory.exists()
