"""The bytes between replicas: round trips, every truncation and flip, strangers, and a real libzmq at the other end."""

import socket
import struct
import tracemalloc
from collections.abc import Iterator

import crcmod.predefined
import pytest
import zmq
from hypothesis import example, given
from hypothesis import strategies as st

from mirror.core import wire
from mirror.core.errors import ProtocolError
from mirror.core.limits import COMMAND_BYTES_MAX, FRAME_BYTES_MAX, HEADER_BYTES
from mirror.core.wire import Flag, Header, MessageType

reference_crc32c = crcmod.predefined.mkPredefinedCrcFun("crc-32c")

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
HEADERS = st.builds(
    Header,
    type=st.sampled_from(MessageType),
    flags=U32,
    session=U64,
    sequence=U64,
    offset=U64,
    length=U32,
    payload_length=st.one_of(st.integers(0, 300), st.integers(0, FRAME_BYTES_MAX - HEADER_BYTES)),
    payload_crc=U32,
    code=st.integers(-(1 << 31), (1 << 31) - 1),
    number=U64,
)


def message(kind: MessageType, payload: bytes = b"", session: int = 7, sequence: int = 1, **fields: int) -> bytes:
    """A whole message as a sender writes it."""
    values = {"flags": 0, "offset": 0, "length": 0, "code": 0, "number": 0} | fields
    head = wire.encode_message(
        kind,
        values["flags"],
        session,
        sequence,
        values["offset"],
        values["length"],
        len(payload),
        wire.crc32c(payload),
        values["code"],
        values["number"],
    )
    return head + payload


