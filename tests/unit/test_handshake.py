"""What a replica believes of what its peer says: handshake, control messages, requests."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cli import offline
from mirror import handshake
from mirror.core import layout
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import LinkLost, MirrorError, ProtocolError
from mirror.core.generation import Action, Kind, Outcome, Standing
from mirror.core.layout import Geometry, encode_map_page
from mirror.core.limits import EXTENT_BYTES, EXTENTS_PER_PAGE, HISTORY_MAX
from mirror.core.policy import REFUSE_ALWAYS
from mirror.core.states import DiskState, Role
from mirror.core.wire import SESSION_VERSION, SESSION_VERSION_MIN, Flag, MessageType
from mirror.handshake import Plan, Refusal, decode_standing, encode_standing, parse_hello
from mirror.replica import FORGOTTEN
from mirror.runtime import Runtime
from nbd_server.volume import StartOptions, Volume
from tests.pair import (
    PATIENCE_S,
    SIZE_BYTES,
    create,
    cut_until_in_step,
    free_port,
    pair,
    peer_of,
    serve,
    session_of,
    stop,
    wait_ended,
    wait_in_step,
)

STANDING = Standing(
    replica_id=bytes(range(16)),
    volume_id=bytes(16),
    name="vol",
    size_bytes=1 << 20,
    next_size_bytes=1 << 21,
    kind=Kind.ESTABLISHED,
    role=Role.SECONDARY,
    disk=DiskState.UP_TO_DATE,
    current=2**64 - 1,
    base=3,
    history=(3, 2),
    crashed_primary=False,
    kept_memory=True,
    dirty_blocks=7,
    met_peer=True,
    discard_my_data=False,
)


def hello(**changes: Any) -> bytes:
    message = {
        **handshake.VERSIONS,
        "standing": encode_standing(STANDING),
        "features": {"protocol": "C", "can_fast_zero": True},
        "session": 9,
    }
    return json.dumps({**message, **changes}).encode()


# -- the first message ------------------------------------------------------------------------------------------------


def test_a_standing_comes_back_as_it_went() -> None:
    assert decode_standing(json.loads(json.dumps(encode_standing(STANDING)))) == STANDING


@pytest.mark.parametrize("value", [None, -1, "4096", 1.5, True])
def test_a_next_size_is_a_number_and_an_older_peer_has_none(value: object) -> None:
    fields = encode_standing(STANDING)
    with pytest.raises(ProtocolError):
        decode_standing({**fields, "next_size_bytes": value})
    del fields["next_size_bytes"]
    assert decode_standing(fields).next_size_bytes == 0


def test_what_a_newer_release_adds_to_a_standing_is_passed_over() -> None:
    assert decode_standing({**encode_standing(STANDING), "leases": [1, 2]}) == STANDING


@pytest.mark.parametrize(
    "changes",
    [
        {"replica_id": "00"},
        {"replica_id": 7},
        {"replica_id": "zz" * 16},
        {"volume_id": None},
        {"name": ""},
        {"name": ["vol"]},
        {"name": "two\nlines"},
        {"name": "n" * 64},
        {"size_bytes": -1},
        {"size_bytes": "1048576"},
        {"size_bytes": 1.5},
        {"kind": "other"},
        {"kind": {}},
        {"role": None},
        {"disk": []},
        {"current": 1 << 64},
        {"base": True},
        {"history": "12"},
        {"history": {"1": 2}},
        {"history": [0]},
        {"history": [1] * (HISTORY_MAX + 1)},
        {"crashed_primary": 1},
        {"kept_memory": "false"},
        {"dirty_blocks": None},
        {"met_peer": []},
        {"discard_my_data": 0},
    ],
    ids=str,
)
def test_a_standing_that_cannot_be_right_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        decode_standing({**encode_standing(STANDING), **changes})
    missing = encode_standing(STANDING)
    for key in changes:
        del missing[key]
    with pytest.raises(ProtocolError):
        decode_standing(missing)


# -- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("newest", "oldest", "rule"),
    [
        (SESSION_VERSION, SESSION_VERSION_MIN, None),
        (SESSION_VERSION + 1, SESSION_VERSION, None),
        (SESSION_VERSION + 5, 1, None),
        (SESSION_VERSION + 1, SESSION_VERSION + 1, "peer-too-new"),
        (65535, 65535, "peer-too-new"),
        (SESSION_VERSION_MIN - 1, 1, "peer-too-old"),
    ],
)
def test_a_peer_that_shares_no_version_is_refused_by_name(newest: int, oldest: int, rule: str | None) -> None:
    # Nothing else of such a message can be believed, so it need not even be readable.
    raw = hello(version=newest, version_min=oldest, **({"standing": "of another release"} if rule else {}))
    if rule is None:
        assert parse_hello(raw)[0] == STANDING
        return
    with pytest.raises(Refusal) as caught:
        parse_hello(raw)
    assert caught.value.outcome.rule == rule
    assert str(newest) in str(caught.value)
    assert str(SESSION_VERSION) in str(caught.value)
    assert "upgrade" in caught.value.remedy


def test_a_peer_that_names_no_version_speaks_the_first() -> None:
    message = json.loads(hello())
    del message["version"], message["version_min"]
    with pytest.raises(Refusal) as caught:
        parse_hello(json.dumps(message).encode())
    assert caught.value.outcome.rule == "peer-too-old"


@pytest.mark.parametrize("versions", [(2, 3), (0, 0), ("2", 2), (2.0, 2), (True, True), (65536, 1), (None, 1)])
def test_versions_that_cannot_be_right_are_refused(versions: tuple[Any, Any]) -> None:
    with pytest.raises(ProtocolError):
        parse_hello(hello(version=versions[0], version_min=versions[1]))


def test_two_replicas_of_different_versions_say_so_on_both_sides(tmp_path: Path) -> None:
    """Whoever dials: each learns by the first message what the other one speaks, and stays apart."""
    newer = {"version": SESSION_VERSION + 1, "version_min": SESSION_VERSION + 1}
    ports = free_port(), free_port()
    create(tmp_path / "a", ports[0], ports[1])
    create(tmp_path / "b", ports[1], ports[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handshake, "VERSIONS", newer)
        first = serve(tmp_path / "a")
        second = serve(tmp_path / "b")
        try:
            for volume in (first, second):
                peer = peer_of(volume)
                with peer.changed:
                    assert peer.changed.wait_for(lambda: "peer-too-new" in peer.reason, 10), peer.reason  # noqa: B023
        finally:
            stop(first)
            stop(second)


# -- control messages of a session ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        {"op": "state"},
        {"op": "state", "role": "king", "disk": "UpToDate"},
        {"op": "state", "role": ["primary"], "disk": {}},
        {"op": "sync_progress", "done_bytes": "many"},
        {"op": "sync_progress", "eta_s": -1},
        {"op": "sync_finished", "request": 1},
        {"op": "sync_finished", "request": 1, "current": 5, "history": [0]},
        {"op": "sync_finished", "request": 1, "current": 5, "history": [1] * 17},
        {"op": "sync_finished", "request": 1, "current": 0, "history": []},
        {"op": "sync_finished", "request": 1, "current": 5, "history": [], "result": {"a": [1]}},
        {"op": "sync_finished", "request": 1, "current": 5, "history": [], "result": {"a": "x" * 600}},
        {"op": "sync_finished", "request": 1, "current": 5, "history": [], "result": "done"},
        {"op": "primary_disk_failed", "request": 1},
        {"op": "primary_disk_failed", "request": 1, "generation": "5"},
        {"op": "primary_disk_failed", "request": 1, "generation": 1 << 64},
        {"answer": [1]},
        {"answer": {"a": 1}},
        {"answer": 1.5},
    ],
    ids=str,
)
def test_a_control_message_that_cannot_be_read_ends_the_session(tmp_path: Path, message: dict[str, Any]) -> None:
    with pair(tmp_path) as (first, second):
        before = second._replica.superblock
        # The one that would come after it is refused for another reason: the session is over.
        peer_of(first)._wanted = peer_of(second)._wanted = False
        sessions = session_of(first), session_of(second)
        sessions[0]._send_control(message)
        assert wait_ended(second, sessions[1])
        wait_ended(first, sessions[0])
        assert second._replica.superblock.current == before.current
        assert second._replica.superblock.disk is DiskState.UP_TO_DATE


def test_a_request_that_nobody_knows_is_answered_and_the_session_goes_on(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, _):
        session = session_of(first)
        with pytest.raises(MirrorError, match="unknown request"):
            session.request("make_coffee", 5.0)
        assert session.request("are_you_there", 5.0)


# -- requests on data streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (MessageType.SUMS, {"offset": 0, "length": 100}),
        (MessageType.SUMS, {"offset": 512, "length": 4096}),
        (MessageType.WRITE, {"offset": 0, "length": 4096, "payload": b"short"}),
        (MessageType.WRITE, {"offset": SIZE_BYTES, "length": 1, "payload": b"x"}),
        (MessageType.WRITE, {"offset": 1 << 63, "length": 1, "payload": b"x"}),
        (MessageType.WRITE, {"flags": Flag.LZ4, "offset": 0, "length": 4096, "payload": b"\xff" * 40}),
        (MessageType.WRITE, {"flags": Flag.LZ4, "offset": 0, "length": 4096, "payload": b"\x10a"}),
        (MessageType.WRITE, {"flags": Flag.LZ4, "offset": 0, "length": 0, "payload": b""}),
        (MessageType.WRITE, {"flags": Flag.LZ4, "offset": 0, "length": 1, "payload": b"\x10a"}),
        (MessageType.ZERO, {"offset": 0, "length": SIZE_BYTES + 1}),
        (MessageType.READ, {"offset": SIZE_BYTES - 1, "length": 2}),
        (MessageType.ANSWER, {}),
        (MessageType.HELLO, {}),
        (MessageType.CONTROL, {"payload": b"{}"}),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_right_ends_the_session(
    tmp_path: Path, kind: MessageType, fields: dict[str, Any]
) -> None:
    with pair(tmp_path) as (first, second):
        peer_of(first)._wanted = peer_of(second)._wanted = False
        sessions = session_of(first), session_of(second)
        stream = sessions[0].borrow()
        stream.send(kind, **fields)
        with pytest.raises(LinkLost):
            stream.receive()
        wait_ended(second, sessions[1])
        wait_ended(first, sessions[0])
        assert (tmp_path / "b" / "data").read_bytes() == bytes(SIZE_BYTES)


def test_a_request_behind_one_that_waits_for_the_disk_ends_the_session_and_changes_none_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pair(tmp_path) as (first, second):
        peer_of(first)._wanted = peer_of(second)._wanted = False
        held, release = threading.Event(), threading.Event()
        really_flush = second._replica.store.flush

        def flush() -> None:
            held.set()
            assert release.wait(10)
            really_flush()

        monkeypatch.setattr(second._replica.store, "flush", flush)
        sessions = session_of(first), session_of(second)
        stream = sessions[0].borrow()
        stream.send(MessageType.FLUSH)
        assert held.wait(10)
        stream.send(MessageType.WRITE, offset=0, length=1, payload=b"x")
        with pytest.raises(LinkLost):
            stream.receive()
        release.set()
        assert "to be awaited" in wait_ended(second, sessions[1])
        assert (tmp_path / "b" / "data").read_bytes() == bytes(SIZE_BYTES)


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_what_is_no_answer_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    with pair(tmp_path, protocol) as (first, second):
        peer_of(first)._wanted = peer_of(second)._wanted = False
        sessions = session_of(first), session_of(second)
        for stream in sessions[1].incoming:
            monkeypatch.setattr(stream, "send", lambda *_, send=stream.send, **__: send(MessageType.HEARTBEAT))
        first.write(memoryview(bytes(4096)), 0, False)
        first.flush()
        assert "answer was due" in wait_ended(first, sessions[0])
        # The client's data is here alone, and that is on record.
        assert first._replica.superblock.peer_disk is DiskState.OUTDATED


@pytest.mark.parametrize("started", [None, "then", 1e300, -1, True, 10**30])
def test_a_result_of_a_resync_that_says_nothing_sensible_can_be_shown(tmp_path: Path, started: object) -> None:
    """It is the source's word, and durable: a status that fails on it would fail for ever."""
    result = {} if started is None else {"started": started}
    with pair(tmp_path) as (first, second):
        session_of(first).request(
            "sync_finished", 5.0, current=first._replica.superblock.current, history=[], result=result
        )
        assert second._replica.superblock.last_resync == result
        assert "started" in second.status()["last_resync"]


