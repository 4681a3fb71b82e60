"""Roles, disk states and connection states, and the tables of what may follow what.

Two kinds of tables. **Facts** (a disk died, a sync ended) have a row for each state that they can meet, and the row
names the next state; a missing row is our own bug, so `disk_after` stops there. **Wishes** (promote, demote, switch,
connect, disconnect) are read row by row, the first that fits answers: allowed, perhaps with a warning, or refused with
a reason and a remedy. Every row has a name that the log prints. Nothing here repairs a wish: it is granted or refused.

State objects with methods for each transition lost: what one state allows was spread over as many places as there are
wishes, and no test could walk over all of them.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from mirror.core.errors import OperatorError


class Role(enum.Enum):
    """Who serves the volume. A replica always has one, also while nobody is connected."""

    PRIMARY = "primary"
    SECONDARY = "secondary"


class DiskState(enum.Enum):
    """How good a replica's own copy is."""

    UP_TO_DATE = "UpToDate"
    # Cut off while in step: a sound copy that can't know whether the other one moved on. Never durable.
    CONSISTENT = "Consistent"
    # A sound copy of an older moment: the other one is known to have moved on.
    OUTDATED = "Outdated"
    # A sync has begun to overwrite it and has not ended: of no single moment.
    INCONSISTENT = "Inconsistent"
    # The device refused a read, a write or a flush; nothing on it is trusted.
    FAILED = "Failed"


# A peer of which this is known can't be the newer one, unless somebody forced it.
LEFT_BEHIND = frozenset({DiskState.OUTDATED, DiskState.INCONSISTENT, DiskState.FAILED})


class ConnectionState(enum.Enum):
    """How far a replica is with its peer."""

    # Stays apart: no peer configured, told to, or refused by the handshake.
    STANDALONE = "Standalone"
    CONNECTING = "Connecting"
    HANDSHAKE = "Handshake"
    CONNECTED = "Connected"
    SYNC_SOURCE = "SyncSource"
    SYNC_TARGET = "SyncTarget"


# A session exists: what the peer says of itself is known and current.
LINKED = frozenset({ConnectionState.CONNECTED, ConnectionState.SYNC_SOURCE, ConnectionState.SYNC_TARGET})


class DiskEvent(enum.Enum):
    """A fact that changes, or could change, the disk state."""

    # The first block of a resync is about to land here (invariant inconsistent-first).
    SYNC_TARGET_BEGAN = "a resync begins to overwrite this copy"
    # The last block of a resync is stable here.
    SYNC_TARGET_ENDED = "the last block of a resync is stable on this copy"
    # The handshake found both copies equal, or this one the source.
    IN_STEP = "the handshake found nothing missing on this copy"
    # The session of a secondary ended while it was in step.
    CUT_OFF = "the link to the primary was lost"
    # The peer said, or the handshake found, that the peer moved on without this one.
    PEER_MOVED_ON = "the peer moved on without this copy"
    # It became primary, by whatever word was needed.
    PROMOTED = "this copy became the primary's"
    DEVICE_FAILED = "the device refused a read, a write or a flush"
    # The operator's `invalidate`.
    INVALIDATED = "the operator declared this copy void"


_D = DiskState
_E = DiskEvent

# Rows that are missing can't happen while the rest of the program is right: a Failed copy is neither source nor target,
# an Inconsistent one is neither in step nor promoted (invariant no-bad-primary).
DISK_MOVES: dict[DiskEvent, dict[DiskState, DiskState]] = {
    _E.SYNC_TARGET_BEGAN: {
        _D.UP_TO_DATE: _D.INCONSISTENT,
        _D.CONSISTENT: _D.INCONSISTENT,
        _D.OUTDATED: _D.INCONSISTENT,
        _D.INCONSISTENT: _D.INCONSISTENT,
    },
    _E.SYNC_TARGET_ENDED: {_D.INCONSISTENT: _D.UP_TO_DATE},
    _E.IN_STEP: {_D.UP_TO_DATE: _D.UP_TO_DATE, _D.CONSISTENT: _D.UP_TO_DATE, _D.OUTDATED: _D.UP_TO_DATE},
    _E.CUT_OFF: {
        _D.UP_TO_DATE: _D.CONSISTENT,
        _D.CONSISTENT: _D.CONSISTENT,
        _D.OUTDATED: _D.OUTDATED,
        _D.INCONSISTENT: _D.INCONSISTENT,
        _D.FAILED: _D.FAILED,
    },
    _E.PEER_MOVED_ON: {
        _D.UP_TO_DATE: _D.OUTDATED,
        _D.CONSISTENT: _D.OUTDATED,
        _D.OUTDATED: _D.OUTDATED,
        _D.INCONSISTENT: _D.INCONSISTENT,
        _D.FAILED: _D.FAILED,
    },
    _E.PROMOTED: {_D.UP_TO_DATE: _D.UP_TO_DATE, _D.CONSISTENT: _D.UP_TO_DATE, _D.OUTDATED: _D.UP_TO_DATE},
    _E.DEVICE_FAILED: dict.fromkeys(DiskState, _D.FAILED),
    _E.INVALIDATED: dict.fromkeys(DiskState, _D.INCONSISTENT),
}


