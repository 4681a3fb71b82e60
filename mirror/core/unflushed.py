"""What was written since the last flush, and the pieces in which the disk gets it once a flush comes.

A flush of much fills the disk's queue: whatever else is to be durable waits behind it, records of the log first (with
512 MiB of data 170 to 240 ms; 10 ms when the disk gets them 4 MiB at a time, for a tenth more time in all, and none
where the data is scattered). So a large flush begins extent by extent and never has more than a window on its way.

Pure: the caller writes, flushes and waits. A note that two threads spoil costs nothing but a flush that is less even.
"""

from mirror.core.extent_set import ExtentSet
from mirror.core.limits import EVEN_FLUSH_BYTES, EXTENT_BYTES, WRITE_BACK_WINDOW_BYTES


class Unflushed:
    """Which extents were touched since the last flush, and by how many bytes in all."""

    __slots__ = ("_bytes", "_touched")

    def __init__(self) -> None:
        # A bit each, as in an ExtentSet, which is not compiled.
        self._touched = bytearray()
        self._bytes = 0

    def grow(self, size_bytes: int) -> None:
        """The volume has this size from now on."""
        extent_count = -(-size_bytes // EXTENT_BYTES)
        self._touched.extend(bytes(-(-extent_count // 8) - len(self._touched)))

    def wrote(self, offset: int, length: int) -> None:
        """So much is in the page cache, within the volume, and not durable."""
        self._bytes += length
        touched = self._touched
        extent, last = offset // EXTENT_BYTES, (offset + length - 1) // EXTENT_BYTES
        try:
            while extent <= last:
                touched[extent >> 3] |= 1 << (extent & 7)
                extent += 1
        except IndexError:
            pass  # it grows at this moment

    def take(self) -> tuple[list[int], int]:
        """A flush begins: the extents to be written back before it, and how many of them may be on their way at once.

        None where so little was written that the flush is short anyway.
        """
        written_bytes, self._bytes = self._bytes, 0
        if not written_bytes:
            return [], 0
        touched, self._touched = self._touched, bytearray(len(self._touched))
        if written_bytes < EVEN_FLUSH_BYTES:
            return [], 0
        found = ExtentSet(8 * len(touched))
        found.update_bits(0, int.from_bytes(touched, "little"))
        extents = list(found)
        if not extents:
            return [], 0
        # What was written twice counts twice: at most a whole extent.
        bytes_each = min(written_bytes // len(extents), EXTENT_BYTES)
        return extents, max(1, WRITE_BACK_WINDOW_BYTES // bytes_each)