# -- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "their_map",
    [
        None,
        "some",
        {"0": "1"},
        [[0]],
        [[0, "1", 2]],
        [[1.0, "1"]],
        [[0.5, "1"]],
        [[True, "1"]],
        [["0", "1"]],
        [[2, "1"]],
        [[-1, "1"]],
        [[0, "-1"]],
        [[0, 1]],
        [[0, "zz"]],
        [[0, "1" + "0" * 257]],
        [[0, None]],
        [5],
        [None],
    ],
    ids=str,
)
def test_a_map_that_cannot_be_right_is_refused_and_leaves_the_own_one_sound(tmp_path: Path, their_map: object) -> None:
    create(tmp_path / "a", 7000, 7001, size_bytes=2 * EXTENT_BYTES)
    volume = Volume.open(tmp_path / "a", StartOptions(), Runtime(), lambda: None)
    mine = handshake.standing(volume._replica, False, REFUSE_ALWAYS)
    plan = Plan(Outcome("behind", Action.SOURCE_BITMAP, ""), mine, mine, 7)
    dirty: DirtyMap = volume._replica.dirty
    for message in ({"map": their_map}, {"map": [], "suspects": their_map}):
        with pytest.raises(ProtocolError):
            handshake._select(volume._replica, plan, message)
    assert volume._replica.dirty is dirty
    assert all(type(extent) is int for extent in dirty.extents())
    assert dirty.dirty_blocks == sum(dirty.bits(extent).bit_count() for extent in range(2))
    volume._replica.persist_map()
    volume._replica.store.close()


