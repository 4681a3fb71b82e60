"""What two replicas say to each other: bytes, and nothing else.

Two layers. **ZMTP 3.0** (ZeroMQ's wire protocol, https://rfc.zeromq.org/spec/23), NULL mechanism, a DEALER at either
end: greeting, READY, then frames. A minor version of 1 and its PING are answered, so that any libzmq can be the other
end. **Messages**: each is one ZMTP frame of a fixed header and a payload. The header's own checksum covers the header,
the `payload_crc` in it covers the payload: a receiver knows how much to read, and where to, before the payload comes.

Either side sends its greeting and its READY at once, and its first message only when the other's READY has come: libzmq
takes an earlier one for a broken handshake.

How a receiver reads without copying: the frame's prefix is 2 bytes (body up to 255 bytes) or 9, so

    prefix = frame_prefix(view)                  what has arrived so far; None: read more (at most 9 bytes are needed)
    header = decode_header(the HEADER_BYTES behind the prefix)
    receive header.payload_length bytes straight to where they belong, then compare crc32c() with header.payload_crc

and a sender writes `encode_message(...)` and the payload with one gathered send. Nothing here keeps a byte: a hostile
peer's length is refused before anything is allocated for it (FRAME_BYTES_MAX, COMMAND_BYTES_MAX).

Promises: decode(encode(x)) == x; whatever bytes come in, the answer is a value, None for "not enough yet" or
ProtocolError.

What lost: libzmq's sockets (two thread hops a message at each end), several frames a message (a prefix and a system
call more each), JSON or msgpack headers (ten times the time), a checksum over header and payload together (nothing
could be believed before the last byte has come).
"""

import enum
import json
import struct
from typing import Any, Final, NamedTuple

import crc32c as checksums

from mirror.core.errors import ProtocolError
from mirror.core.limits import COMMAND_BYTES_MAX, CONTROL_BYTES_MAX, FRAME_BYTES_MAX, HEADER_BYTES, WORDS_CHARACTERS_MAX

# -- ZMTP -------------------------------------------------------------------------------------------------------------

GREETING_BYTES = 64
# The longest frame prefix: flags and a length of eight bytes.
PREFIX_BYTES_MAX = 9

# Bit 0 says that more frames of the message follow; nothing here sends or takes such ones.
_LONG, _COMMAND = 2, 4
# The flags of a message of one short frame.
SHORT_MESSAGE = 0
_SHORT_BODY_MAX = 255
_LONG_PREFIX = struct.Struct(">BQ")

_SIGNATURE_FIRST, _SIGNATURE_LAST = 0xFF, 0x7F
_SIGNATURE_BYTES = 10
_MAJOR, _MINOR = 3, 0
_MECHANISM = b"NULL".ljust(20, b"\0")
_MECHANISM_AT = 12
_SOCKET_TYPE = b"DEALER"
_PING_CONTEXT_BYTES_MAX = 16
_PING_TTL_BYTES = 2


def greeting() -> bytes:
    """The first 64 bytes of either side: signature, version, mechanism, as-server 0, filler."""
    signature = bytes((_SIGNATURE_FIRST, *bytes(8), _SIGNATURE_LAST))
    return (signature + bytes((_MAJOR, _MINOR)) + _MECHANISM).ljust(GREETING_BYTES, b"\0")


def check_greeting_start(start: bytes) -> None:
    """Raise ProtocolError as soon as the first bytes of a greeting, however few, show a stranger."""
    if start[:1] not in (b"", bytes((_SIGNATURE_FIRST,))):
        raise ProtocolError(f"it does not speak ZeroMQ: its first bytes are {start[:_SIGNATURE_BYTES]!r}")
    if len(start) >= _SIGNATURE_BYTES and start[_SIGNATURE_BYTES - 1] != _SIGNATURE_LAST:
        raise ProtocolError(f"it does not speak ZeroMQ: its first bytes are {start[:_SIGNATURE_BYTES]!r}")
    if len(start) > _SIGNATURE_BYTES and start[_SIGNATURE_BYTES] < _MAJOR:
        raise ProtocolError(f"it speaks ZMTP with revision {start[_SIGNATURE_BYTES]}, not 3")
    mechanism = start[_MECHANISM_AT : _MECHANISM_AT + len(_MECHANISM)]
    if mechanism != _MECHANISM[: len(mechanism)]:
        raise ProtocolError(f"it wants the security mechanism {mechanism.rstrip(bytes(1))!r}, not NULL")


def parse_greeting(raw: bytes) -> int:
    """Check a whole greeting; returns the peer's minor version of ZMTP 3."""
    if len(raw) != GREETING_BYTES:
        raise ProtocolError(f"a greeting of {len(raw)} bytes")
    check_greeting_start(raw)
    return raw[_SIGNATURE_BYTES + 1]


