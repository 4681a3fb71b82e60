"""Reads what device-mapper's log-writes target recorded, and plays it back onto an empty image.

The target passes writes through to a device and logs them on a second one in the order in which they became durable: a
plain write stands in the log only once a flush came after it had ended, a FUA write at once. A mark stands where it was
sent. So the image as played back up to a mark holds exactly what a disk must hold that lost its cache at that moment.

On the log device, in sectors of the size that the first one names: the superblock (magic, version, entries, sector
size), then entries (sector, sectors, flags, length of the data) of one sector each, a mark with its text behind it,
a write followed by its data.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

SUPER = struct.Struct("<QQQI")
ENTRY = struct.Struct("<QQQQ")
MAGIC, VERSION = 0x6A736677736872, 1
DISCARD, MARK = 4, 8


def entries(log: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """Flags, offset, length and data of each; a mark's data is its name."""
    with log.open("rb") as file:
        magic, version, count, sector_bytes = SUPER.unpack(file.read(SUPER.size))
        if not magic:
            return  # nothing was logged yet
        assert (magic, version) == (MAGIC, VERSION), f"not a log of this version: {magic:x} {version}"
        place = sector_bytes
        for _ in range(count):
            file.seek(place)
            sector, sectors, flags, name_bytes = ENTRY.unpack(file.read(ENTRY.size))
            place += sector_bytes
            length = sectors * sector_bytes
            if flags & MARK:
                data = file.read(name_bytes).rstrip(b"\0")
            elif flags & DISCARD:
                data = bytes(length)
            else:
                file.seek(place)
                data = file.read(length)
                place += length
            yield flags, sector * sector_bytes, length, data


def played_back(log: Path, size_bytes: int) -> Iterator[tuple[str, bytearray]]:
    """For each mark: its name and the image at that moment, which the next step changes."""
    image = bytearray(size_bytes)
    for flags, offset, length, data in entries(log):
        if flags & MARK:
            yield data.decode(), image
        else:
            image[offset : offset + length] = data
    assert len(image) == size_bytes, "a write behind the end of the device"


def marks(log: Path) -> list[str]:
    """The names of the marks so far; the target writes its superblock anew with each."""
    return [data.decode() for flags, _, _, data in entries(log) if flags & MARK]
