"""Parked writes: numbers, slots, and two replicas that meet what the simulator meets by chance."""

import dataclasses
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.core.errors import DeviceError, MirrorError, ProtocolError
from mirror.core.layout import RECORD_BYTES, decode_map_page, decode_superblock, encode_superblock
from mirror.core.limits import EXTENT_BYTES, PARKED_BYTES_MAX, PARKED_MAX
from mirror.core.parked import (
    EMPTY_HEAD,
    HEAD_BYTES,
    SLOT_BYTES,
    News,
    ParkedNumbers,
    ParkedWrite,
    decode_news,
    decode_slot,
    encode_news,
    encode_slot,
    slot_of,
    split_number,
)
from mirror.core.states import DiskState
from mirror.core.wire import Flag, MessageType
from mirror.opening import open_replica
from mirror.runtime import Runtime
from mirror.store import DATA_NAME, META_NAME, PARKED_NAME, REPLICA_FILES, Store, data_file
from mirror.store.parked_file import ParkedFile
from nbd_server.volume import Volume
from tests.golden import by_docs
from tests.pair import (
    PATIENCE_S,
    assert_equal_copies,
    pair,
    peer_of,
    session_of,
    wait_ended,
    wait_in_step,
)

DATA = memoryview(b"\x5a" * 4096)
OTHER = memoryview(b"\xa5" * 4096)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_a_message_names_its_write_and_the_lowest_that_is_open() -> None:
    numbers = ParkedNumbers()
    first, second, third = numbers.take(), numbers.take(), numbers.take()
    assert [split_number(said) for said in (first, second, third)] == [(1, 1), (2, 1), (3, 1)]
    numbers.over(second)
    assert split_number(numbers.take()) == (4, 1)
    numbers.over(first)
    assert split_number(numbers.take()) == (5, 3)


def test_no_number_whose_slot_is_not_free() -> None:
    numbers = ParkedNumbers()
    taken = [numbers.take() for _ in range(PARKED_MAX)]
    assert numbers.take() == 0
    numbers.over(taken[1])
    assert numbers.take() == 0, "that is not the slot which comes next"
    numbers.over(taken[0])
    number, lowest_open = split_number(numbers.take())
    assert slot_of(number) == slot_of(split_number(taken[0])[0])
    assert lowest_open == 3


def test_what_was_open_when_it_was_told_is_told_again() -> None:
    """A flush may come to the peer before a write whose number it names."""
    numbers = ParkedNumbers()
    assert numbers.flush_says() is None
    first = numbers.take()
    assert numbers.flush_says() == News(1, (1,))
    assert numbers.flush_says() is None
    numbers.over(first)
    assert numbers.flush_says() == News(1, ())
    assert numbers.flush_says() is None
    # A notice knows nothing of it: it goes another way, and might come later than what follows the flush.
    assert numbers.notice() == News(1, ())
    assert numbers.notice() is None


@given(through=st.integers(0, 2**64 - 1), still_open=st.lists(st.integers(0, 2**64 - 1), max_size=PARKED_MAX))
def test_news_are_read_as_they_were_written(through: int, still_open: list[int]) -> None:
    news = News(through, tuple(still_open))
    assert decode_news(encode_news(news)) == news


@pytest.mark.parametrize("payload", [b"", b"1234567", bytes(8 * (PARKED_MAX + 2))])
def test_other_words_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="a flush with"):
        decode_news(payload)


# -- slots ------------------------------------------------------------------------------------------------------------


@given(epoch=st.integers(0, 2**64 - 1), offset=st.integers(0, 2**64 - 1), data=st.binary(min_size=1, max_size=5000))
def test_a_slot_is_read_as_it_was_written_and_as_the_document_says(epoch: int, offset: int, data: bytes) -> None:
    raw = encode_slot(epoch, offset, data)
    assert decode_slot(raw, epoch) == ParkedWrite(offset, data)
    # A longer one stood there before.
    assert decode_slot(raw + b"rest", epoch) == ParkedWrite(offset, data)
    assert decode_slot(raw, epoch ^ 1) is None
    assert decode_slot(raw[:-1], epoch) is None
    assert decode_slot(EMPTY_HEAD + raw[HEAD_BYTES:], epoch) is None
    found = {row.field: by_docs.value(row, raw) for row in by_docs.fields("format.md", "Parked writes")}
    assert (found["magic"], found["version"]) == (b"NMPK", 1)
    assert (found["epoch"], found["offset"], found["length"]) == (epoch, offset, len(data))
    assert found["data_checksum"] == by_docs.crc32c(data)
    assert found["checksum"] == by_docs.crc32c(raw[:32])
    assert raw[36:] == data