def disk_after(event: DiskEvent, state: DiskState) -> DiskState:
    """The disk state that follows; an event that can't meet this state is our own bug and stops here."""
    after = DISK_MOVES[event].get(state)
    if after is None:
        raise AssertionError(f"{event.value}, and that can't be in state {state.value}")
    return after


class Allowed(NamedTuple):
    """A wish is granted; `warning` is what the operator must know, if anything."""

    rule: str
    warning: str | None = None


class Refused(NamedTuple):
    """A wish is not granted."""

    rule: str
    reason: str
    remedy: str

    def error(self) -> OperatorError:
        return OperatorError(self.reason, remedy=self.remedy)


Verdict = Allowed | Refused


@dataclass(frozen=True)
class Situation:
    """All that the tables of wishes look at."""

    role: Role
    disk: DiskState
    connection: ConnectionState
    peer_role: Role | None = None
    peer_disk: DiskState | None = None
    clients: int = 0
    force: bool = False
    discard: bool = False
    primary_left_in_order: bool = False

    @property
    def linked(self) -> bool:
        return self.connection in LINKED


# All that the rows of a table of wishes look at.
Wish = TypeVar("Wish")


class Row(NamedTuple, Generic[Wish]):
    """One row of a table of wishes: it answers when `fits` says so and no row above did."""

    fits: Callable[[Wish], bool]
    verdict: Verdict


OLD_PRIMARY_WARNING = (
    "the old primary must not be running any more: if it is, both sides move on and one side's changes will have to go"
)

STOPPED_PRIMARY_WARNING = (
    "the old primary was stopped in order and this replica has all that it had; if it was started again since, beyond "
    "the reach of this one, both sides move on and one side's changes will have to go"
)

PROMOTE: tuple[Row[Situation], ...] = (
    Row(
        lambda s: s.disk is _D.FAILED,
        Refused(
            "disk-failed",
            "this replica's disk is Failed",
            "promote the other replica; after repair `nbdmirror invalidate` this one",
        ),
    ),
    Row(
        lambda s: s.disk is _D.INCONSISTENT,
        Refused(
            "disk-inconsistent",
            "this replica is Inconsistent: a resync of it has not ended, so its contents are of no single moment",
            "let the resync end, or promote the other replica; --force does not help",
        ),
    ),
    Row(
        lambda s: s.linked and s.peer_role is Role.PRIMARY,
        Refused("peer-is-primary", "the peer is primary", "`nbdmirror switch` hands over, or demote the peer first"),
    ),
    Row(
        lambda s: s.connection is ConnectionState.SYNC_TARGET,
        Refused("sync-target", "this replica is being resynced from the peer", "wait for the resync to end"),
    ),
    Row(
        lambda s: s.connection is ConnectionState.HANDSHAKE,
        Refused("handshake", "the two replicas are just finding out which of them is newer", "try again in a moment"),
    ),
    Row(
        lambda s: s.disk is _D.OUTDATED and s.linked,
        Refused("outdated-linked", "this replica is Outdated and the newer one is connected", "promote the newer one"),
    ),
    Row(
        lambda s: s.disk is _D.OUTDATED and not s.force,
        Refused(
            "outdated",
            "this replica is Outdated: the other one has acknowledged writes that this one lacks",
            "promote the other one, or `promote --force` if it is lost: writes will be missing",
        ),
    ),
    Row(
        lambda s: s.disk is _D.OUTDATED,
        Allowed(
            "outdated-forced",
            "this replica is Outdated: acknowledged writes are missing from now on, and if the other replica comes "
            "back, one side's changes will have to go",
        ),
    ),
    Row(
        lambda s: s.disk is _D.CONSISTENT and s.primary_left_in_order,
        Allowed("primary-left-in-order", STOPPED_PRIMARY_WARNING),
    ),
    Row(lambda s: s.disk is _D.CONSISTENT, Allowed("cut-off-in-step", OLD_PRIMARY_WARNING)),
    Row(lambda s: s.linked, Allowed("linked")),
    Row(lambda _: True, Allowed("known-newest")),
)

DEMOTE: tuple[Row[Situation], ...] = (
    Row(lambda s: s.role is Role.SECONDARY, Allowed("already-secondary")),
    Row(
        lambda s: s.clients > 0 and not s.force,
        Refused(
            "clients-connected",
            "a client is connected",
            "disconnect it first, or `demote --force` cuts its connection",
        ),
    ),
    Row(
        lambda s: s.clients > 0,
        Allowed("clients-cut", "the connections of its clients are cut; their unanswered requests stay unanswered"),
    ),
    Row(lambda _: True, Allowed("demote")),
)

