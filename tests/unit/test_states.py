"""The tables of allowed moves, over every combination of what they look at."""

import itertools
from collections.abc import Iterator

import pytest

from mirror.core.errors import OperatorError
from mirror.core.states import (
    DISK_MOVES,
    LINKED,
    TABLES,
    Allowed,
    ConnectionState,
    DiskEvent,
    DiskState,
    Refused,
    Role,
    Situation,
    disk_after,
    may_connect,
    may_demote,
    may_disconnect,
    may_promote,
    may_switch,
)

STATES = list(itertools.product(DiskState, ConnectionState))


def situations() -> Iterator[Situation]:
    flags = itertools.product((False, True), repeat=3)
    for role, disk, connection, peer_role, peer_disk, clients, (force, discard, left) in itertools.product(
        Role, DiskState, ConnectionState, (None, *Role), (None, *DiskState), (0, 2), list(flags)
    ):
        yield Situation(role, disk, connection, peer_role, peer_disk, clients, force, discard, left)


@pytest.mark.parametrize("wish", TABLES)
def test_every_situation_has_an_answer_and_every_row_a_situation(wish: str) -> None:
    table = TABLES[wish]
    answers = {next(row.verdict for row in table if row.fits(situation)) for situation in situations()}
    assert answers == {row.verdict for row in table}
    assert len({row.verdict.rule for row in table}) == len(table)
    for verdict in answers:
        if isinstance(verdict, Refused):
            assert verdict.reason
            assert verdict.remedy


def test_no_bad_primary() -> None:
    flags = list(itertools.product((False, True), repeat=2))
    for (disk, connection), peer_role, (force, left) in itertools.product(STATES, (None, *Role), flags):
        verdict = may_promote(disk, connection, peer_role, force, left)
        if isinstance(verdict, Refused):
            continue
        assert disk not in (DiskState.INCONSISTENT, DiskState.FAILED)
        assert disk is not DiskState.OUTDATED or force
        assert not (connection in LINKED and peer_role is Role.PRIMARY)
        if disk in (DiskState.CONSISTENT, DiskState.OUTDATED):
            assert verdict.warning


@pytest.mark.parametrize(
    ("disk", "connection", "peer_role", "force", "rule"),
    [
        # The primary died: its secondary takes over at once, without --force, and says what it can't know.
        (DiskState.CONSISTENT, ConnectionState.CONNECTING, None, False, "cut-off-in-step"),
        (DiskState.CONSISTENT, ConnectionState.STANDALONE, None, False, "cut-off-in-step"),
        (DiskState.UP_TO_DATE, ConnectionState.CONNECTED, Role.SECONDARY, False, "linked"),
        (DiskState.UP_TO_DATE, ConnectionState.SYNC_SOURCE, Role.SECONDARY, False, "linked"),
        (DiskState.UP_TO_DATE, ConnectionState.STANDALONE, None, False, "known-newest"),
        (DiskState.UP_TO_DATE, ConnectionState.CONNECTED, Role.PRIMARY, True, "peer-is-primary"),
        (DiskState.OUTDATED, ConnectionState.CONNECTING, None, False, "outdated"),
        (DiskState.OUTDATED, ConnectionState.CONNECTING, None, True, "outdated-forced"),
        (DiskState.INCONSISTENT, ConnectionState.SYNC_TARGET, Role.SECONDARY, True, "disk-inconsistent"),
        (DiskState.INCONSISTENT, ConnectionState.CONNECTING, None, True, "disk-inconsistent"),
        (DiskState.FAILED, ConnectionState.CONNECTING, None, True, "disk-failed"),
        (DiskState.CONSISTENT, ConnectionState.HANDSHAKE, None, True, "handshake"),
    ],
)
def test_promotion(
    disk: DiskState, connection: ConnectionState, peer_role: Role | None, force: bool, rule: str
) -> None:
    assert may_promote(disk, connection, peer_role, force).rule == rule


def test_a_primary_that_left_in_order_is_warned_of_more_gently() -> None:
    apart = ConnectionState.CONNECTING
    left = may_promote(DiskState.CONSISTENT, apart, primary_left_in_order=True)
    assert isinstance(left, Allowed)
    assert left.rule == "primary-left-in-order"
    assert "stopped in order" in (left.warning or "")
    assert may_promote(DiskState.OUTDATED, apart, primary_left_in_order=True).rule == "outdated"


def test_demotion_does_not_cut_clients_unasked() -> None:
    assert isinstance(may_demote(Role.PRIMARY, clients=1), Refused)
    assert may_demote(Role.PRIMARY, clients=1, force=True) == Allowed(
        "clients-cut", "the connections of its clients are cut; their unanswered requests stay unanswered"
    )
    assert may_demote(Role.PRIMARY, clients=0) == Allowed("demote")
    assert may_demote(Role.SECONDARY, clients=0) == Allowed("already-secondary")


