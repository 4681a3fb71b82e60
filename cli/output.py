"""What every verb says and how: results on stdout, messages on stderr.

Colours on a terminal only, and not there either where NO_COLOR is set.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator

import click
from rich.console import Console
from rich.text import Text

from mirror.core.errors import MirrorError, OperatorError

# soft_wrap: lines are the terminal's to break, so that what is copied or piped is whole.
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)

# What to do about an error of the operating system that nothing else is known of.
OS_REMEDY = "check the path and its permissions"


def say(text: str | Text) -> None:
    _out.print(text if isinstance(text, Text) else Text(text))


def say_aside(text: str) -> None:
    """What a person wants to know and a program that reads the result must not meet: on stderr."""
    _err.print(Text(text))


def warn(text: str) -> None:
    _err.print(Text.assemble(("warning: ", "bold yellow"), text))


def fail(message: str, remedy: str = "") -> None:
    """What is wrong and why, and on a line of its own what to do."""
    _err.print(Text.assemble(("nbdmirror: ", "bold red"), message))
    if remedy:
        _err.print(Text.assemble(("what to do: ", "bold"), remedy))


def fail_as_json(message: str, remedy: str) -> None:
    """The same for a program that asked for JSON: one line on stdout."""
    click.echo(json.dumps({"error": message, "remedy": remedy or None}))


@contextlib.contextmanager
def errors_as_json(wanted: bool) -> Iterator[None]:
    """Whatever can't be done inside is told as JSON, too, before the verb or `main` tells it to people."""
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads stdout any more
    except MirrorError as error:
        if wanted:
            fail_as_json(error.message, error.remedy)
        raise
    except OSError as error:
        if wanted:
            fail_as_json(str(error), OS_REMEDY)
        raise


def rows(pairs: Iterable[tuple[str, str | Text]]) -> Text:
    """Labels and values in two columns."""
    pairs = list(pairs)
    width = max((len(label) for label, _ in pairs), default=0) + 2
    lines = [Text.assemble((label.ljust(width), "dim"), value) for label, value in pairs]
    return Text("\n").join(lines)


def confirm(question: str) -> None:
    """Ask for a yes on stdin. Raises OperatorError without one."""
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)
        agreed = False
    if not agreed:
        raise OperatorError("nothing was done: there was no yes", remedy="answer y, or say --yes")


def at_terminal() -> bool:
    return sys.stdin.isatty()


def duration_text(seconds: float) -> str:
    """95 -> 1 min 35 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
