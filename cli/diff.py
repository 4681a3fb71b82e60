"""nbdmirror diff: what differs between the replicas since their histories parted, from their two dirty maps."""

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cli import offline, output
from cli.ask import DIFF_S
from cli.parameters import directory_argument
from mirror.core.difference import compare
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import MirrorError, OperatorError
from mirror.core.limits import DIFF_RUNS_DEFAULT, DIFF_RUNS_MAX
from mirror.core.units import size_text
from nbd_server import config, control, outlook

EQUAL, DIFFERS, NOT_TOLD = 0, 1, 3

SUSPECT = "suspect"
_WHO = {"own": "this replica", "peer": "the peer", "both": "both", SUSPECT: "nobody knows: suspect"}


@click.command()
@directory_argument
@click.option("--json", "as_json", is_flag=True, help="For machines; docs/operations.md describes the keys.")
@click.option(
    "--limit",
    type=click.IntRange(0, DIFF_RUNS_MAX),
    default=DIFF_RUNS_DEFAULT,
    show_default=True,
    help="List so many ranges at most; the totals count all.",
)
def diff(directory: Path, as_json: bool, limit: int) -> None:
    """List what differs between the replicas.

    Since their histories parted: ranges with offset and length in bytes, and who changed them. And the suspects: blocks
    that a comparison found different, with nobody known to have changed them. It compares nothing itself (`verify`
    does). It asks the peer also where the replicas refuse each other (split brain), and changes nothing; a primary goes
    on serving.

    Exit status: 0 nothing differs, 1 something does, 2 wrong usage, 3 it can't be told whole (the peer is out of reach:
    then what this side changed is listed).

    \b
    Examples:
      nbdmirror diff /srv/vol
      nbdmirror diff /srv/vol --limit 0         the totals alone
      nbdmirror diff /srv/vol --json | jq .own_bytes
    """
    try:
        with output.errors_as_json(as_json):
            found = _fetch(directory, limit)
    except MirrorError as error:
        output.fail(error.message, error.remedy)
        sys.exit(NOT_TOLD)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _show(directory, found)
    if not found["complete"]:
        if not as_json:
            output.fail(f"this is not the whole difference: {found['unknown']}")
        sys.exit(NOT_TOLD)
    sys.exit(DIFFERS if found["range_count"] or found["suspect_bytes"] else EQUAL)


def _fetch(directory: Path, limit: int) -> dict[str, Any]:
    """From the server, or from disk what this side changed. Raises MirrorError."""
    replica = config.load(directory)
    if replica.peer is None:
        raise OperatorError(f"{directory} stands alone: there is nothing that it could differ from")
    try:
        return control.request(directory, "diff", DIFF_S, limit=limit)
    except control.NotServing:
        return _from_disk(directory, limit)


def _from_disk(directory: Path, limit: int) -> dict[str, Any]:
    metadata = offline.read(directory)
    known, body = metadata.copies.superblock, metadata.body
    if known is None or body is None:
        assert metadata.copies.refusal is not None
        raise metadata.copies.refusal
    found = compare(offline.dirty_at_start(known, body), DirtyMap(known.size_bytes), limit)
    suspects = outlook.compare_suspects(body.suspects, limit)
    return outlook.tell(known, None, found, suspects, f"nothing serves {directory}, so the peer can't be asked")


def _show(directory: Path, found: dict[str, Any]) -> None:
    ranges = [(one["offset"], one["length"], one["changed_by"]) for one in found["ranges"]]
    ranges += [(one["offset"], one["length"], SUSPECT) for one in found["suspect_ranges"]]
    if sys.stdout.isatty():
        _show_table(ranges)
    else:
        for offset, length, who in ranges:
            click.echo(f"{offset} {length} {who}")
    left = found["range_count"] + found["suspect_range_count"] - len(ranges)
    if left:
        output.warn(f"{left} more ranges; --limit shows more, the totals count them")
    output.say_aside(_totals(found))
    if found["suspect_bytes"]:
        count = f"{size_text(found['suspect_bytes'])} are suspect, {found['suspect_range_count']} ranges"
        output.warn(f"{count}: they were found different, and nobody knows which copy is right")
        repair = f"nbdmirror verify {directory} --suspects --repair --from primary"
        output.say_aside(f"what to do: look at both, then `{repair}`, or secondary")


def _show_table(ranges: list[tuple[int, int, str]]) -> None:
    table = Table("offset", "length", "changed by", box=None, pad_edge=False)
    table.columns[0].justify = table.columns[1].justify = "right"
    for offset, length, who in ranges:
        table.add_row(str(offset), size_text(length), _WHO[who])
    if ranges:
        Console(highlight=False).print(table)


def _totals(found: dict[str, Any]) -> str:
    if found["peer_bytes"] is None:
        return f"{found['name']}: this replica changed {size_text(found['own_bytes'])} since it was last in step"
    if not found["range_count"] and not found["complete"]:
        return f"{found['name']}: neither replica is known to have changed anything"
    if not found["range_count"]:
        return f"{found['name']}: nothing {'else ' if found['suspect_bytes'] else ''}differs"
    return (
        f"{found['name']}: changed since the histories parted: {size_text(found['own_bytes'])} by this replica alone, "
        f"{size_text(found['peer_bytes'])} by the peer alone, {size_text(found['both_bytes'])} by both; "
        f"{found['range_count']} ranges"
    )
