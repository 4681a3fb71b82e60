"""nbdmirror connect: look for the peer again, or resolve a split brain; or say first what would come of it."""

import json
from pathlib import Path
from typing import Any

import click

from cli import output
from cli.ask import CONNECT_S, PLAN_S, ask, fetch
from cli.output import duration_text
from cli.parameters import directory_argument, yes_option
from mirror.core.units import size_text


@click.command()
@directory_argument
@click.option(
    "--discard-my-data",
    is_flag=True,
    help="After a split brain: give up what was written here since, and copy it from the peer.",
)
@click.option("--dry-run", is_flag=True, help="Ask the peer and show the plan; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the plan for machines.")
@yes_option
def connect(directory: Path, discard_my_data: bool, dry_run: bool, as_json: bool, yes: bool) -> None:
    """Connect a replica to its peer again.

    After `disconnect`, or after the replicas refused each other.

    With --dry-run the peer is asked, the plan decided and shown, and nothing changed on either side: which rule, which
    way the data would go, how much at most, and how long by the speed of the last resync.

    \b
    Examples:
      nbdmirror connect /srv/vol
      nbdmirror connect /srv/vol --dry-run
      nbdmirror connect /srv/vol --discard-my-data --dry-run     what would be given up
      nbdmirror connect /srv/vol --discard-my-data               on the loser of a split brain
    """
    if dry_run:
        with output.errors_as_json(as_json):
            plan = fetch(directory, "plan", PLAN_S, discard_my_data=discard_my_data)
        click.echo(json.dumps(plan, indent=2)) if as_json else _show(plan)
        return
    if as_json:
        raise click.UsageError("--json is for the plan: give --dry-run too.")
    if discard_my_data and not yes and output.at_terminal():
        output.confirm(f"Give up everything that was written to {directory} since the replicas parted?")
    ask(directory, "connect", CONNECT_S, discard_my_data=discard_my_data)


def _show(plan: dict[str, Any]) -> None:
    """The plan in two columns; what keeps it from being carried out below."""
    count, expected_s = plan["bytes"], plan["expected_s"]
    pairs = [
        ("rule", plan["rule"]),
        ("action", plan["action"]),
        ("direction", plan["direction"] or "none: nothing would be copied"),
        ("bytes", "none" if not count else f"at most {size_text(count)}"),
        ("time", "unknown: no resync was measured yet" if expected_s is None else f"about {duration_text(expected_s)}"),
        ("reason", plan["reason"]),
    ]
    if not count:
        pairs = [pair for pair in pairs if pair[0] not in ("bytes", "time")]
    output.say(output.rows(pairs))
    if plan["connected"]:
        output.say_aside("they are connected already: this is what their handshake chose")
    if plan["hindrance"]:
        output.warn(f"it would not come to that now: {plan['hindrance']}")
    if plan["remedy"]:
        output.say_aside(f"what to do: {plan['remedy']}")
