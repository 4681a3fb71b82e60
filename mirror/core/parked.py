"""Parked writes: sent while the log's record of their extents is being written, kept by the peer until it is durable.

So a cold extent costs the larger of the record and the round trip, not their sum. Neither side applies the write before
the record is durable (invariant log-before-write). The peer keeps it where no killed process loses it, and says so;
the primary answers its client when it has that word, its record, and the write on its own disk. Nothing more is sent
for that: the peer learns which ones may be applied from what comes anyway, namely

    another parked write   names the lowest number that is still open: all below may be applied; and takes the place of
                           the one that had its slot
    any other request      of blocks that overlap: the primary would not have sent it before
    a flush                names all that are still open (News), for it covers the others
    a notice               at times, the same words, for a primary that has nothing else to say

Here are the numbers that the primary gives, and the slots of `DIR/parked` in which the peer keeps the writes, as bytes.
What the file holds need not be durable: it outlives killed processes because the kernel has it, and counts in the boot
in which it was written. So a slot is either whole, which its checksums tell, or of a write that nobody was answered.

Promises: decode(encode(x)) == x. Other bytes than a slot's, or those of another life of the replica, are None; other
words than news are a ProtocolError.
"""

import struct
from typing import Final, NamedTuple

import crc32c

from mirror.core.errors import ProtocolError
from mirror.core.limits import BLOCK_BYTES, PARKED_BYTES_MAX, PARKED_MAX

# -- numbers ----------------------------------------------------------------------------------------------------------

# In a message's number: that of the write, and how far below it the lowest open one is.
_DISTANCE_BITS: Final = 8
_DISTANCE_MAX: Final = (1 << _DISTANCE_BITS) - 1
assert PARKED_MAX <= _DISTANCE_MAX


class News(NamedTuple):
    """All up to `through` may be applied but those that are `open`."""

    through: int
    open: tuple[int, ...]


class ParkedNumbers:
    """Those of one session, on the primary. The caller locks. A number is *open* until its write is over."""

    __slots__ = ("_flushed", "_next", "_noticed", "_open")

    def __init__(self) -> None:
        self._next = 1
        self._open: set[int] = set()
        # What was told last.
        self._flushed = News(0, ())
        self._noticed = News(0, ())

    def take(self) -> int:
        """What the next one's message says; 0 when its slot is not free yet."""
        number = self._next
        if number - PARKED_MAX in self._open:
            return 0
        self._next += 1
        self._open.add(number)
        return number << _DISTANCE_BITS | (number - min(self._open))

    def over(self, said: int) -> None:
        """The one whose message said so is answered, and so are its record and the peer's word; or its session is over.

        Not as soon as its record is durable: what was told is told for good, also of one that the peer has yet to get.
        """
        self._open.discard(said >> _DISTANCE_BITS)

    @property
    def all_said(self) -> bool:
        """A flush has said of each that it may be applied: none is open, and the next flush says nothing."""
        return self._flushed == (self._next - 1, ())

    def _news(self) -> News:
        return News(self._next - 1, tuple(sorted(self._open)))

    def flush_says(self) -> News | None:
        """What a flush must say; None when an earlier one has said it."""
        told, self._flushed = self._flushed, self._news()
        return None if told == self._flushed else self._flushed

    def notice(self) -> News | None:
        """The same for a notice, which knows nothing of what flushes said."""
        told, self._noticed = self._noticed, self._news()
        return None if told == self._noticed else self._noticed


def split_number(said: int) -> tuple[int, int]:
    """What a message says: the write's number, and the lowest one that is still open."""
    number = said >> _DISTANCE_BITS
    return number, number - (said & _DISTANCE_MAX)


_U64 = struct.Struct("<Q")


def encode_news(news: News) -> bytes:
    """A flush's payload."""
    return b"".join([_U64.pack(number) for number in (news.through, *news.open)])


def decode_news(payload: bytes | memoryview) -> News:
    """Raises ProtocolError."""
    if not payload or len(payload) % _U64.size or len(payload) > _U64.size * (1 + PARKED_MAX):
        raise ProtocolError(f"a flush with {len(payload)} bytes")
    through, *still_open = (number for (number,) in _U64.iter_unpack(payload))
    return News(through, tuple(still_open))


# -- slots ------------------------------------------------------------------------------------------------------------

_MAGIC = b"NMPK"
_VERSION = 1
# magic version | epoch offset | length, checksum of the data | and of all before it
_FIELDS = struct.Struct("<4sH xx QQ II")
_CHECKSUM = struct.Struct("<I")
HEAD_BYTES = _FIELDS.size + _CHECKSUM.size
EMPTY_HEAD = bytes(HEAD_BYTES)
SLOT_BYTES = BLOCK_BYTES + PARKED_BYTES_MAX
FILE_BYTES = PARKED_MAX * SLOT_BYTES


class ParkedWrite(NamedTuple):
    """`data` belongs at `offset`."""

    offset: int
    data: bytes


def slot_of(number: int) -> int:
    return number % PARKED_MAX


def encode_slot(epoch: int, offset: int, data: bytes | memoryview) -> bytes:
    """What a slot begins with; `epoch` is that of the replica's log, which is another one after each start."""
    assert 0 < len(data) <= PARKED_BYTES_MAX, f"a write of {len(data)} bytes to be parked"
    fields = _FIELDS.pack(_MAGIC, _VERSION, epoch, offset, len(data), crc32c.crc32c(data))
    return b"".join((fields, _CHECKSUM.pack(crc32c.crc32c(fields)), data))


def decode_slot(raw: bytes, epoch: int) -> ParkedWrite | None:
    """The write that a slot of this epoch holds, if it holds one."""
    if len(raw) < HEAD_BYTES:
        return None
    fields = raw[: _FIELDS.size]
    magic, version, found_epoch, offset, length, checksum = _FIELDS.unpack(fields)
    whole = crc32c.crc32c(fields) == _CHECKSUM.unpack_from(raw, _FIELDS.size)[0]
    if not whole or magic != _MAGIC or version != _VERSION or found_epoch != epoch:
        return None
    data = raw[HEAD_BYTES : HEAD_BYTES + length]
    if not 0 < length <= PARKED_BYTES_MAX or len(data) != length or crc32c.crc32c(data) != checksum:
        return None
    return ParkedWrite(offset, data)