def test_a_switch_is_answered_alike_on_both_sides() -> None:
    for connection, mine, theirs in itertools.product(ConnectionState, DiskState, DiskState):
        one = may_switch(Role.PRIMARY, mine, connection, Role.SECONDARY, theirs)
        other = may_switch(Role.SECONDARY, theirs, connection, Role.PRIMARY, mine)
        assert one == other
        in_step = connection is ConnectionState.CONNECTED and mine is theirs is DiskState.UP_TO_DATE
        assert isinstance(one, Allowed) is in_step
    up = DiskState.UP_TO_DATE
    assert may_switch(Role.SECONDARY, up, ConnectionState.CONNECTED, Role.SECONDARY, up).rule == "no-primary"


def test_connect_and_disconnect() -> None:
    up, apart, linked = DiskState.UP_TO_DATE, ConnectionState.STANDALONE, ConnectionState.CONNECTED
    assert may_connect(Role.SECONDARY, up, apart).rule == "connect"
    assert may_connect(Role.SECONDARY, up, linked).rule == "already-connected"
    assert may_connect(Role.PRIMARY, up, apart, discard=True).rule == "discard-on-primary"
    assert may_connect(Role.SECONDARY, up, linked, discard=True).rule == "discard-while-linked"
    assert may_connect(Role.SECONDARY, up, apart, discard=True).rule == "connect-discard"
    assert may_connect(Role.SECONDARY, DiskState.FAILED, apart).rule == "disk-failed"
    assert may_disconnect(Role.PRIMARY, up, linked).rule == "disconnect-primary"
    assert may_disconnect(Role.SECONDARY, up, linked).rule == "disconnect"
    target = may_disconnect(Role.SECONDARY, DiskState.INCONSISTENT, ConnectionState.SYNC_TARGET)
    assert target.rule == "disconnect-target"
    assert may_disconnect(Role.SECONDARY, up, apart).rule == "already-standalone"


def test_a_refusal_becomes_the_operators_error() -> None:
    refused = may_promote(DiskState.FAILED, ConnectionState.STANDALONE)
    assert isinstance(refused, Refused)
    error = refused.error()
    assert isinstance(error, OperatorError)
    assert (error.message, error.remedy) == (refused.reason, refused.remedy)


# What may happen to any disk in any state, whatever the rest of the program does.
UNAVOIDABLE = (DiskEvent.CUT_OFF, DiskEvent.PEER_MOVED_ON, DiskEvent.DEVICE_FAILED, DiskEvent.INVALIDATED)


def test_facts_have_a_row_in_every_state_that_they_can_meet() -> None:
    assert set(DISK_MOVES) == set(DiskEvent)
    for event in UNAVOIDABLE:
        assert set(DISK_MOVES[event]) == set(DiskState)
    for sound in (DiskState.UP_TO_DATE, DiskState.CONSISTENT, DiskState.OUTDATED):
        assert disk_after(DiskEvent.PEER_MOVED_ON, sound) is DiskState.OUTDATED


def test_a_copy_becomes_better_only_by_what_makes_it_better() -> None:
    for event, moves in DISK_MOVES.items():
        for before, after in moves.items():
            if before is DiskState.FAILED and after is not DiskState.FAILED:
                assert event is DiskEvent.INVALIDATED
            if before is DiskState.INCONSISTENT and after is not DiskState.INCONSISTENT:
                assert event in (DiskEvent.SYNC_TARGET_ENDED, DiskEvent.DEVICE_FAILED)
            if before is DiskState.OUTDATED and after in (DiskState.UP_TO_DATE, DiskState.CONSISTENT):
                assert event in (DiskEvent.IN_STEP, DiskEvent.PROMOTED)
            if after is DiskState.CONSISTENT:
                assert event is DiskEvent.CUT_OFF


@pytest.mark.parametrize(
    ("event", "state"),
    [
        (DiskEvent.SYNC_TARGET_BEGAN, DiskState.FAILED),
        (DiskEvent.SYNC_TARGET_ENDED, DiskState.UP_TO_DATE),
        (DiskEvent.IN_STEP, DiskState.INCONSISTENT),
        (DiskEvent.PROMOTED, DiskState.INCONSISTENT),
        (DiskEvent.PROMOTED, DiskState.FAILED),
    ],
)
def test_what_can_not_be_is_our_own_bug(event: DiskEvent, state: DiskState) -> None:
    with pytest.raises(AssertionError, match=state.value):
        disk_after(event, state)


def test_a_life_of_a_secondary() -> None:
    state = DiskState.UP_TO_DATE
    for event, after in (
        (DiskEvent.CUT_OFF, DiskState.CONSISTENT),
        (DiskEvent.PEER_MOVED_ON, DiskState.OUTDATED),
        (DiskEvent.SYNC_TARGET_BEGAN, DiskState.INCONSISTENT),
        (DiskEvent.CUT_OFF, DiskState.INCONSISTENT),
        (DiskEvent.SYNC_TARGET_ENDED, DiskState.UP_TO_DATE),
        (DiskEvent.DEVICE_FAILED, DiskState.FAILED),
        (DiskEvent.INVALIDATED, DiskState.INCONSISTENT),
    ):
        state = disk_after(event, state)
        assert state is after
