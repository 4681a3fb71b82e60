"""Commands to a live server, as the thin verbs give them."""

from pathlib import Path
from typing import Any

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
# A peer on a silent host is given up after 2 s; a large map takes some more.
PLAN_S = 15.0
DIFF_S = 30.0
# A backing that can only be zeroed by writing takes its time; the server goes on even if nobody waits.
RESIZE_S = 3600.0


def ask(directory: Path, command: str, timeout_s: float, **arguments: object) -> None:
    """Send a command, print what the server says; its warnings go to stderr. Raises MirrorError."""
    result = fetch(directory, command, timeout_s, **arguments)
    output.say(result.get("message") or "done")
    for warning in result.get("warnings", []):
        output.warn(warning)


def fetch(directory: Path, command: str, timeout_s: float, **arguments: object) -> dict[str, Any]:
    """Send a command and return what the server says. Raises MirrorError."""
    try:
        return control.request(directory, command, timeout_s, **arguments)
    except control.NotServing as error:
        raise _why_not_served(directory, error) from None


def _why_not_served(directory: Path, error: OperatorError) -> MirrorError:
    """A directory that is no replica is the better reason."""
    try:
        config.load(directory)
    except MirrorError as reason:
        return reason
    return error