@given(data=st.binary(min_size=1, max_size=64), at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_slot_with_a_flipped_bit_holds_nothing(data: bytes, at: int, bit: int) -> None:
    raw = bytearray(encode_slot(7, 4096, data))
    at %= len(raw)
    raw[at] ^= 1 << bit
    # The two bytes that nothing is kept in are under the checksum as well.
    assert decode_slot(bytes(raw), 7) is None


def test_the_file_is_of_16_slots_and_private(tmp_path: Path) -> None:
    parked = ParkedFile(tmp_path / "parked", make=True)
    parked.keep(15, 3, 8192, DATA)
    parked.keep(0, 2, 4096, DATA)
    parked.close()
    path = tmp_path / "parked"
    assert path.stat().st_size == 16 * 36_864 == PARKED_MAX * SLOT_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    again = ParkedFile(path, make=True)
    assert again.read(3) == {15: ParkedWrite(8192, bytes(DATA))}
    again.drop(15)
    assert again.read(3) == {}
    again.close()


def test_who_only_looks_makes_no_file(tmp_path: Path) -> None:
    parked = ParkedFile(tmp_path / "parked", make=False)
    assert not parked.exists
    assert parked.read(1) == {}
    parked.close()
    assert list(tmp_path.iterdir()) == []


# -- two replicas -----------------------------------------------------------------------------------------------------


@contextmanager
def no_record_yet(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Records of its log stay on their way until they are let go."""
    store, gate = volume._replica.store, threading.Event()
    really = store.write_log_record

    def write_log_record(*arguments: Any) -> None:
        assert gate.wait(PATIENCE_S)
        really(*arguments)

    monkeypatch.setattr(store, "write_log_record", write_log_record)
    try:
        yield gate.set
    finally:
        gate.set()


def in_a_thread(act: Callable[..., object], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=act, args=arguments)
    thread.start()
    return thread


def wait_parked(volume: Volume, count: int = 1) -> None:
    deadline = threading.Event()
    for _ in range(int(PATIENCE_S * 1000)):
        if len(peer_of(volume)._parking.writes) == count:
            return
        deadline.wait(0.001)
    raise AssertionError(f"{len(peer_of(volume)._parking.writes)} parked")


def end_quietly(volume: Volume) -> None:
    """Its session ends, and no other one begins."""
    session = session_of(volume)
    peer_of(volume)._wanted = False
    session.end("a cut, for the test")
    wait_ended(volume, session)


@pytest.mark.parametrize("protocol", ["B", "C"])
def test_the_peer_has_a_cold_write_before_its_record_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    with pair(tmp_path, protocol) as (first, second):
        with no_record_yet(first, monkeypatch) as let_go:
            thread = in_a_thread(first.write, DATA, 4096, False)
            wait_parked(second)
            assert thread.is_alive()
            assert [volume._replica.store.read(4096, 4096) for volume in (first, second)] == [bytes(4096)] * 2
            let_go()
            thread.join(PATIENCE_S)
        # Answered; and the flush covers it on both.
        first.flush()
        assert peer_of(second)._parking.writes == {}
        assert_equal_copies(first, second)
        assert second._replica.store.read(4096, 4096) == DATA


NOT_PARKED: dict[str, tuple[str, Callable[[Volume], None]]] = {
    "FUA": ("C", lambda volume: volume.write(DATA, 0, True)),
    "zero": ("C", lambda volume: volume.zero(0, 4096, False, False, False)),
    "trim": ("C", lambda volume: volume.trim(0, 4096, False)),
    "large": ("C", lambda volume: volume.write(memoryview(bytes(PARKED_BYTES_MAX + 1)), 0, False)),
    "protocol A": ("A", lambda volume: volume.write(DATA, 0, False)),
}


@pytest.mark.parametrize("what", NOT_PARKED)
def test_what_is_not_parked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    protocol, change = NOT_PARKED[what]
    with pair(tmp_path, protocol) as (first, second):
        monkeypatch.setattr(peer_of(second)._parking, "park", lambda *_: pytest.fail("it was parked"))
        change(first)
        first.flush()
        assert_equal_copies(first, second)
        assert not session_of(first).ended


def test_an_idle_primary_tells_what_may_be_applied(tmp_path: Path) -> None:
    with pair(tmp_path) as (first, second):
        first.write(DATA, 4096, False)
        wait_parked(second, 0)
        assert second._replica.store.read(4096, 4096) == DATA


def read_from_the_peer(volume: Volume) -> None:
    volume._primary._read_from_peer(memoryview(bytearray(4096)), 4096)


def compare(volume: Volume) -> None:
    session = session_of(volume)
    stream = session.borrow_sync()
    stream.send(MessageType.SUMS, Flag.RESYNC, 4096, 4096)
    stream.receive_answer()
    session.give_back_sync(stream)


OVERLAPPING: dict[str, Callable[[Volume], None]] = {
    "write": lambda volume: volume.write(OTHER[:512], 4096 + 512, False),
    "FUA": lambda volume: volume.write(OTHER[:512], 4096 + 512, True),
    "zero": lambda volume: volume.zero(4096 + 512, 512, False, False, False),
    "trim": lambda volume: volume.trim(4096, 4096, False),
    "read": read_from_the_peer,
    "sums": compare,
}


@pytest.mark.parametrize("what", OVERLAPPING)
def test_a_request_that_overlaps_finds_it_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    with pair(tmp_path) as (first, second):
        parking = peer_of(second)._parking
        # Nothing tells it but the request.
        monkeypatch.setattr(parking, "release", lambda news: None)
        first.write(DATA, 4096, False)
        assert len(parking.writes) == 1
        OVERLAPPING[what](first)
        assert parking.writes == {}
        assert_equal_copies(first, second)


def test_what_is_parked_when_the_session_ends_is_dirty_and_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pair(tmp_path) as (first, second):
        with no_record_yet(first, monkeypatch) as let_go:
            thread = in_a_thread(first.write, DATA, 4096, False)
            wait_parked(second)
            end_quietly(second)
            # Its record is not durable, and may never be: only these bits tell that the copies differ.
            assert second._replica.store.read(4096, 4096) == DATA
            assert second._replica.dirty.is_dirty(4096, 4096)
            durable = decode_map_page(second._replica.store.read_map_page(0), 0)
            assert durable[0] >> 1 & 1
            let_go()
            thread.join(PATIENCE_S)
        second.connect(False)
        wait_in_step(first)
        wait_in_step(second)
        assert_equal_copies(first, second)
        assert first._replica.store.read(4096, 4096) == DATA


def test_a_write_that_fails_at_its_record_leaves_no_difference_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The primary's disk is Failed, and the peer, which has it, stands in: it is answered well."""
    with pair(tmp_path) as (first, second):

        def refuse(*_: Any) -> None:
            raise DeviceError("meta", "log to", errno.EIO, "Input/output error")

        monkeypatch.setattr(first._replica.store, "write_log_record", refuse)
        first.write(DATA, 4096, False)
        assert first._replica.failed
        buffer = bytearray(4096)
        first.read_into(memoryview(buffer), 4096)
        assert buffer == DATA
        assert second._replica.store.read(4096, 4096) == DATA


@pytest.mark.parametrize("others", [0, 3])
def test_a_write_that_is_given_up_leaves_no_difference_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """Nobody stands in: it is answered with an error, and the peer has it. `others`: it goes in a batch."""
    with pair(tmp_path) as (first, second):
        session, applying = session_of(first), session_of(second)
        peer_of(second)._wanted = False
        refused = []

        def refuse(*_: Any) -> None:
            wait_parked(second)
            raise DeviceError("meta", "log to", errno.EIO, "Input/output error")

        monkeypatch.setattr(first._replica.store, "write_log_record", refuse)
        first._primary.peer_reads_ok = False
        # As if so many others were under way.
        first._primary._active += others
        try:
            first.write(DATA, 4096, False)
        except MirrorError as error:
            refused.append(error)
        finally:
            first._primary._active -= others
        assert refused
        assert session.ended
        wait_ended(second, applying)
        assert second._replica.dirty.is_dirty(4096, 4096)
        assert second._replica.store.read(4096, 4096) == DATA
        assert first._replica.dirty.is_dirty(4096, 4096)


@pytest.mark.parametrize(("number", "left"), [(errno.ENOSPC, DiskState.OUTDATED), (errno.EIO, DiskState.FAILED)])
def test_a_disk_that_refuses_what_was_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, left: DiskState
) -> None:
    with pair(tmp_path) as (first, second):
        session, applying = session_of(first), session_of(second)
        store = second._replica.store

        def refuse(*_: Any) -> None:
            raise DeviceError("data", "write", number, "refused")

        with monkeypatch.context() as patch:
            patch.setattr(store, "write", refuse)
            peer_of(second)._wanted = False
            first.write(DATA, 4096, False)
            wait_ended(first, session)
            wait_ended(second, applying)
            assert second._replica.superblock.disk is left
            # No later start may take it for a write that nothing came after.
            assert store.parked.read(second._replica.superblock.log_epoch) == {}
        first.write(OTHER, 4096, False)
        if left is DiskState.OUTDATED:
            second.connect(False)
            wait_in_step(first)
            wait_in_step(second)
            assert_equal_copies(first, second)


def test_a_parked_file_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair(tmp_path) as (first, second):
        session = session_of(first)

        def refuse(*_: Any) -> None:
            raise DeviceError("parked", "park a write in", errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(second._replica.store.parked, "keep", refuse)
            first.write(DATA, 4096, False)
            wait_ended(first, session)
            assert "ENOSPC" in session.reason
        peer_of(second).connect(False)
        wait_in_step(first)
        wait_in_step(second)
        assert_equal_copies(first, second)


HOSTILE: dict[str, tuple[Any, ...]] = {
    "with FUA": (MessageType.WRITE, Flag.PARK | Flag.FUA, 4096, 4096, bytes(4096)),
    "of a resync": (MessageType.WRITE, Flag.PARK | Flag.RESYNC, 4096, 4096, bytes(4096)),
    "too large": (MessageType.WRITE, Flag.PARK, 4096, PARKED_BYTES_MAX + 1, bytes(PARKED_BYTES_MAX + 1)),
    "empty": (MessageType.WRITE, Flag.PARK, 4096, 0, b""),
    "a zero": (MessageType.ZERO, Flag.PARK, 4096, 4096, b""),
    "a flush": (MessageType.FLUSH, 0, 0, 0, b"123"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_can_not_be_parked_ends_the_session(tmp_path: Path, name: str) -> None:
    with pair(tmp_path) as (first, second):
        session, applying = session_of(first), session_of(second)
        stream = session.borrow()
        stream.send(*HOSTILE[name])
        wait_ended(second, applying)
        assert "that can't be parked" in applying.reason or "a flush with 3 bytes" in applying.reason
        wait_in_step(first)
        assert_equal_copies(first, second)


@pytest.mark.parametrize(
    "said",
    [
        {"through": -1, "open": []},
        {"through": 1},
        {"through": 1, "open": ["x"]},
        {"through": 100, "open": [*range(PARKED_MAX + 1)]},
    ],
)
def test_a_notice_that_can_not_be_read_ends_the_session(tmp_path: Path, said: dict[str, Any]) -> None:
    with pair(tmp_path) as (first, second):
        session = session_of(second)
        session_of(first).notify("parked", **said)
        wait_ended(second, session)
        wait_in_step(first)


def test_more_cold_writes_than_slots_at_a_time(tmp_path: Path) -> None:
    size_bytes = 64 * EXTENT_BYTES
    with pair(tmp_path, size_bytes=size_bytes) as (first, second):
        contents = {number * EXTENT_BYTES: bytes([number + 1]) * 4096 for number in range(64)}

        def write(offsets: list[int]) -> None:
            for offset in offsets:
                first.write(memoryview(contents[offset]), offset, False)

        offsets = list(contents)
        threads = [in_a_thread(write, offsets[start::24]) for start in range(24)]
        for thread in threads:
            thread.join(PATIENCE_S)
        first.flush()
        for volume in (first, second):
            assert [volume._replica.store.read(4096, offset) for offset in offsets] == list(contents.values())
        assert not session_of(first).ended


def test_a_peer_that_does_not_park_gets_nothing_to_park(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an older release, or on a filesystem without room for DIR/parked."""
    monkeypatch.setattr(ParkedFile, "exists", property(lambda file: False))
    with pair(tmp_path) as (first, second):
        monkeypatch.setattr(peer_of(second)._parking, "park", lambda *_: pytest.fail("it was parked"))
        first.write(DATA, 4096, False)
        assert_equal_copies(first, second)


# -- starts -----------------------------------------------------------------------------------------------------------


def reopened(directory: Path, memory_kept: bool) -> Any:
    replica, _ = open_replica(
        Runtime(),
        directory,
        directory / DATA_NAME,
        name="vol",
        protocol="C",
        log_slots=None,
        tracked=True,
        memory_kept=memory_kept,
    )
    return replica


@pytest.fixture
def killed_with_one_parked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A secondary's directory, as a killed process leaves it."""
    with pair(tmp_path) as (first, second), no_record_yet(first, monkeypatch) as let_go:
        thread = in_a_thread(first.write, DATA, 4096, False)
        wait_parked(second)
        (tmp_path / "killed").mkdir()
        for name in REPLICA_FILES:
            shutil.copy(tmp_path / "b" / name, tmp_path / "killed" / name)
        let_go()
        thread.join(PATIENCE_S)
    return tmp_path / "killed"


def test_a_start_applies_what_a_killed_process_had_parked(killed_with_one_parked: Path) -> None:
    replica = reopened(killed_with_one_parked, memory_kept=True)
    assert replica.kept_memory
    assert replica.store.read(4096, 4096) == DATA
    assert replica.dirty.is_dirty(4096, 4096)
    replica.store.close()
    # Once is enough: what came after it would be overwritten.
    store = Store.open(killed_with_one_parked, killed_with_one_parked / DATA_NAME, 8 << 20)
    store.write(OTHER, 4096, False)
    store.close()
    again = reopened(killed_with_one_parked, memory_kept=True)
    assert again.store.read(4096, 4096) == OTHER
    again.store.close()


def test_so_does_one_that_can_not_prove_its_memory(killed_with_one_parked: Path) -> None:
    """The parent was killed as well; in the same boot the kernel has it all the same."""
    replica = reopened(killed_with_one_parked, memory_kept=False)
    assert not replica.kept_memory
    assert replica.store.read(4096, 4096) == DATA
    assert replica.dirty.is_dirty(4096, 4096)
    replica.store.close()


def test_a_start_in_another_boot_applies_nothing(killed_with_one_parked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "boot_id", lambda self: b"another boot's.!")
        replica = reopened(killed_with_one_parked, memory_kept=False)
        assert replica.store.read(4096, 4096) == bytes(4096)
        replica.store.close()
        # Nor does a later one, to which it is of a former life.
        later = reopened(killed_with_one_parked, memory_kept=False)
        assert later.store.read(4096, 4096) == bytes(4096)
        later.store.close()


def test_a_disk_that_lost_some_of_it_forgot(killed_with_one_parked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ParkedFile) -> None:
        raise DeviceError("parked", "flush", errno.EIO, "Input/output error")

    monkeypatch.setattr(ParkedFile, "check_no_write_lost", refuse)
    replica = reopened(killed_with_one_parked, memory_kept=True)
    assert not replica.kept_memory
    assert replica.store.read(4096, 4096) == bytes(4096)
    replica.store.close()


def test_a_replica_of_an_older_release_gets_its_file(tmp_path: Path) -> None:
    with pair(tmp_path):
        pass
    (tmp_path / "b" / PARKED_NAME).unlink()
    replica = reopened(tmp_path / "b", memory_kept=False)
    assert replica.store.parked.exists
    replica.store.close()


def test_a_stop_does_not_take_the_files_away_from_what_is_parked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk hangs for longer than a stop waits. And a clean start would not look."""
    let_settle = threading.Event()
    with pair(tmp_path) as (first, second), no_record_yet(first, monkeypatch) as let_go:
        thread = in_a_thread(first.write, DATA, 4096, False)
        wait_parked(second)
        parking = peer_of(second)._parking
        really = parking.settle

        def settle() -> None:
            assert let_settle.wait(PATIENCE_S)
            really()

        monkeypatch.setattr(parking, "settle", settle)
        peer_of(first)._wanted = False
        assert not second.stop(5.0)
        assert not second._replica.superblock.clean
        let_settle.set()
        cleaner = peer_of(second)._cleaner
        assert cleaner is not None
        cleaner.join(PATIENCE_S)
        assert second._replica.store.read(4096, 4096) == DATA
        let_go()
        thread.join(PATIENCE_S)


def test_nothing_is_applied_on_a_copy_that_was_not_in_step(killed_with_one_parked: Path) -> None:
    path = killed_with_one_parked / META_NAME
    raw = bytearray(path.read_bytes())
    block = decode_superblock(bytes(raw[:RECORD_BYTES]))
    outdated = encode_superblock(dataclasses.replace(block, disk=DiskState.OUTDATED))
    raw[: 2 * RECORD_BYTES] = outdated * 2
    path.write_bytes(raw)
    replica = reopened(killed_with_one_parked, memory_kept=True)
    assert replica.store.read(4096, 4096) == bytes(4096)
    replica.store.close()


def test_a_full_disk_at_a_start_leaves_it_outdated(
    killed_with_one_parked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise DeviceError("data", "write", errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data_file.DataFile, "write", refuse)
    replica = reopened(killed_with_one_parked, memory_kept=True)
    assert replica.superblock.disk is DiskState.OUTDATED
    assert not replica.failed
    replica.store.close()


def test_what_touches_suspects_is_not_parked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is to be stable on both before it is answered."""
    with pair(tmp_path) as (first, second):
        monkeypatch.setattr(peer_of(second)._parking, "park", lambda *_: pytest.fail("it was parked"))
        for volume in (first, second):
            with volume._replica.books:
                volume._replica.suspects.add([(4096, 4096)])
        first.write(DATA, 4096, False)
        assert not session_of(first).ended
        assert_equal_copies(first, second)


def test_a_peer_that_was_told_that_nothing_can_be_parked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParkedFile, "exists", property(lambda file: False))
    with pair(tmp_path) as (first, second):
        session, applying = session_of(first), session_of(second)
        session.borrow().send(MessageType.WRITE, Flag.PARK, 4096, 4096, bytes(4096), number=256)
        wait_ended(second, applying)
        assert "for which there is no room here" in applying.reason


def test_a_slow_disk_holds_up_no_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a notice names is applied by a worker, not by who listens to the peer."""
    with pair(tmp_path) as (first, second):
        gate, store = threading.Event(), second._replica.store
        really = store.write

        def write(*arguments: Any) -> None:
            assert gate.wait(PATIENCE_S)
            really(*arguments)

        monkeypatch.setattr(store, "write", write)
        first.write(DATA, 4096, False)
        wait_parked(second)
        session_of(first).notify("parked", through=1, open=[])
        assert session_of(first).request("are_you_there", 5.0) is not None
        gate.set()
        wait_parked(second, 0)


def test_a_file_with_holes_is_allocated_and_one_that_can_not_be_made_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "parked"
    with open(path, "wb") as file:
        file.truncate(PARKED_MAX * SLOT_BYTES)
    ParkedFile(path, make=True).close()
    assert path.stat().st_blocks * 512 >= PARKED_MAX * SLOT_BYTES
    really = os.open

    def refuse(name: Any, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return really(name, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    assert not ParkedFile(tmp_path / "other", make=True).exists
