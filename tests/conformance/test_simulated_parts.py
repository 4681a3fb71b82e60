"""The simulator's disk and network answer as the real ones do: what the simulator finds is worth no more than that.

The production link runs on both; test_store.py does the same for the disk. What only the simulated ones can do, losing
and failing, is tested here alone.
"""

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mirror.link
import mirror.store
from mirror.core.errors import DeviceError, LinkLost, ProtocolError
from mirror.core.wire import MessageType
from mirror.link import Poller, Stream
from mirror.store import data_file, files, map_file, metadata_file, parked_file
from mirror.store.data_file import DataFile
from tests.sim.disk import Disk, File, OsModule
from tests.sim.network import Links, SelectModule, SocketModule, drop
from tests.sim.scheduler import Process, Scheduler
from tests.sim.scheduler import Runtime as SimulatedRuntime

SIZE_BYTES = 64 * 1024
STORE_MODULES = (mirror.store, data_file, files, map_file, metadata_file, parked_file)

# -- disk -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def simulated_data(monkeypatch: pytest.MonkeyPatch) -> Callable[[], DataFile]:
    """Makes a data file on a simulated disk; the modules of the store keep their real `os` for real files."""
    scheduler = Scheduler(0, 0.0)
    disk = Disk(scheduler, "n0")
    simulated_os = OsModule(scheduler, lambda _path: disk)

    def make() -> DataFile:
        disk.files["/n0/data"] = file = File(disk, "/n0/data")
        file.size_bytes = SIZE_BYTES
        for module in STORE_MODULES:
            monkeypatch.setattr(module, "os", simulated_os)
        monkeypatch.setattr(data_file, "_fallocate", simulated_os.fallocate)
        opened = DataFile(Path("/n0/data"), SimulatedRuntime(scheduler, Process("n0"), bytes(16)), own=True)  # type: ignore[arg-type]
        opened.set_size(SIZE_BYTES)
        return opened

    return make


def test_a_power_cut_keeps_what_was_flushed_and_only_that_for_certain(
    simulated_data: Callable[[], DataFile],
) -> None:
    lost = kept = 0
    for _ in range(40):
        data = simulated_data()
        data.write(b"a" * 8192, 0)
        data.flush()
        data.write(b"b" * 4096, 4096)
        file = data_file.os._open[data.data_fd].file  # type: ignore[attr-defined]
        file.power_cut()
        assert file.durable_page(0) == b"a" * 4096
        kept += file.durable_page(1) == b"b" * 4096
        lost += file.durable_page(1) == b"a" * 4096
        data.close()
    assert kept
    assert lost


def test_a_failed_flush_is_told_once_and_the_data_never_reaches_the_disk(
    simulated_data: Callable[[], DataFile],
) -> None:
    data = simulated_data()
    data.write(b"a" * 4096, 0)
    file = data_file.os._open[data.data_fd].file  # type: ignore[attr-defined]
    file.disk.failing["flush"] = 1
    with pytest.raises(DeviceError):
        data.flush()
    data_file.os.fdatasync(data.data_fd)  # what Linux does: the next one lies
    assert file.page(0) == b"a" * 4096
    assert file.durable_page(0) == bytes(4096)


# -- network ----------------------------------------------------------------------------------------------------------


class Real:
    """Threads and a connection on the loopback."""

    def run(self, *functions: Callable[[], None]) -> None:
        threads = [threading.Thread(target=function) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()

    def pair(self) -> tuple[Stream, Stream]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            two, _ = listener.accept()
        return Stream(one, "one"), Stream(two, "two")


class Simulated:
    """Greenlets and the simulated network."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.scheduler = Scheduler(1, 0.3)
        self.links = Links(self.scheduler)
        self.process = Process("n0")
        patch.setattr(mirror.link, "socket", SocketModule(self.links))
        patch.setattr(mirror.link, "select", SelectModule(self.links))

    def run(self, *functions: Callable[[], None]) -> None:
        tasks = [self.scheduler.spawn(self.process, "function", function) for function in functions]
        assert self.scheduler.run(lambda: all(task.done for task in tasks), 60.0)
        for _, error in self.scheduler.failures:
            raise error

    def pair(self) -> tuple[Stream, Stream]:
        made: list[Any] = []
        self.run(lambda: made.extend(mirror.link.socket.socketpair()))
        return Stream(made[0], "one"), Stream(made[1], "two")


World = Real | Simulated


@pytest.fixture(params=["real", "simulated"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = Real() if request.param == "real" else Simulated(monkeypatch)
    yield made
    if isinstance(made, Simulated):
        made.scheduler.end()


def test_messages_arrive_in_order_and_whole(world: World) -> None:
    one, two = world.pair()
    two.payload_bytes_max = 1 << 20
    got: list[tuple[int, bytes]] = []

    def receive() -> None:
        for _ in range(20):
            header, payload = two.receive()
            got.append((header.offset, bytes(payload)))

    def send() -> None:
        for index in range(20):
            one.send(MessageType.WRITE, 0, index, 0, bytes([index]) * (index * 5000))

    world.run(receive, send)
    assert got == [(index, bytes([index]) * (index * 5000)) for index in range(20)]
    world.run(one.close, two.close)


def test_what_moves_is_counted_at_both_ends(world: World) -> None:
    one, two = world.pair()
    message_bytes, answer_bytes = 9 + 60 + 4096, 2 + 60
    moved: list[int] = []

    def talk() -> None:
        # How a connection began may count.
        begun = one.moved_bytes, two.moved_bytes
        one.send(MessageType.WRITE, payload=bytes(4096))
        two.receive()
        moved.append(two.moved_bytes - begun[1])
        # It confirms what came before.
        two.send(MessageType.ANSWER)
        one.receive()
        moved.append(one.moved_bytes - begun[0])
        one.close()
        moved.append(one.moved_bytes)

    world.run(talk)
    assert moved == [message_bytes, message_bytes + answer_bytes, 0]
    world.run(two.close)


def test_a_shutdown_ends_both_sides(world: World) -> None:
    one, two = world.pair()
    ends: list[str] = []

    def wait(stream: Stream, name: str) -> None:
        with pytest.raises(LinkLost):
            stream.receive()
        ends.append(name)

    world.run(lambda: wait(one, "one"), lambda: wait(two, "two"), one.shutdown)
    assert sorted(ends) == ["one", "two"]
    world.run(one.close, two.close)


def test_a_poller_tells_what_can_be_received_and_wakes_at_its_close(world: World) -> None:
    one, two = world.pair()
    told: list[int] = []

    def poll() -> None:
        with Poller() as poller:
            poller.add(two)
            one.send(MessageType.WRITE, 0, 7)
            told.extend(stream.receive()[0].offset for stream in poller.wait())
            poller.close()
            assert poller.wait() == []

    world.run(poll)
    assert told == [7]
    world.run(one.close, two.close)


def test_a_receive_with_a_time_limit_gives_up(world: World) -> None:
    one, two = world.pair()

    def receive() -> None:
        two.set_timeout(0.05)
        with pytest.raises(LinkLost, match="timed out"):
            two.receive()

    world.run(receive)
    world.run(one.close, two.close)


def test_a_dropped_message_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Simulated(monkeypatch)
    one, two = world.pair()
    world.links.faults["n0", "n0"] = deque([drop])

    def talk() -> None:
        one.send(MessageType.WRITE, 0, 1)
        one.send(MessageType.WRITE, 0, 2)
        with pytest.raises(ProtocolError, match=r"message 2 .* where 1 was due"):
            two.receive()

    world.run(talk)
    world.scheduler.end()
