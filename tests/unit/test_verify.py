"""Verify, repair and proof on two live replicas in this process: what is found, what is kept, what is cleared."""

import errno
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from cli import offline
from mirror import compare
from mirror.core.errors import DeviceError, OperatorError
from mirror.core.limits import BLOCK_BYTES, EXTENT_BYTES
from mirror.core.states import DiskState
from mirror.verify_run import Run
from nbd_server.config import load
from nbd_server.status import iso_time
from nbd_server.volume import Volume
from tests.pair import (
    SIZE_BYTES,
    cut_until_in_step,
    pair,
    peer_of,
    serve,
    session_of,
    wait_ended,
    wait_in_step,
    wait_until,
)

BLOCK = bytes(range(256)) * 16
OTHER = BLOCK[::-1]


def verify(volume: Volume, **wish: Any) -> dict[str, Any]:
    """Run one verify to its end."""

    def progress() -> dict[str, Any]:
        run: dict[str, Any] = volume._command({"command": "verify", "act": "progress"})["run"]
        return run

    volume._command({"command": "verify", "act": "start", **wish})
    wait_until(lambda: progress()["state"] != "running")
    return progress()


def flip(directory: Path, name: str, offset: int) -> None:
    """A byte of a data file changes under the replica's feet."""
    with (directory / name / "data").open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))


def suspects(volume: Volume) -> list[list[int]]:
    ranges: list[list[int]] = volume.status()["suspects"]["ranges"]
    return ranges


def same(directory: Path) -> bool:
    a, b = ((directory / name / "data").read_bytes() for name in "ab")
    return a == b


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_flipped_byte_is_found_kept_on_both_and_repaired_from_either_side(tmp_path: Path, side: str) -> None:
    with pair(tmp_path) as (first, second):
        first.write(memoryview(BLOCK * 4), 0, False)
        assert verify(first)["result"] == "equal"
        flip(tmp_path, side, 5000)
        flip(tmp_path, side, SIZE_BYTES - 1)
        run = verify(first)
        expected = [[4096, 4096], [SIZE_BYTES - 4096, 4096]]
        assert (run["result"], run["ranges"], run["differing_bytes"]) == ("differs", expected, 8192)
        for volume in (first, second):
            assert suspects(volume) == expected
            assert any("suspect" in warning for warning in volume.status()["warnings"])
            assert volume.status()["last_verify"]["result"] == "differs"
        # By the word that the untouched side is right.
        run = verify(second, repair="secondary" if side == "a" else "primary")
        assert (run["result"], run["repaired_bytes"]) == ("repaired", 8192)
        assert same(tmp_path)
        assert (tmp_path / "a" / "data").read_bytes()[:16384] == BLOCK * 4
        assert suspects(first) == suspects(second) == []
        assert verify(first)["result"] == "equal"


def test_the_side_that_is_named_counts_also_when_it_is_the_flipped_one(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, _):
        flip(tmp_path, "b", 5000)
        assert verify(first, repair="secondary")["result"] == "repaired"
        assert (tmp_path / "a" / "data").read_bytes()[5000] == 1
        assert same(tmp_path)


