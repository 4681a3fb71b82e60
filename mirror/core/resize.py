"""What may be asked of a volume's size: one table. How a resize goes is told in mirror.core.sizes."""

from dataclasses import dataclass

from mirror.core.layout import size_is_right
from mirror.core.limits import BLOCK_BYTES
from mirror.core.states import Allowed, ConnectionState, DiskState, Refused, Role, Row, Verdict, verdict_by
from mirror.core.units import exact_size_text


@dataclass(frozen=True)
class Wish:
    """All that the table of wishes looks at. `alone`: no peer is configured."""

    wanted_bytes: int
    size_bytes: int
    next_size_bytes: int
    role: Role
    disk: DiskState
    connection: ConnectionState
    peer_disk: DiskState | None
    alone: bool


# {wanted}, {size} and {next_size} in a reason are those of the wish.
TABLE: tuple[Row[Wish], ...] = (
    Row(
        lambda w: w.role is Role.SECONDARY,
        Refused("secondary", "this replica is secondary", "resize on the primary; both replicas grow by it"),
    ),
    Row(
        lambda w: w.disk is DiskState.FAILED,
        Refused("disk-failed", "this replica's disk is Failed", "replace the disk first"),
    ),
    Row(
        lambda w: not size_is_right(w.wanted_bytes),
        Refused(
            "no-size",
            "no volume can have {wanted}",
            f"give a multiple of {BLOCK_BYTES} that is not larger than 16 PiB",
        ),
    ),
    Row(
        lambda w: w.wanted_bytes < w.size_bytes,
        Refused(
            "shrink",
            "the volume has {size}, more than {wanted}: a volume can only grow",
            "make a smaller volume and copy what is to be kept",
        ),
    ),
    Row(lambda w: w.wanted_bytes == w.size_bytes, Allowed("same-size")),
    Row(lambda w: w.alone, Allowed("alone")),
    Row(
        lambda w: w.connection not in (ConnectionState.CONNECTED, ConnectionState.SYNC_SOURCE),
        Refused(
            "not-connected",
            "the peer is not connected, and both replicas must grow",
            "bring the peer back, then try again; without a peer for good: take `listen` and `peer` out of volume.toml",
        ),
    ),
    Row(
        lambda w: w.connection is ConnectionState.SYNC_SOURCE,
        Refused("resync-running", "a resync is running", "wait for it to end"),
    ),
    Row(
        lambda w: w.disk is not DiskState.UP_TO_DATE or w.peer_disk is not DiskState.UP_TO_DATE,
        Refused("not-in-step", "not both replicas are UpToDate", "wait until `nbdmirror status` says so"),
    ),
    Row(
        # The two may be at different steps of it: only a handshake can tell.
        lambda w: w.next_size_bytes != 0,
        Refused(
            "unfinished",
            "a resize to {next_size} was broken off",
            "`nbdmirror disconnect DIR`, then `nbdmirror connect DIR` finishes or undoes it",
        ),
    ),
    Row(lambda _: True, Allowed("grow")),
)


def may_grow(wish: Wish) -> Verdict:
    """May the volume grow?"""
    verdict = verdict_by(TABLE, wish)
    if isinstance(verdict, Refused):
        sizes = {"wanted": wish.wanted_bytes, "size": wish.size_bytes, "next_size": wish.next_size_bytes}
        words = {name: exact_size_text(size_bytes) for name, size_bytes in sizes.items()}
        return verdict._replace(reason=verdict.reason.format(**words))
    return verdict