def frame_prefix(view: memoryview | bytes) -> tuple[int, int, bool] | None:
    """The prefix that `view` begins with: its bytes, the bytes of the body behind it, and whether it is a command.

    None while it is not complete. Raises ProtocolError for frames that no sound peer sends: unknown flags, a message of
    several frames, a body over FRAME_BYTES_MAX or a command over COMMAND_BYTES_MAX.
    """
    available = len(view)
    if not available:
        return None
    flags = view[0]
    # The only good ones: message or command, short or long.
    if flags & ~(_LONG | _COMMAND):
        raise ProtocolError(f"a ZMTP frame with flags {flags:#04x}: unknown ones, or a message of several frames")
    if flags & _LONG:
        if available < PREFIX_BYTES_MAX:
            return None
        prefix_bytes, body_bytes = PREFIX_BYTES_MAX, int.from_bytes(view[1:PREFIX_BYTES_MAX], "big")
    else:
        if available < 2:
            return None
        prefix_bytes, body_bytes = 2, view[1]
    is_command = flags >= _COMMAND
    if body_bytes > (COMMAND_BYTES_MAX if is_command else FRAME_BYTES_MAX):
        raise ProtocolError(f"a ZMTP {'command' if is_command else 'frame'} of {body_bytes} bytes")
    return prefix_bytes, body_bytes, is_command


def outgoing_prefix(body_bytes: int, command: bool = False) -> bytes:
    """The prefix of a frame with a body of this many bytes."""
    flags = _COMMAND if command else 0
    if body_bytes > _SHORT_BODY_MAX:
        return _LONG_PREFIX.pack(flags | _LONG, body_bytes)
    return bytes((flags, body_bytes))


def _command(name: bytes, rest: bytes) -> bytes:
    body = bytes((len(name),)) + name + rest
    return outgoing_prefix(len(body), command=True) + body


def _split_command(body: bytes) -> tuple[bytes, bytes]:
    """Name and rest of a command's body."""
    name_bytes = body[0] if body else 0
    if not 1 <= name_bytes < len(body):
        raise ProtocolError(f"a ZMTP command of {len(body)} bytes without a name")
    return body[1 : 1 + name_bytes], body[1 + name_bytes :]


def ready_command(socket_type: bytes) -> bytes:
    """The READY that ends either side's part of the NULL handshake, as a whole frame."""
    return _command(b"READY", _metadata(b"Socket-Type", socket_type) + _metadata(b"Identity", b""))


