"""nbdmirror invalidate: declare a replica's contents void, to be copied whole from the peer."""

import dataclasses
from pathlib import Path

import click

from cli import output
from cli.parameters import directory_argument
from mirror.core import generation, layout
from mirror.core.errors import OperatorError
from mirror.core.generation import Kind
from mirror.core.layout import Superblock
from mirror.core.states import LEFT_BEHIND, DiskEvent, DiskState, disk_after
from mirror.opening import read_superblock
from mirror.runtime import Runtime
from mirror.store import Store
from nbd_server import config, hold


@click.command()
@directory_argument
@click.option("--force", is_flag=True, help="Also when no peer has the same contents: they are then given up.")
def invalidate(directory: Path, force: bool) -> None:
    """Declare a replica's contents void.

    It is Inconsistent then, and at the next contact everything that differs is copied from its peer.

    For contents that are not trusted any more, after a disk error for example. The server must not be running.

    \b
    Example:
      nbdmirror invalidate /srv/vol
    """
    replica = config.load(directory)
    if replica.peer is None and not force:
        raise OperatorError(
            f"{directory} has no peer to copy from, so this would give up the only copy",
            remedy="set `listen` and `peer` in volume.toml first, or say --force",
        )
    with hold.held_for_change(directory, "invalidated", Runtime()):
        store = Store.open(directory, None)
        try:
            known, warnings = read_superblock(store)
            if not force:
                _refuse_if_newest(directory, known)
            nothing = generation.full_target(0)
            void = dataclasses.replace(
                known,
                sequence=known.sequence + 1,
                kind=Kind.ESTABLISHED if known.kind is Kind.ESTABLISHED else Kind.JOINING,
                disk=disk_after(DiskEvent.INVALIDATED, known.disk),
                peer_disk=None,
                current=nothing.current,
                base=nothing.base,
                history=nothing.history,
                primary=False,
                redundancy_lost_at=known.redundancy_lost_at or Runtime().wall_time_s(),
            )
            store.write_superblock(layout.encode_superblock(void))
        finally:
            store.close()
    for warning in warnings:
        output.warn(warning)
    output.say(f"{directory} is Inconsistent now; its peer's contents replace it at the next contact")


def _refuse_if_newest(directory: Path, known: Superblock) -> None:
    if known.disk is DiskState.UP_TO_DATE and known.peer_disk in LEFT_BEHIND:
        raise OperatorError(
            f"{directory} holds what its peer lacks: the peer is {known.peer_disk.value}",
            remedy="serve it and let the peer catch up, or give those changes up with --force",
        )