def test_a_sound_map_page_that_names_blocks_behind_the_volume_is_damage(tmp_path: Path) -> None:
    create(tmp_path / "a", 7000, 7001, size_bytes=EXTENT_BYTES + 4096)
    geometry = Geometry(EXTENT_BYTES + 4096)
    for bits in ([0, 2], [0, 0, 1], [0] * (EXTENTS_PER_PAGE - 1) + [1]):
        with (tmp_path / "a" / "meta").open("r+b") as file:
            file.seek(geometry.map_page_offset(0))
            file.write(encode_map_page(0, bits))
        assert [*offline.read(tmp_path / "a").body.damaged_pages] == [0]  # type: ignore[union-attr]
        volume = Volume.open(tmp_path / "a", StartOptions(), Runtime(), lambda: None)
        # Whatever is in doubt is dirty: all of the volume that this page holds.
        assert volume._replica.dirty.dirty_bytes == EXTENT_BYTES + 4096
        assert any("can't be read" in note for note in volume._notes)
        volume._replica.store.close()


def test_a_source_is_stable_before_its_target_gives_up_what_only_it_may_remember(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pair(tmp_path) as (first, second):
        first.write(memoryview(b"!" * 4096), 0, False)
        done: list[str] = []
        flush, update = first._replica.store.flush, second._replica.update

        def noted_flush() -> None:
            flush()
            done.append("source flushed")

        def noted_update(**changes: Any) -> None:
            if changes.get("disk") is DiskState.INCONSISTENT:
                done.append("target Inconsistent")
            update(**changes)

        monkeypatch.setattr(first._replica.store, "flush", noted_flush)
        monkeypatch.setattr(second._replica, "update", noted_update)
        cut_until_in_step(first, second)
        assert "target Inconsistent" in done
        assert done.index("source flushed") < done.index("target Inconsistent")


def test_what_is_held_against_a_source_is_forgotten_before_its_target_may_answer_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last record of the source is late. A target that is promoted before it, and loses its power, must not win as
    the one that forgot nothing; one that is killed must not lose to the one that crashed as primary earlier."""
    with pair(tmp_path) as (first, second):
        source, target = first._replica, second._replica
        first.write(memoryview(b"!" * 4096), 0, False)
        first.demote(False)
        done: list[tuple[DiskState, tuple[bool, bool], tuple[bool, bool]]] = []
        write = target.store.write_superblock

        def noted_write(encoded: bytes) -> None:
            write(encoded)
            disk, known, said = layout.decode_superblock(encoded).disk, source.superblock, peer_of(first).standing()
            if not done or disk is not done[-1][0]:
                durable = known.boot_id == FORGOTTEN, known.primary
                done.append((disk, durable, (not said.kept_memory, said.crashed_primary)))

        source.update(boot_id=FORGOTTEN, primary=True)
        source.kept_memory, source.crashed_primary = False, True
        target.update(disk=DiskState.OUTDATED)
        monkeypatch.setattr(target.store, "write_superblock", noted_write)
        cut_until_in_step(first, second)
        held_against, nothing = (True, True), (False, False)
        assert done == [
            (DiskState.INCONSISTENT, held_against, held_against),
            (DiskState.UP_TO_DATE, nothing, nothing),
        ]


@pytest.mark.parametrize("move", ["promote", "demote"])
def test_a_role_that_changes_as_the_end_of_a_resync_is_recorded_stays_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: str
) -> None:
    """Whichever of the two records of the source comes last, it names the role that the source has."""
    with pair(tmp_path) as (first, second):
        source, target = first._replica, second._replica
        if move == "promote":
            first.demote(False)
        recording, changed = threading.Event(), threading.Event()
        boot_id = source.runtime.boot_id

        def slow_boot_id() -> bytes:
            if target.disk_state(connected=True) is DiskState.UP_TO_DATE:
                recording.set()
                changed.wait(0.5)
            return boot_id()

        monkeypatch.setattr(source.runtime, "boot_id", slow_boot_id)
        session = session_of(first)
        target.update(disk=DiskState.OUTDATED)
        session.end("a cut, for the test")
        wait_ended(first, session)
        assert recording.wait(PATIENCE_S)
        (first.promote if move == "promote" else first.demote)(False)
        changed.set()
        wait_in_step(first)
        assert source.role is (Role.PRIMARY if move == "promote" else Role.SECONDARY)
        assert source.superblock.primary is (source.role is Role.PRIMARY)
        assert not source.crashed_primary


def test_a_disk_that_hangs_holds_nobody_else_up_however_often_the_peer_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write hangs here that the peer has carried out; the session ends, and each handshake waits for that write."""
    with pair(tmp_path) as (first, second):
        block, hangs, released = memoryview(b"!" * 4096), threading.Event(), threading.Event()
        write, end_s = first._replica.store.write, time.monotonic() + PATIENCE_S
        # A comparison of what the write holds would hold the end of the session up.
        while (proof := first.status()["proof"]) is None or proof["state"] != "proven" or proof["rest_left_bytes"]:
            assert time.monotonic() < end_s
            released.wait(0.02)

        def stuck_write(data: memoryview, offset: int, *how: bool) -> None:
            if not offset:
                hangs.set()
                released.wait(PATIENCE_S)
            write(data, offset, *how)

        monkeypatch.setattr(first._replica.store, "write", stuck_write)
        stuck = threading.Thread(target=first.write, args=(block, 0, False))
        stuck.start()
        assert hangs.wait(PATIENCE_S)
        session = session_of(first)
        session.end("a cut, for the test")
        wait_ended(first, session)
        longest_s = 0.0
        while peer_of(first).retry.backoff.failures < 2 and time.monotonic() < end_s:
            begun_s = time.monotonic()
            first.write(block, SIZE_BYTES // 2, False)
            longest_s = max(longest_s, time.monotonic() - begun_s)
        assert peer_of(first).retry.backoff.failures >= 2
        assert longest_s < 0.5
        released.set()
        stuck.join(PATIENCE_S)
        peer_of(first).connect(False)
        wait_in_step(first)
        wait_in_step(second)