def _metadata(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


def parse_ready(body: bytes) -> dict[str, bytes]:
    """The metadata of a READY command, names in lower case. Raises ProtocolError unless a DEALER sent it."""
    name, rest = _split_command(body)
    if name != b"READY":
        raise _unexpected_command(name, rest)
    metadata: dict[str, bytes] = {}
    while rest:
        name_end = 1 + rest[0]
        value_at = name_end + 4
        value_end = value_at + int.from_bytes(rest[name_end:value_at], "big")
        if rest[0] == 0 or value_at > len(rest) or value_end > len(rest):
            raise ProtocolError("a READY command with torn metadata")
        metadata[rest[1:name_end].decode("ascii", "replace").lower()] = rest[value_at:value_end]
        rest = rest[value_end:]
    if metadata.get("socket-type") != _SOCKET_TYPE:
        raise ProtocolError(f"the peer's socket is of type {metadata.get('socket-type', b'')!r}, not DEALER")
    return metadata


def answer_command(body: bytes) -> bytes:
    """What must be sent back for a command between messages, as a whole frame: a PONG for a PING, else nothing."""
    name, rest = _split_command(body)
    if name == b"PING":
        context = rest[_PING_TTL_BYTES:]
        if len(rest) < _PING_TTL_BYTES or len(context) > _PING_CONTEXT_BYTES_MAX:
            raise ProtocolError(f"a ZMTP PING of {len(rest)} bytes")
        return _command(b"PONG", context)
    if name == b"PONG":
        return b""
    raise _unexpected_command(name, rest)


def _unexpected_command(name: bytes, rest: bytes) -> ProtocolError:
    if name == b"ERROR":
        return ProtocolError(f"the peer's ZeroMQ refused the connection: {rest[1:]!r}")
    return ProtocolError(f"an unexpected ZMTP command {name!r}")


# -- messages ---------------------------------------------------------------------------------------------------------

# Of the header's layout: the same as long as a reader may find type, session, number and lengths where they are.
VERSION = 1
# Of all that is said by such messages: types, flags, JSON keys, control operations, the order of a handshake. Each side
# names the newest that it speaks and the oldest that it still does, in the first message; one that names none speaks 1.
SESSION_VERSION = 4
SESSION_VERSION_MIN = 2
_MAGIC = 0x626E  # "nb"


class MessageType(enum.IntEnum):
    """What a message asks or says. Values never change their meaning."""

    # Begins a handshake (payload: the standing as JSON); with a number: names a data stream of a session.
    HELLO = 1
    HELLO_REPLY = 2
    # A request, an answer or a notice in JSON on the control stream.
    CONTROL = 3
    # A sign of life with the last number sent on each stream (invariant one-session).
    HEARTBEAT = 4
    WRITE = 5
    ZERO = 6
    TRIM = 7
    FLUSH = 8
    READ = 9
    # Asks for the digests of a range's blocks.
    SUMS = 10
    # The request is carried out, or failed with the errno in `code`.
    ANSWER = 11
    # Protocol B: the request is in memory; an ANSWER follows.
    RECEIVED = 12
    REFUSED = 13
    # Asked outside of a session, changes nothing: what the peer says of itself, and a part of its dirty map.
    QUESTION = 14
    TOLD = 15


class Flag:
    """Bits of a message's flags. Plain numbers: a test of an `enum.Flag` takes longer than the whole header."""

    # Stable on disk before it is answered.
    FUA: Final = 1
    # A ZERO may leave a hole.
    MAY_TRIM: Final = 2
    # The payload is an LZ4 block of `length` bytes.
    LZ4: Final = 8
    # Sent by a resync, not by a client.
    RESYNC: Final = 16
    # Send RECEIVED when it is in memory (protocol B).
    ACK_RECEIVED: Final = 32
    # The only request in flight: look for the next one for `number` microseconds after the answer, before sleeping.
    SPIN: Final = 64
    # Say in `number` of the ANSWER how many nanoseconds the disk took; an older release says 0.
    TIMED: Final = 128
    # A WRITE to be kept and not applied before it may be; `number`: see mirror.core.parked.
    PARK: Final = 256


class Header(NamedTuple):
    """A decoded header. `length` is the range's, `payload_length` what travels; `number` means what the type says."""

    type: MessageType
    flags: int
    session: int
    sequence: int
    offset: int
    length: int
    payload_length: int
    payload_crc: int
    code: int
    number: int


# magic, version, type, flags, session, sequence, offset, length, payload_length, payload_crc, code, number
_FIELDS = struct.Struct("<HBBIQQQIIIiQ")
_CHECKSUM = struct.Struct("<I")
_HEADER = struct.Struct(_FIELDS.format + "I")
assert _HEADER.size == HEADER_BYTES, "limits.py states the size that bounds a frame"

_TYPES = {int(kind): kind for kind in MessageType}
_SHORT_PREFIXES = tuple(outgoing_prefix(HEADER_BYTES + size) for size in range(_SHORT_BODY_MAX - HEADER_BYTES + 1))
_PAYLOAD_BYTES_MAX = FRAME_BYTES_MAX - HEADER_BYTES

_crc = checksums.crc32c
_new_header = tuple.__new__


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC-32C of any contiguous buffer, in hardware; crcmod is the reference in the tests."""
    return _crc(data)


def encode_message(
    kind: int,
    flags: int,
    session: int,
    sequence: int,
    offset: int,
    length: int,
    payload_length: int,
    payload_crc: int,
    code: int,
    number: int,
) -> bytes:
    """Frame prefix and header of a message; the payload follows them on the wire as it is."""
    assert payload_length <= _PAYLOAD_BYTES_MAX, f"a payload of {payload_length} bytes"
    fields = _FIELDS.pack(
        _MAGIC, VERSION, kind, flags, session, sequence, offset, length, payload_length, payload_crc, code, number
    )
    if payload_length < len(_SHORT_PREFIXES):
        prefix = _SHORT_PREFIXES[payload_length]
    else:
        prefix = _LONG_PREFIX.pack(_LONG, HEADER_BYTES + payload_length)
    return prefix + fields + _CHECKSUM.pack(_crc(fields))


def decode_header(raw: bytes | memoryview) -> Header:
    """The header in these HEADER_BYTES bytes. Raises ProtocolError for anything else."""
    raw = bytes(raw)
    if len(raw) != HEADER_BYTES:
        raise ProtocolError(f"a message header of {len(raw)} bytes")
    fields = _HEADER.unpack(raw)
    known = _TYPES.get(fields[2])
    if fields[0] != _MAGIC or fields[1] != VERSION or known is None or fields[-1] != _crc(raw[:-4]):
        raise _bad_header(raw)
    return _new_header(Header, (known, *fields[3:-1]))


def decode_object(payload: bytes | memoryview, what: str) -> dict[str, Any]:
    """The JSON object that a control or handshake message carries. Raises ProtocolError for anything else."""
    if len(payload) > CONTROL_BYTES_MAX:
        raise ProtocolError(f"{what} of {len(payload)} bytes")
    try:
        message = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} that is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"{what} that is not an object")
    return message


def words(value: object) -> str:
    """What the peer says to people, as far as a log line or a status holds it."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > WORDS_CHARACTERS_MAX:
        text = f"{text[:WORDS_CHARACTERS_MAX]}..."
    if text.isprintable():
        return text
    # A line feed of its would be a line of the log that we did not write.
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _bad_header(raw: bytes) -> ProtocolError:
    magic, version, kind, *_, checksum = _HEADER.unpack(raw)
    if magic != _MAGIC:
        return ProtocolError("a message that is not nbdmirror's")
    if version != VERSION:
        return ProtocolError(
            f"a message of version {version}, this program speaks {VERSION}",
            remedy="run the same release of nbdmirror on both nodes",
        )
    if checksum != _crc(raw[:-4]):
        return ProtocolError("a message with a damaged header")
    return ProtocolError(f"a message of unknown type {kind}")