class Reader:
    """Takes bytes in whatever pieces they come, and reads them as the module's docstring says."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self.greeted = False
        self.ready = False
        self.to_send = b""
        self.messages: list[tuple[Header, bytes]] = []

    def feed(self, piece: bytes) -> None:
        self.waiting += piece
        while self._take():
            pass

    def _take(self) -> bool:
        if not self.greeted:
            wire.check_greeting_start(bytes(self.waiting[: wire.GREETING_BYTES]))
            if len(self.waiting) < wire.GREETING_BYTES:
                return False
            wire.parse_greeting(self._pop(wire.GREETING_BYTES))
            self.greeted = True
            return True
        prefix = wire.frame_prefix(bytes(self.waiting[: wire.PREFIX_BYTES_MAX]))
        if prefix is None or len(self.waiting) < prefix[0] + prefix[1]:
            return False
        body = self._pop(prefix[0] + prefix[1])[prefix[0] :]
        if prefix[2]:
            if self.ready:
                self.to_send += wire.answer_command(body)
            else:
                wire.parse_ready(body)
                self.ready = True
            return True
        header = wire.decode_header(memoryview(body)[:HEADER_BYTES])
        payload = body[HEADER_BYTES:]
        if len(payload) != header.payload_length or wire.crc32c(payload) != header.payload_crc:
            raise ProtocolError("damaged")
        self.messages.append((header, payload))
        return True

    def _pop(self, count: int) -> bytes:
        taken = bytes(self.waiting[:count])
        del self.waiting[:count]
        return taken


# -- messages ---------------------------------------------------------------------------------------------------------


@given(HEADERS)
@example(Header(MessageType.WRITE, 0, 1, 2, 3, 4, 255 - HEADER_BYTES, 0, 0, 0))
@example(Header(MessageType.WRITE, 0, 1, 2, 3, 4, 256 - HEADER_BYTES, 0, 0, 0))
def test_a_header_comes_back_as_it_went(header: Header) -> None:
    raw = wire.encode_message(*header)
    prefix = wire.frame_prefix(raw)
    assert prefix is not None
    prefix_bytes, body_bytes, is_command = prefix
    assert body_bytes == HEADER_BYTES + header.payload_length
    assert prefix_bytes == (2 if body_bytes < 256 else 9)
    assert not is_command
    assert len(raw) == prefix_bytes + HEADER_BYTES
    assert raw[:prefix_bytes] == wire.outgoing_prefix(body_bytes)
    decoded = wire.decode_header(memoryview(raw)[prefix_bytes:])
    assert decoded == header
    assert type(decoded) is Header
    assert decoded.type is header.type


def test_every_flipped_bit_of_a_header_is_noticed() -> None:
    raw = message(MessageType.WRITE, offset=4096, length=4096, number=1 << 63)[2:]
    assert wire.decode_header(raw).offset == 4096
    for bit in range(8 * HEADER_BYTES):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            wire.decode_header(bytes(damaged))


def test_every_truncated_header_is_refused() -> None:
    raw = message(MessageType.FLUSH)[2:]
    for size in range(HEADER_BYTES):
        with pytest.raises(ProtocolError):
            wire.decode_header(raw[:size])
    with pytest.raises(ProtocolError):
        wire.decode_header(raw + b"\0")


def sealed(**fields: int) -> bytes:
    """A header with a right checksum around whatever its first fields are."""
    body = struct.pack("<HBB", fields["magic"], fields["version"], fields["type"]) + bytes(HEADER_BYTES - 8)
    return body + struct.pack("<I", wire.crc32c(body))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"magic": 0x1234, "version": 1, "type": 5}, "not nbdmirror's"),
        ({"magic": 0x626E, "version": 2, "type": 5}, "version 2"),
        ({"magic": 0x626E, "version": 1, "type": 0}, "unknown type 0"),
        ({"magic": 0x626E, "version": 1, "type": 200}, "unknown type 200"),
    ],
)
def test_a_sound_header_of_something_else_is_named(fields: dict[str, int], said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        wire.decode_header(sealed(**fields))


def test_the_codes_on_the_wire_stay_what_they_are() -> None:
    # Another release must understand them: add to this list, never change it.
    assert {kind.name: int(kind) for kind in MessageType} == {
        "HELLO": 1,
        "HELLO_REPLY": 2,
        "CONTROL": 3,
        "HEARTBEAT": 4,
        "WRITE": 5,
        "ZERO": 6,
        "TRIM": 7,
        "FLUSH": 8,
        "READ": 9,
        "SUMS": 10,
        "ANSWER": 11,
        "RECEIVED": 12,
        "REFUSED": 13,
        "QUESTION": 14,
        "TOLD": 15,
    }
    assert (Flag.FUA, Flag.MAY_TRIM, Flag.LZ4, Flag.RESYNC, Flag.ACK_RECEIVED) == (1, 2, 8, 16, 32)
    assert message(MessageType.ZERO, offset=4096, length=8192, flags=Flag.MAY_TRIM).hex() == (
        "003c6e62010602000000070000000000000001000000000000000010000000000000002000000000"
        "000000000000000000000000000000000000355ca5af"
    )


@pytest.mark.parametrize("size", [0, 1, 3, 56, 4095, 4096, 65537])
def test_the_fast_checksum_agrees_with_the_reference(size: int) -> None:
    data = bytes(n * 31 % 251 for n in range(size))
    assert wire.crc32c(data) == reference_crc32c(data)
    assert wire.crc32c(bytearray(data)) == reference_crc32c(data)
    assert wire.crc32c(memoryview(bytearray(b"x" + data))[1:]) == reference_crc32c(data)


# -- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"\x01\x05",  # more frames follow
        b"\x05\x05",  # a command of several frames
        b"\x08\x05",
        b"\x80\x05",
        b"\xff" + bytes(8),
        b"\x02" + (FRAME_BYTES_MAX + 1).to_bytes(8, "big"),
        b"\x02" + b"\xff" * 8,
        b"\x06" + (COMMAND_BYTES_MAX + 1).to_bytes(8, "big"),
    ],
)
def test_frames_that_no_sound_peer_sends_are_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.frame_prefix(raw)


def test_a_prefix_is_known_as_soon_as_it_is_whole() -> None:
    for body_bytes in (0, 1, 255, 256, FRAME_BYTES_MAX):
        raw = wire.outgoing_prefix(body_bytes)
        for size in range(len(raw)):
            assert wire.frame_prefix(raw[:size]) is None
        assert wire.frame_prefix(memoryview(raw + b"rest")) == (len(raw), body_bytes, False)
    # A long form with a short length is allowed, if not clever.
    assert wire.frame_prefix(b"\x02" + (5).to_bytes(8, "big")) == (9, 5, False)


@given(st.binary(max_size=200))
@example(b"\x06\x00\x00\x00\x00\x00\x00\x00\x00")
@example(b"\x04\x06\x05READY")
@example(b"\x04\x0a\x05READY\x00\x00\x00\x00")
def test_any_bytes_end_in_an_answer_or_a_protocol_error(raw: bytes) -> None:
    for start in (b"", wire.greeting(), wire.greeting() + wire.ready_command(b"DEALER")):
        reader = Reader()
        try:
            reader.feed(start + raw)
        except ProtocolError:
            pass
        for function in (wire.parse_ready, wire.answer_command, wire.decode_header, wire.parse_greeting):
            try:
                function(raw)
            except ProtocolError:
                pass


def test_a_hostile_length_costs_no_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            wire.frame_prefix(b"\x02\x7f" + b"\xff" * 7)
        torn = b"\x05READY" + b"\x0bSocket-Type" + b"\x7f\xff\xff\xff"
        with pytest.raises(ProtocolError):
            wire.parse_ready(torn)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# -- the ZMTP handshake -----------------------------------------------------------------------------------------------


def test_a_greeting_is_zmtp_3_with_null_security() -> None:
    greeting = wire.greeting()
    assert len(greeting) == wire.GREETING_BYTES
    assert greeting[:12] == b"\xff" + bytes(8) + b"\x7f\x03\x00"
    assert wire.parse_greeting(greeting) == 0
    for size in range(wire.GREETING_BYTES + 1):
        wire.check_greeting_start(greeting[:size])
    newer = bytearray(greeting)
    newer[11] = 1
    assert wire.parse_greeting(bytes(newer)) == 1
    with pytest.raises(ProtocolError):
        wire.parse_greeting(greeting[:-1])


@pytest.mark.parametrize(
    ("stranger", "known_after"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 1),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 1),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60), 1),
        (b"NBDMAGIC", 1),
        (bytes(64), 1),
        (b"\xff" * 64, 10),
        (b"\xff" + bytes(8) + b"\x7f\x01" + bytes(53), 11),  # ZMTP 2.0
        (b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(47), 13),
        (b"\xff" + bytes(8) + b"\x7f\x03\x00NULLX" + bytes(47), 17),
    ],
)
def test_a_stranger_is_known_by_its_first_bytes(stranger: bytes, known_after: int) -> None:
    for size in range(known_after):
        wire.check_greeting_start(stranger[:size])
    with pytest.raises(ProtocolError):
        wire.check_greeting_start(stranger[:known_after])
    with pytest.raises(ProtocolError):
        wire.check_greeting_start(stranger)


def command(raw: bytes) -> bytes:
    """The body of a command frame."""
    prefix = wire.frame_prefix(raw)
    assert prefix is not None
    assert prefix[2]
    assert len(raw) == prefix[0] + prefix[1]
    return raw[prefix[0] :]


def test_ready_names_a_dealer() -> None:
    body = command(wire.ready_command(b"DEALER"))
    assert wire.parse_ready(body) == {"socket-type": b"DEALER", "identity": b""}
    for size in range(len(body)):
        # Torn anywhere but between two entries after the type.
        if body[size:] != b"\x08Identity" + bytes(4):
            with pytest.raises(ProtocolError):
                wire.parse_ready(body[:size])
    for other in (b"ROUTER", b"PUB", b""):
        with pytest.raises(ProtocolError, match="not DEALER"):
            wire.parse_ready(command(wire.ready_command(other)))
    with pytest.raises(ProtocolError, match="Invalid"):
        wire.parse_ready(b"\x05ERROR\x0eInvalid client")


def test_a_ping_gets_its_pong() -> None:
    assert command(wire.answer_command(b"\x04PING\x00\x0acontext")) == b"\x04PONGcontext"
    assert command(wire.answer_command(b"\x04PING\x00\x0a")) == b"\x04PONG"
    assert wire.answer_command(b"\x04PONGcontext") == b""
    for bad in (
        b"\x04PING",
        b"\x04PING\x00",
        b"\x04PING\x00\x00" + bytes(17),
        b"\x05PONG",
        b"\x05READY",
        b"\x05ERROR\x02no",
        b"",
    ):
        with pytest.raises(ProtocolError):
            wire.answer_command(bad)


# -- streams in pieces ------------------------------------------------------------------------------------------------


def conversation() -> tuple[bytes, list[bytes]]:
    """A stream with everything in it, and the payloads that it carries."""
    payloads = [b"", b"x" * 100, b"y" * 195, b"z" * 196, bytes(range(256)) * 4]
    raw = wire.greeting() + wire.ready_command(b"DEALER")
    for number, payload in enumerate(payloads):
        raw += message(MessageType.WRITE, payload, sequence=number)
        raw += b"\x04\x0b\x04PING\x00\x0aabcd"
    return raw, payloads


def test_a_stream_cut_in_two_anywhere_says_the_same() -> None:
    raw, payloads = conversation()
    for cut in range(len(raw) + 1):
        reader = Reader()
        reader.feed(raw[:cut])
        reader.feed(raw[cut:])
        assert [payload for _, payload in reader.messages] == payloads
        assert reader.to_send == b"\x04\x09\x04PONGabcd" * len(payloads)


def test_a_stream_byte_by_byte_says_the_same() -> None:
    raw, payloads = conversation()
    reader = Reader()
    for at in range(len(raw)):
        reader.feed(raw[at : at + 1])
    assert [payload for _, payload in reader.messages] == payloads
    assert not reader.waiting


# -- a real libzmq at the other end -----------------------------------------------------------------------------------


@pytest.fixture
def dealer() -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    made = context.socket(zmq.DEALER)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.RCVTIMEO, 10_000)
    made.setsockopt(zmq.SNDTIMEO, 10_000)
    yield made
    made.close()
    context.term()


@pytest.fixture(params=["libzmq connects", "libzmq listens"])
def line(request: pytest.FixtureRequest, dealer: zmq.Socket[bytes]) -> Iterator[socket.socket]:
    """A plain TCP connection with `dealer` at the other end."""
    if request.param == "libzmq connects":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(10)
            dealer.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
            connection, _ = listener.accept()
    else:
        port = dealer.bind_to_random_port("tcp://127.0.0.1")
        connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(10)
    with connection:
        yield connection


def shake_hands(connection: socket.socket, reader: Reader, piece_bytes: int) -> None:
    """Greeting and READY; messages may follow only when the other side's READY is here."""
    send_in_pieces(connection, wire.greeting() + wire.ready_command(b"DEALER"), piece_bytes)
    read_until(connection, reader, 0, piece_bytes)


