"""Commands to a live server, as the thin verbs give them."""

from pathlib import Path

from cli import output
from mirror.core.errors import MirrorError, OperatorError
from nbd_server import config, control

# Each leaves the server's own limits room to end first, with a better message.
STATUS_S = 5.0
PROMOTE_S = 20.0
DEMOTE_S = 30.0
SWITCH_S = 45.0
CONNECT_S = 15.0
DISCONNECT_S = 15.0


def ask(directory: Path, command: str, timeout_s: float, **arguments: object) -> None:
    """Send a command, print what the server says; its warnings go to stderr. Raises MirrorError."""
    try:
        result = control.request(directory, command, timeout_s, **arguments)
    except control.NotServing as error:
        raise _why_not_served(directory, error) from None
    output.say(result.get("message") or "done")
    for warning in result.get("warnings", []):
        output.warn(warning)


def _why_not_served(directory: Path, error: OperatorError) -> MirrorError:
    """A directory that is no replica is the better reason."""
    try:
        config.load(directory)
    except MirrorError as reason:
        return reason
    return error