def test_suspects_alone_are_repaired_without_a_look_at_the_rest(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        flip(tmp_path, "b", 0)
        verify(first)
        last = first.status()["last_verify"]
        run = verify(first, repair="primary", suspects_only=True)
        assert (run["result"], run["done_bytes"]) == ("repaired", 4096)
        assert same(tmp_path)
        assert suspects(first) == suspects(second) == []
        assert first.status()["last_verify"] == last, "it says nothing of the volume"


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_writers_are_no_false_alarm(tmp_path: Path, protocol: str) -> None:
    with pair(tmp_path, protocol) as (first, second):
        ended = threading.Event()
        wrote = [0] * 3

        def write(number: int) -> None:
            random_numbers = random.Random(number)
            while not ended.is_set():
                at = random_numbers.randrange(64) * 2048
                first.write(memoryview(random_numbers.randbytes(6000)), at, False)
                wrote[number] += 1

        threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                run = verify(first)
                assert (run["result"], run["differing_bytes"]) == ("equal", 0)
            for _ in range(5):
                assert verify(first, repair="secondary")["result"] == "equal"
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert min(wrote) > 0
        first.flush()
        assert suspects(first) == suspects(second) == []
        assert same(tmp_path)


def test_without_the_range_lock_writers_would_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard that the test above rests on: the write lands between the two digests."""
    with pair(tmp_path) as (first, _):
        monkeypatch.setattr(first._primary, "lock_range", lambda offset, length: None)
        monkeypatch.setattr(first._primary, "unlock_range", lambda ticket: None)
        read = first._replica.store.read
        writes = [BLOCK]

        def read_late(length: int, offset: int) -> bytes:
            content = read(length, offset)
            if writes:
                first.write(memoryview(writes.pop()), 0, False)
            session_of(first).request("are_you_there", 5.0)
            return content

        sums = compare.resync.block_sums
        monkeypatch.setattr(first._replica.store, "read", read_late)
        # The peer is asked after the write.
        stream_send = compare.Comparer._answer

        def answer_late(self: Any, stream: Any, verb: str, offset: int) -> memoryview:
            stream_send(self, stream, verb, offset)
            stream.send(compare.MessageType.SUMS, compare.Flag.RESYNC, offset, 1 << 20)
            return stream_send(self, stream, verb, offset)

        monkeypatch.setattr(compare.Comparer, "_answer", answer_late)
        assert sums(BLOCK)
        assert verify(first)["differing_bytes"] > 0


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_a_client_that_writes_the_whole_block_again_clears_it(tmp_path: Path, protocol: str) -> None:
    with pair(tmp_path, protocol) as (first, second):
        first.write(memoryview(BLOCK * 8), 0, False)
        first.flush()
        for block in range(5):
            flip(tmp_path, "b", block * BLOCK_BYTES)
        verify(first)
        assert suspects(first) == [[0, 5 * BLOCK_BYTES]]
        first.write(memoryview(OTHER), 0, False)
        first.zero(BLOCK_BYTES, BLOCK_BYTES, True, False, False)
        first.trim(2 * BLOCK_BYTES, BLOCK_BYTES, False)
        # Not the whole block.
        first.write(memoryview(OTHER[1:]), 3 * BLOCK_BYTES + 1, False)
        first.flush()
        wait_until(lambda: suspects(first) == [[3 * BLOCK_BYTES, 2 * BLOCK_BYTES]])
        assert suspects(second) == suspects(first)


def test_a_write_that_may_be_lost_clears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair(tmp_path) as (first, second):
        flip(tmp_path, "b", 0)
        verify(first)
        # No round ends before the link is lost.
        flushes = first._primary.flushes
        monkeypatch.setattr(flushes, "run_round", lambda: None)
        first.write(memoryview(BLOCK), 0, False)
        first.disconnect()
        monkeypatch.undo()
        first.connect(False)
        wait_in_step(first)
        wait_in_step(second)
        first.flush()
        wait_until(lambda: first.status()["proof"]["state"] == "proven")
        assert suspects(first) == suspects(second) == [[0, 4096]]


def contents(tmp_path: Path) -> tuple[bytes, bytes]:
    a, b = ((tmp_path / name / "data").read_bytes() for name in "ab")
    return a, b


def come_together(first: Volume, second: Volume) -> None:
    first.connect(False)
    wait_in_step(first)
    wait_in_step(second)
    wait_until(lambda: first.status()["proof"]["state"] == "proven")


def test_a_resync_brings_of_a_suspect_block_what_the_client_wrote_and_no_more(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        first.write(memoryview(BLOCK * 5), 0, False)
        first.flush()
        for block in range(5):
            flip(tmp_path, "b", block * 4096)
        verify(first)
        first.disconnect()
        first.write(memoryview(b"!" * 100), 50, False)  # a part
        first.write(memoryview(b"?" * 4096), 2 * 4096 - 96, False)  # a part of the second one, most of the third
        first.write(memoryview(OTHER), 3 * 4096, False)  # all of the fourth
        # In pieces all of the fifth.
        first.zero(4 * 4096 + 1000, 3096, False, False, False)
        first.write(memoryview(b"#" * 1000), 4 * 4096, False)
        come_together(first, second)
        assert suspects(first) == suspects(second) == [[0, 3 * 4096]]
        a, b = contents(tmp_path)
        assert b[50:150] == b"!" * 100
        assert b[2 * 4096 - 96 : 3 * 4096 - 96] == b"?" * 4096
        assert b[3 * 4096 : 5 * 4096] == OTHER + b"#" * 1000 + bytes(3096)
        differing = [at for at in range(SIZE_BYTES) if a[at] != b[at]]
        # The flipped byte of the third block was overwritten.
        assert differing == [0, 4096]
        assert first._replica.superblock.suspect_parts == ()


def test_a_part_counts_as_a_change_also_while_no_map_names_it(tmp_path: Path) -> None:
    """What is told, and what a policy that gives way without changes goes by."""
    with pair(tmp_path) as (first, second):
        flip(tmp_path, "b", 0)
        verify(first)
        first.disconnect()
        first.write(memoryview(b"!" * 100), 50, False)
        with first._replica.books:
            # As a handshake leaves it that is cut off behind the source's part of it.
            first._replica.dirty.remove(first._replica.suspects.found)
        assert first.status()["dirty_bytes"] == 4096
        assert peer_of(first).standing().dirty_blocks == 1
        assert list(first._replica.own_map().runs()) == [(0, 4096)]
        come_together(first, second)
        assert first.status()["dirty_bytes"] == 0
        assert contents(tmp_path)[1][50:150] == b"!" * 100


def test_after_a_crash_the_suspects_of_the_log_are_left_alone(tmp_path: Path) -> None:
    """Every extent of the log is dirty then, and the side that is the source must not decide (it may be bad)."""
    with pair(tmp_path) as (first, second):
        first.write(memoryview(BLOCK * 2), 0, False)
        first.flush()
        flip(tmp_path, "b", 0)
        verify(first)
        before = contents(tmp_path)
        for side in (first, second):
            with side._replica.books:
                side._replica.dirty.mark_extent(0)
        first.disconnect()
        come_together(first, second)
        assert first.status()["last_resync"]["dirty_bytes"] == EXTENT_BYTES - 4096
        assert suspects(first) == suspects(second) == [[0, 4096]]
        assert contents(tmp_path) == before


def test_more_parts_than_can_be_kept_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mirror.replica.SUSPECT_PARTS_MAX", 2)
    with pair(tmp_path) as (first, second):
        for block in range(3):
            flip(tmp_path, "b", block * 4096)
        verify(first)
        first.disconnect()
        for block in range(3):
            first.write(memoryview(b"!"), block * 4096 + 9, False)
        assert any("too many parts" in record.message for record in caplog.records)
        come_together(first, second)
        assert suspects(first) == suspects(second) == [[0, 2 * 4096]]
        a, b = contents(tmp_path)
        assert [at for at in range(SIZE_BYTES) if a[at] != b[at]] == [0, 4096]


def test_a_part_is_forgotten_when_both_are_in_step_whatever_led_there(tmp_path: Path) -> None:
    """A resync that ended on the target's side only is followed by a handshake that finds nothing to do."""
    with pair(tmp_path) as (first, second):
        flip(tmp_path, "b", 0)
        verify(first)
        first._replica.update(suspect_parts=((100, 50),))
        session = session_of(first)
        session.end("a test cuts the link")
        wait_ended(first, session)
        wait_in_step(first)
        wait_in_step(second)
        assert first._replica.superblock.suspect_parts == ()


def test_a_read_error_is_mended_from_the_peer_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Block 5 differs, and the primary's may be the right one; block 9 can't be read here."""
    with pair(tmp_path) as (first, _):
        first.write(memoryview(BLOCK * 16), 0, False)
        first.flush()
        flip(tmp_path, "b", 5 * 4096)
        before = contents(tmp_path)
        store = first._replica.store
        read_into, bad = store.read_into, [True]

        def read(buffer: memoryview, offset: int) -> None:
            if bad[0] and offset <= 9 * 4096 < offset + len(buffer):
                raise DeviceError("data", "read", errno.EIO, "Input/output error")
            read_into(buffer, offset)

        def write(buffer: memoryview, offset: int, *how: bool) -> None:
            bad[0] = bad[0] and offset != 9 * 4096
            store_write(buffer, offset, *how)

        store_write = store.write
        monkeypatch.setattr(store, "read_into", read)
        monkeypatch.setattr(store, "write", write)
        found = bytearray(16 * 4096)
        first.read_into(memoryview(found), 0)
        assert bytes(found) == before[0][: len(found)]
        assert not bad[0], "the sector was written again"
        assert contents(tmp_path) == before
        assert any("1 blocks answered from the peer" in record.message for record in caplog.records)


def test_a_repair_that_finds_the_peers_disk_full_ends_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is Outdated from then on, and only a new session brings it up again."""
    with pair(tmp_path) as (first, second):
        flip(tmp_path, "b", 0)
        verify(first)
        write, full = second._replica.store.write, [True]

        def refuse(buffer: memoryview, offset: int, *how: bool) -> None:
            if full[0]:
                raise DeviceError("data", "write", errno.ENOSPC, "No space left on device")
            write(buffer, offset, *how)

        monkeypatch.setattr(second._replica.store, "write", refuse)
        session = session_of(first)
        first._command({"command": "verify", "act": "start", "repair": "primary"})
        wait_ended(first, session)
        assert second._replica.superblock.disk is DiskState.OUTDATED
        full[0] = False
        peer_of(first).connect(False)
        wait_in_step(second)
        wait_in_step(first)
        assert suspects(first) == [[0, 4096]]
        assert verify(first, repair="primary")["result"] == "repaired"


def test_they_outlive_a_restart_and_a_promotion(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        flip(tmp_path, "b", 0)
        verify(first)
        first.switch()
        assert suspects(second) == [[0, 4096]]
    again = serve(tmp_path / "b")
    try:
        assert suspects(again) == [[0, 4096]]
        again.promote(False)
        assert any("suspect" in warning for warning in again.status()["warnings"])
    finally:
        again.stop(5.0)


def test_a_side_that_has_none_learns_them_from_the_other(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        first.disconnect()
        for volume, offset in ((first, 0), (second, 1 << 20)):
            with volume._replica.books:
                volume._replica.suspects.add([(offset, 4096)])
            volume._replica.suspects.persist()
        first.connect(False)
        expected = [[0, 4096], [1 << 20, 4096]]
        wait_until(lambda: suspects(first) == suspects(second) == expected)


def test_the_proof_finds_what_nobody_asked_for(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        first.write(memoryview(BLOCK), 0, False)
        first.flush()
        wait_until(lambda: first.status()["proof"]["state"] == "proven")
        first.disconnect()
        flip(tmp_path, "b", 100)
        first.connect(False)
        wait_in_step(first)
        wait_until(lambda: first.status()["proof"]["state"] == "proven")
        assert suspects(first) == suspects(second) == [[0, 4096]]
        wait_until(lambda: first.status()["proof"]["rest_left_bytes"] == 0)
        wait_until(lambda: second.status()["proof"]["rest_left_bytes"] == 0)
        assert second.status()["proof"]["state"] == "proven"


def test_the_proof_compares_what_the_log_held_first_and_the_rest_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    really_compare = compare.Comparer.compare

    def spy(self: compare.Comparer, offset: int, length: int) -> Any:
        compared.append(offset >> 22)
        return really_compare(self, offset, length)

    with pair(tmp_path) as (first, second):
        wait_until(lambda: first.status()["proof"]["rest_left_bytes"] == 0)
        first.write(memoryview(BLOCK), 5 << 20, False)
        first.flush()
        first.disconnect()
        monkeypatch.setattr(compare.Comparer, "compare", spy)
        first.connect(False)
        wait_in_step(first)
        wait_in_step(second)
        wait_until(lambda: first.status()["proof"]["rest_left_bytes"] == 0)
        assert compared[:4] == [1] * 4
        assert sorted(compared[4:]) == [0] * 4 + [1] * 4


def test_what_the_peers_log_held_as_primary_is_proven_too(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        first.write(memoryview(BLOCK), 5 << 20, False)
        first.switch()
        wait_until(lambda: second.status()["proof"]["state"] == "proven")
        with first._replica.books:
            assert 1 in first._replica.unproven.extents()
        second.disconnect()
        flip(tmp_path, "a", 5 << 20)
        second.connect(False)
        wait_in_step(second)
        wait_until(lambda: second.status()["proof"]["state"] == "proven")
        assert suspects(first) == suspects(second) == [[5 << 20, 4096]]


def test_it_can_not_be_done_alone_and_twice(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        volume = first
        volume._command({"command": "verify", "act": "start", "rate": 1 << 20})
        with pytest.raises(OperatorError, match="running already"):
            volume._command({"command": "verify", "act": "start"})
        volume._command({"command": "verify", "act": "stop"})
        wait_until(lambda: first.status()["verify"] is None)
        assert first.status()["last_verify"]["result"] == "stopped"
        first.disconnect()
        with pytest.raises(OperatorError, match="not connected"):
            volume._command({"command": "verify", "act": "start"})
        with pytest.raises(OperatorError, match="not primary"):
            second._command({"command": "verify", "act": "start"})


def stopped_at(volume: Volume, least_bytes: int, **wish: Any) -> Run:
    """Start a verify, and stop it when it has compared so much at least."""
    verifier = peer_of(volume).verifier
    volume._command({"command": "verify", "act": "start", "rate": 4 << 20, **wish})
    wait_until(lambda: verifier.run is not None and verifier.run.progress.done_bytes >= least_bytes)
    volume._command({"command": "verify", "act": "stop"})
    assert verifier.run is not None
    wait_until(lambda: not verifier.run.active)  # type: ignore[union-attr]
    assert verifier.run.cursor != 0
    return verifier.run


def test_one_that_was_stopped_goes_on_where_it_was_in_the_same_session(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        flip(tmp_path, "b", 0)
        flip(tmp_path, "b", SIZE_BYTES - 1)
        former = stopped_at(first, 2 << 20)
        cursor = former.cursor
        # What only looks at the suspects is another matter.
        assert verify(first, suspects_only=True)["differing_bytes"] == 4096
        run = verify(second)
        assert (run["resumed_bytes"], run["done_bytes"], run["total_bytes"]) == (cursor, *[SIZE_BYTES - cursor] * 2)
        assert (run["begin"], run["result"], run["differing_bytes"]) == (0, "differs", 8192)
        last = first.status()["last_verify"]
        assert (last["checked_bytes"], last["started"]) == (SIZE_BYTES, iso_time(former.started))
        run = verify(first)
        assert (run["resumed_bytes"], run["begin"]) == (0, 0), "that one was whole"


def test_one_that_lost_its_peer_goes_once_round_from_where_it_was(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        flip(tmp_path, "b", SIZE_BYTES - 1)
        first._command({"command": "verify", "act": "start", "rate": 4 << 20})
        verifier = peer_of(first).verifier
        wait_until(lambda: verifier.run is not None and verifier.run.cursor >= 2 << 20)
        cut_until_in_step(first, second)
        assert verifier.run is not None
        cursor = verifier.run.cursor
        assert verifier.run.status()["state"] == "stopped"
        # Below the cursor, where it was equal before: what is told of the whole volume is of one session.
        flip(tmp_path, "b", 0)
        run = verify(first)
        assert (run["begin"], run["resumed_bytes"], run["done_bytes"]) == (cursor, 0, SIZE_BYTES)
        assert (run["result"], run["ranges"]) == ("differs", [[0, 4096], [SIZE_BYTES - 4096, 4096]])
        assert first.status()["last_verify"]["checked_bytes"] == SIZE_BYTES
        assert verify(first)["begin"] == 0, "that one was whole"


def test_a_circle_that_is_cut_short_is_owed_again(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        begin = stopped_at(first, 5 << 20).cursor
        cut_until_in_step(first, second)
        # Over the end of the volume.
        second_part = stopped_at(first, 4 << 20)
        assert second_part.begin == begin
        assert 0 < second_part.cursor < begin
        compared = second_part.progress.done_bytes
        assert first.status()["last_verify"]["checked_bytes"] == compared
        # In the same session: what is left of the circle.
        third_part = stopped_at(first, 1)
        assert (third_part.begin, third_part.resumed_bytes) == (begin, compared)
        assert third_part.progress.total_bytes == SIZE_BYTES - compared
        cursor = third_part.cursor
        cut_until_in_step(first, second)
        flip(tmp_path, "b", SIZE_BYTES - 1)
        run = verify(first)
        assert (run["begin"], run["resumed_bytes"], run["done_bytes"]) == (cursor, 0, SIZE_BYTES)
        assert (run["result"], run["ranges"]) == ("differs", [[SIZE_BYTES - 4096, 4096]])


def test_another_primary_and_a_change_of_roles_and_back_owe_the_whole_circle(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        session = session_of(first)
        cursor = stopped_at(first, 1 << 20).cursor
        first.switch()
        next_cursor = stopped_at(second, 1 << 20).cursor
        assert peer_of(second).verifier.run.begin == cursor  # type: ignore[union-attr]
        first.switch()
        assert session_of(first) is session
        run = verify(first)
        assert (run["begin"], run["resumed_bytes"], run["done_bytes"]) == (next_cursor, 0, SIZE_BYTES)


def test_a_repair_that_was_stopped_counts_what_it_has_repaired_in_the_same_session(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        flip(tmp_path, "b", 0)
        cursor = stopped_at(first, 1 << 20, repair="primary").cursor
        run = verify(first, repair="primary")
        assert (run["resumed_bytes"], run["result"], run["repaired_bytes"]) == (cursor, "repaired", 4096)
        flip(tmp_path, "b", 0)
        cursor = stopped_at(first, 1 << 20, repair="primary").cursor
        cut_until_in_step(first, second)
        run = verify(first, repair="primary")
        assert (run["begin"], run["resumed_bytes"], run["result"], run["repaired_bytes"]) == (cursor, 0, "equal", 0)


def test_a_volume_that_has_grown_since_is_compared_whole(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, _):
        cursor = stopped_at(first, 1 << 20).cursor
        first.resize(2 * SIZE_BYTES)
        run = verify(first)
        assert (run["begin"], run["resumed_bytes"], run["done_bytes"]) == (cursor, 0, 2 * SIZE_BYTES)


def test_restart_and_another_wish_begin_anew(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, _):
        for more in ({"restart": True}, {"repair": "primary"}):
            stopped_at(first, 1, restart=True)
            run = verify(first, **more)
            assert (run["resumed_bytes"], run["begin"], run["done_bytes"]) == (0, 0, SIZE_BYTES)


def test_a_switch_in_the_middle_is_no_alarm(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        first.write(memoryview(BLOCK * 64), 0, False)
        first._command({"command": "verify", "act": "start", "rate": 4 << 20})
        first.switch()
        second.write(memoryview(OTHER * 64), 0, False)
        verifier = peer_of(first).verifier
        wait_until(lambda: not verifier.run.active)  # type: ignore[union-attr]
        assert verify(second)["result"] == "equal"
        assert suspects(first) == suspects(second) == []


def test_suspects_are_read_from_disk_when_nothing_serves(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, _):
        flip(tmp_path, "b", 0)
        verify(first)
    for name in "ab":
        status = offline.status(tmp_path / name, load(tmp_path / name))
        assert status["suspects"] == {"bytes": 4096, "ranges": [[0, 4096]], "more": False}
        assert any("suspect" in warning for warning in status["warnings"])