SWITCH: tuple[Row[Situation], ...] = (
    Row(
        lambda s: not s.linked,
        Refused("not-connected", "the peer is not connected", "connect them, or `promote` the one that is left"),
    ),
    Row(
        lambda s: s.connection is not ConnectionState.CONNECTED,
        Refused("resync-running", "a resync is running", "wait for it to end"),
    ),
    Row(
        lambda s: _D.FAILED in (s.disk, s.peer_disk),
        Refused(
            "disk-failed", "one replica's disk is Failed", "repair it, then `nbdmirror invalidate` it and let it resync"
        ),
    ),
    Row(
        lambda s: s.disk is not _D.UP_TO_DATE or s.peer_disk is not _D.UP_TO_DATE,
        Refused("not-in-step", "not both replicas are UpToDate", "wait until `nbdmirror status` says so"),
    ),
    Row(
        lambda s: s.role is s.peer_role,
        Refused("no-primary", "neither replica is primary", "`nbdmirror promote` the one that shall be"),
    ),
    Row(lambda _: True, Allowed("switch")),
)

CONNECT: tuple[Row[Situation], ...] = (
    Row(
        lambda s: s.discard and s.role is Role.PRIMARY,
        Refused("discard-on-primary", "a primary can't discard its data while it serves it", "demote it first"),
    ),
    Row(
        lambda s: s.discard and s.linked,
        Refused("discard-while-linked", "the replicas are connected, so there is nothing to discard", "leave it out"),
    ),
    Row(lambda s: s.linked, Allowed("already-connected")),
    Row(
        lambda s: s.disk is _D.FAILED,
        Refused("disk-failed", "this replica's disk is Failed", "after repair `nbdmirror invalidate` it"),
    ),
    Row(lambda s: s.discard, Allowed("connect-discard", "in a split brain this replica's own changes will be lost")),
    Row(lambda _: True, Allowed("connect")),
)

DISCONNECT: tuple[Row[Situation], ...] = (
    Row(lambda s: s.connection is ConnectionState.STANDALONE, Allowed("already-standalone")),
    Row(
        lambda s: s.connection is ConnectionState.SYNC_TARGET or s.disk is _D.INCONSISTENT,
        Allowed("disconnect-target", "this replica stays Inconsistent, and can't be promoted, until it is resynced"),
    ),
    Row(
        lambda s: s.linked and s.role is Role.PRIMARY,
        Allowed("disconnect-primary", "from now on writes are on this replica alone"),
    ),
    Row(lambda _: True, Allowed("disconnect")),
)

TABLES = {"promote": PROMOTE, "demote": DEMOTE, "switch": SWITCH, "connect": CONNECT, "disconnect": DISCONNECT}


def may_promote(
    disk: DiskState,
    connection: ConnectionState,
    peer_role: Role | None = None,
    force: bool = False,
    primary_left_in_order: bool = False,
) -> Verdict:
    """May a secondary become primary (invariant no-bad-primary)? Also asked at `serve --primary`."""
    situation = Situation(
        Role.SECONDARY, disk, connection, peer_role, force=force, primary_left_in_order=primary_left_in_order
    )
    return verdict_by(PROMOTE, situation)


def may_demote(role: Role, clients: int, force: bool = False) -> Verdict:
    """May a replica with this many connected clients stop being primary?"""
    return verdict_by(DEMOTE, Situation(role, _D.UP_TO_DATE, ConnectionState.STANDALONE, clients=clients, force=force))


def may_switch(
    role: Role,
    disk: DiskState,
    connection: ConnectionState,
    peer_role: Role | None,
    peer_disk: DiskState | None,
) -> Verdict:
    """May the two replicas swap their roles? The answer is the same on either side."""
    return verdict_by(SWITCH, Situation(role, disk, connection, peer_role, peer_disk))


def may_connect(role: Role, disk: DiskState, connection: ConnectionState, discard: bool = False) -> Verdict:
    """May a replica begin to look for its peer, and offer to give up its own changes?"""
    return verdict_by(CONNECT, Situation(role, disk, connection, discard=discard))


def may_disconnect(role: Role, disk: DiskState, connection: ConnectionState) -> Verdict:
    """May a replica leave its peer until it is told to connect?"""
    return verdict_by(DISCONNECT, Situation(role, disk, connection))


def verdict_by(table: tuple[Row[Wish], ...], wish: Wish) -> Verdict:
    """The first row that fits answers."""
    for row in table:
        if row.fits(wish):
            return row.verdict
    raise AssertionError("the last row of every table fits everything")