def send_in_pieces(connection: socket.socket, raw: bytes, piece_bytes: int) -> None:
    for at in range(0, len(raw), piece_bytes):
        connection.sendall(raw[at : at + piece_bytes])


def read_until(connection: socket.socket, reader: Reader, count: int, piece_bytes: int) -> None:
    """Read in pieces of at most `piece_bytes` until READY and so many messages have come."""
    while not reader.ready or len(reader.messages) < count:
        piece = connection.recv(piece_bytes)
        assert piece, "libzmq hung up"
        reader.feed(piece)


@pytest.mark.parametrize("piece_bytes", [1, 7, 65536])
def test_libzmq_understands_us_and_we_it(line: socket.socket, dealer: zmq.Socket[bytes], piece_bytes: int) -> None:
    reader = Reader()
    payloads = [b"", b"p" * 195, b"q" * 196, bytes(range(256)) * 16]
    sent = [message(MessageType.WRITE, payload, sequence=n) for n, payload in enumerate(payloads)]
    # What libzmq calls a message is our header and payload, without the frame's prefix.
    bodies = [raw[(2 if len(raw) <= 257 else 9) :] for raw in sent]
    shake_hands(line, reader, piece_bytes)
    send_in_pieces(line, b"".join(sent), piece_bytes)
    for body in bodies:
        assert dealer.recv_multipart() == [body]
    for body in bodies:
        dealer.send(body)
    read_until(line, reader, len(payloads), piece_bytes)
    assert [payload for _, payload in reader.messages] == payloads
    assert [header.sequence for header, _ in reader.messages] == list(range(len(payloads)))


def test_libzmq_heartbeats_are_answered(dealer: zmq.Socket[bytes]) -> None:
    dealer.setsockopt(zmq.HEARTBEAT_IVL, 20)
    dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
    port = dealer.bind_to_random_port("tcp://127.0.0.1")
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(10)
        reader = Reader()
        shake_hands(connection, reader, 65536)
        for _ in range(3):
            while not reader.to_send:
                reader.feed(connection.recv(65536))
            connection.sendall(reader.to_send)
            reader.to_send = b""
        connection.sendall(message(MessageType.FLUSH))
        assert dealer.recv() == message(MessageType.FLUSH)[2:]


def test_a_libzmq_socket_of_another_type_is_refused() -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 0)
        port = push.bind_to_random_port("tcp://127.0.0.1")
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.settimeout(10)
            connection.sendall(wire.greeting())
            with pytest.raises(ProtocolError, match=r"PUSH.*not DEALER"):
                read_until(connection, Reader(), 0, 65536)
