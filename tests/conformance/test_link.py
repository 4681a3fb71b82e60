"""The link against itself and against a real libzmq socket: the same messages, whole, in pieces and damaged."""

import contextlib
import errno
import os
import queue
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import zmq

from mirror import lending, link
from mirror.core import wire
from mirror.core.errors import LinkLost, MirrorError, ProtocolError
from mirror.core.limits import HELLO_BYTES_MAX
from mirror.core.wire import Header, MessageType
from mirror.link import Listener, Poller, Stream, dial
from mirror.runtime import Runtime
from tests.shortages import refuse_descriptors_then_a_thread

SIZES = (0, 1, 191, 192, 255, 256, 4096, 65_535, 65_536, 65_537, 1 << 20)
TIMEOUT_S = 5


@contextmanager
def listening() -> Iterator[tuple[tuple[str, int], "queue.Queue[tuple[Stream, Header, bytes]]", "queue.Queue[str]"]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    streams: queue.Queue[tuple[Stream, Header, bytes]] = queue.Queue()
    strangers: queue.Queue[str] = queue.Queue()

    def on_stranger(address: str, error: MirrorError) -> None:
        strangers.put(f"{address}: {error}")

    listener = Listener(Runtime(), address, lambda *arrived: streams.put(arrived), on_stranger)
    try:
        yield address, streams, strangers
    finally:
        listener.close()


@contextmanager
def connected() -> Iterator[tuple[Stream, Stream]]:
    """Two ends of one stream, after its first message."""
    with listening() as (address, streams, _):
        near = dial(address, TIMEOUT_S)
        near.send(MessageType.HELLO)
        far = streams.get(timeout=TIMEOUT_S)[0]
        for stream in (near, far):
            stream.set_timeout(TIMEOUT_S)
        yield near, far
        near.close()
        far.close()


@pytest.mark.parametrize("size", SIZES)
def test_a_message_arrives_whole(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    payload = payload[:size]
    with connected() as (near, far):
        sender = threading.Thread(target=near.send, args=(MessageType.WRITE, 1, 4096, size, payload, 7, 9))
        sender.start()
        header, received = far.receive()
        sender.join()
        assert bytes(received) == payload
        assert (header.flags, header.offset, header.length, header.code, header.number) == (1, 4096, size, 7, 9)


@contextmanager
def lending_streams() -> Iterator[tuple[Stream, Stream]]:
    """As in a session: whoever sends waits for ever, and large payloads may come."""
    with connected() as (near, far):
        near.set_timeout(None)
        far.payload_bytes_max = max(LENT_SIZES)
        yield near, far


LENT_SIZES = (lending.LENT_BYTES_MIN - 1, lending.LENT_BYTES_MIN, 1 << 20, (5 << 20) + 4097)


@pytest.mark.parametrize("size", LENT_SIZES)
@pytest.mark.parametrize("start", [0, 1])
def test_a_lent_payload_arrives_whole(size: int, start: int) -> None:
    content = bytes(range(251)) * (size // 251 + 2)
    with lending_streams() as (near, far):
        for payload in (content[start : start + size], memoryview(content)[start : start + size]):
            sender = threading.Thread(
                target=near.send, args=(MessageType.WRITE, 1, 4096, size, payload), kwargs={"lent": True}
            )
            sender.start()
            header, received = far.receive()
            sender.join()
            assert bytes(received) == payload
            assert (header.flags, header.offset, header.length) == (1, 4096, size)


def test_what_becomes_of_lent_pages_before_they_are_received_is_refused() -> None:
    """They are not copied; and a client's buffer that is used again too early is no write of the peer's."""
    payload = bytearray(lending.LENT_BYTES_MIN)
    with lending_streams() as (near, far):
        near.send(MessageType.WRITE, payload=payload, lent=True)
        payload[-1] ^= 1
        with pytest.raises(ProtocolError, match="damaged"):
            far.receive()
        near.send(MessageType.WRITE, payload=payload)
        payload[-1] ^= 1
        far.receive()


def test_a_connection_lost_in_the_middle_leaves_nothing_behind() -> None:
    """What is left of a lent payload goes with its connection, not out on the next one."""
    payload = bytes(range(256)) * (max(LENT_SIZES) // 256)
    with lending_streams() as (near, far), ThreadPoolExecutor() as others:
        sending = others.submit(near.send, MessageType.WRITE, payload=b"\xee" * len(payload), lent=True)
        far._fill(1)
        near.shutdown()
        with pytest.raises(LinkLost):
            sending.result(TIMEOUT_S)
    with lending_streams() as (near, far), ThreadPoolExecutor() as others:
        sending = others.submit(near.send, MessageType.WRITE, payload=payload, lent=True)
        assert bytes(far.receive()[1]) == payload
        sending.result(TIMEOUT_S)


def test_a_lent_payload_never_goes_to_who_got_the_number_of_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that ended is closed while a worker still sends, and whoever opens next gets its numbers."""
    vmsplice, closed = lending._vmsplice, threading.Event()

    def end() -> None:
        near.shutdown()
        near.close()
        closed.set()

    closing = threading.Thread(target=end)

    def vmsplice_late(*arguments: object) -> int:
        closing.start()
        closed.wait(0.5)
        opened.extend(os.open(tmp_path / str(number), os.O_WRONLY | os.O_CREAT) for number in range(8))
        return int(vmsplice(*arguments))

    opened: list[int] = []
    monkeypatch.setattr(lending, "_vmsplice", vmsplice_late)
    with lending_streams() as (near, _):
        with pytest.raises(LinkLost):
            near.send(MessageType.WRITE, payload=bytes(lending.LENT_BYTES_MIN), lent=True)
        closing.join(TIMEOUT_S)
        assert near.fileno() == -1
    for one in opened:
        os.close(one)
    assert not any(path.stat().st_size for path in tmp_path.iterdir())


NO_LENDING: dict[str, tuple[str, object]] = {
    "the kernel takes no pages": ("mirror.lending._vmsplice", lambda *_: -1),
    "pipes are too small": ("mirror.lending.PIPE_BYTES_MIN", 1 << 30),
    "no descriptors are left": ("mirror.lending._Pipe", Mock(side_effect=OSError(errno.EMFILE, "too many"))),
}


@pytest.mark.parametrize("name", NO_LENDING)
def test_what_can_not_be_lent_is_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "_free", [])
    monkeypatch.setattr(*NO_LENDING[name])
    payload = bytearray(range(256)) * (lending.LENT_BYTES_MIN // 256)
    with lending_streams() as (near, far):
        near.send(MessageType.WRITE, payload=payload, lent=True)
        sent = bytes(payload)
        payload[-1] ^= 1
        assert bytes(far.receive()[1]) == sent


def test_queued_messages_arrive_in_order() -> None:
    with connected() as (near, far):
        for size in SIZES[:7]:
            near.send(MessageType.WRITE, length=size, payload=bytes(size))
        for size in SIZES[:7]:
            header, payload = far.receive()
            assert (header.length, len(payload)) == (size, size)
        assert not far.buffered


def _frame(sequence: int, session: int = 0, payload: bytes = b"", crc: int | None = None) -> bytes:
    crc = wire.crc32c(payload) if crc is None and payload else crc or 0
    return (
        wire.encode_message(MessageType.WRITE, 0, session, sequence, 0, len(payload), len(payload), crc, 0, 0) + payload
    )


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (_frame(3), "a gap"),
        (_frame(1), "a repeat"),
        (_frame(2, session=5), "another session"),
        (_frame(2, payload=b"data", crc=1), "a damaged payload"),
        (_frame(2)[:20] + b"\x7f" + _frame(2)[21:], "a damaged header"),
        (b"\x02" + (1 << 40).to_bytes(8, "big"), "a frame of a terabyte"),
        (b"\x01\x00", "a message of several frames"),
        (b"\xff\xff", "unknown flags"),
    ],
)
def test_what_no_sound_peer_sends_is_refused(frame: bytes, why: str) -> None:
    with connected() as (near, far):
        near._socket.sendall(frame)
        with pytest.raises(ProtocolError):
            far.receive()


def test_a_closed_stream_is_a_lost_link() -> None:
    with connected() as (near, far):
        near._socket.sendall(_frame(2)[:30])
        near.shutdown()
        with pytest.raises(LinkLost):
            far.receive()


def test_shutdown_wakes_a_receiver() -> None:
    with connected() as (_, far):
        far.set_timeout(None)
        lost: queue.Queue[type] = queue.Queue()

        def receive() -> None:
            try:
                far.receive()
            except LinkLost as error:
                lost.put(type(error))

        thread = threading.Thread(target=receive)
        thread.start()
        far.shutdown()
        assert lost.get(timeout=TIMEOUT_S) is LinkLost
        thread.join()


def test_whoever_looks_finds_what_comes_and_sleeps_after_that() -> None:
    with connected() as (one, other), Poller() as poller:
        poller.add(other)
        assert not other.spin(1)
        one.send(MessageType.WRITE, payload=b"x" * 4096)
        assert other.spin(1_000_000)
        assert bytes(other.receive()[1]) == b"x" * 4096
        one.send(MessageType.FLUSH)
        assert poller.wait(1_000_000) == [other]
        assert other.receive()[0].type is MessageType.FLUSH
        # Nothing comes while it looks: it sleeps, and is woken as ever.
        waited: list[list[Stream]] = []
        thread = threading.Thread(target=lambda: waited.append(poller.wait(1)))
        thread.start()
        one.send(MessageType.FLUSH)
        thread.join(10)
        assert waited == [[other]]
        other.receive()
        one.close()
        assert other.spin(1_000_000), "whoever receives from it is told"
        assert poller.wait(10) == [other]
        with pytest.raises(LinkLost):
            other.receive()


def test_the_poller_reports_and_wakes() -> None:
    with connected() as (near, far), Poller() as poller:
        poller.add(far)
        near.send(MessageType.FLUSH)
        assert poller.wait() == [far]
        far.receive()
        poller.remove(far)
        poller.close()
        assert poller.wait() == []


def test_a_listener_outlives_a_lack_of_descriptors_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_descriptors_then_a_thread(monkeypatch, "greeting")
    with listening() as (address, streams, strangers):
        with pytest.raises(LinkLost):
            dial(address, TIMEOUT_S)
        said = [strangers.get(timeout=TIMEOUT_S) for _ in range(3)]
        assert said[:2] == ["whoever comes: Too many open files"] * 2
        assert said[2].endswith("can't start the thread; allow more")
        near = dial(address, TIMEOUT_S)
        near.send(MessageType.HELLO)
        streams.get(timeout=TIMEOUT_S)[0].close()
        near.close()


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, b"\xff" * 64, b"\xff" + bytes(8) + b"\x7f\x01"]
)
def test_a_stranger_is_turned_away_and_named(garbage: bytes) -> None:
    with listening() as (address, streams, strangers):
        with socket.create_connection(address, timeout=TIMEOUT_S) as stranger:
            stranger.sendall(garbage)
            assert "127.0.0.1" in strangers.get(timeout=TIMEOUT_S)
        assert streams.empty()
        # and a sound peer still comes in
        near = dial(address, TIMEOUT_S)
        near.send(MessageType.HELLO)
        streams.get(timeout=TIMEOUT_S)[0].close()
        near.close()


def test_a_strangers_first_message_is_bounded() -> None:
    with listening() as (address, streams, strangers):
        near = dial(address, TIMEOUT_S)
        near._socket.sendall(wire.outgoing_prefix(wire.HEADER_BYTES + HELLO_BYTES_MAX + 1))
        assert "bytes" in strangers.get(timeout=TIMEOUT_S)
        near.close()
        near = dial(address, TIMEOUT_S)
        near.send(MessageType.HELLO, payload=bytes(HELLO_BYTES_MAX))
        streams.get(timeout=TIMEOUT_S)[0].close()
        near.close()


def test_of_many_strangers_the_one_that_takes_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "GREETINGS_MAX", 3)
    with listening() as (address, streams, _), contextlib.ExitStack() as held:
        strangers = []
        for _ in range(5):
            stranger = held.enter_context(socket.create_connection(address, timeout=TIMEOUT_S))
            assert stranger.recv(64), "greeted"
            strangers.append(stranger)
        near = dial(address, TIMEOUT_S)
        near.send(MessageType.HELLO)
        streams.get(timeout=TIMEOUT_S)[0].close()
        near.close()
        assert strangers[0].recv(64) == b"", "hung up on"


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def _body(frame: bytes) -> bytes:
    prefix = wire.frame_prefix(frame)
    assert prefix is not None
    return frame[prefix[0] :]


@pytest.mark.parametrize("size", SIZES)
def test_libzmq_dials_and_both_sides_talk(context: zmq.Context[zmq.Socket[bytes]], size: int) -> None:
    payload = b"\xa5" * size
    with listening() as (address, streams, _), context.socket(zmq.DEALER) as peer:
        peer.connect(f"tcp://{address[0]}:{address[1]}")
        peer.send(_body(_frame(1)))
        stream = streams.get(timeout=TIMEOUT_S)[0]
        stream.set_timeout(TIMEOUT_S)
        peer.send(_body(_frame(2, payload=payload)))
        header, received = stream.receive()
        assert (header.type, bytes(received)) == (MessageType.WRITE, payload)
        stream.send(MessageType.ANSWER, payload=payload)
        assert peer.poll(TIMEOUT_S * 1000)
        answer = peer.recv()
        assert wire.decode_header(answer[: wire.HEADER_BYTES]).type is MessageType.ANSWER
        assert answer[wire.HEADER_BYTES :] == payload
        stream.close()


def test_libzmq_receives_lent_payloads(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    payload = bytes(range(256)) * (3 << 12)
    with context.socket(zmq.DEALER) as peer:
        port = peer.bind_to_random_port("tcp://127.0.0.1")
        stream = dial(("127.0.0.1", port), TIMEOUT_S)
        with ThreadPoolExecutor() as others:
            sending = others.submit(stream.send, MessageType.WRITE, payload=payload, lent=True)
            assert peer.poll(TIMEOUT_S * 1000)
            assert peer.recv()[wire.HEADER_BYTES :] == payload
            sending.result(TIMEOUT_S)
        stream.close()


def test_a_libzmq_listener_is_dialled_and_its_pings_answered(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.HEARTBEAT_IVL, 20)
        peer.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2000)
        port = peer.bind_to_random_port("tcp://127.0.0.1")
        stream = dial(("127.0.0.1", port), TIMEOUT_S)
        stream.set_timeout(TIMEOUT_S)
        for number in range(1, 4):
            stream.send(MessageType.WRITE, number=number, payload=b"x" * 300)
            assert peer.poll(TIMEOUT_S * 1000)
            assert wire.decode_header(peer.recv()[: wire.HEADER_BYTES]).number == number
            peer.send(_body(_frame(number)))
            header, _ = stream.receive()
            assert header.sequence == number
        stream.close()
