"""The dirty map: which blocks of the volume the peer is missing.

A dictionary from extent number to an integer of 1 024 bits, one a block, that holds only extents with a dirty block; a
wholly dirty extent shares one integer. A byte an extent says which are there, so that the next one is found by
`bytearray.find` however large the volume. Bits are set for every block that a range touches and cleared only for
blocks that lie wholly inside a range: whatever is in doubt stays dirty.

Promises: no bit outside the volume; counting is O(1); marking one block costs a dictionary look-up and two operations
on an integer. The caller locks.

What lost: a flat bitmap (32 MiB a TiB, wanted or not; counting and scanning it in Python is slow), a set of block
numbers (60 bytes a dirty block), a sorted list of runs (random writes make it as long as the set, and slower).
"""

from collections.abc import Iterator

from mirror.core.limits import BLOCK_BYTES, BLOCKS_PER_EXTENT, EXTENT_BYTES

FULL = (1 << BLOCKS_PER_EXTENT) - 1

_BLOCK_SHIFT = BLOCK_BYTES.bit_length() - 1
_EXTENT_SHIFT = BLOCKS_PER_EXTENT.bit_length() - 1
_BLOCK_IN_EXTENT = BLOCKS_PER_EXTENT - 1
# One bit a block of an extent: looking it up is quicker than shifting it into place.
_BIT = tuple(1 << block for block in range(BLOCKS_PER_EXTENT))


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


class DirtyMap:
    """The dirty blocks of a volume of `size_bytes` (a multiple of the block)."""

    def __init__(self, size_bytes: int) -> None:
        if size_bytes <= 0 or size_bytes % BLOCK_BYTES:
            raise ValueError(f"{size_bytes} bytes are no whole number of blocks")
        self.dirty_blocks = 0
        self._bits: dict[int, int] = {}
        self._present = bytearray()
        self._reach(size_bytes)

    def _reach(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.extent_count = -(-size_bytes // EXTENT_BYTES)
        self._last_extent = self.extent_count - 1
        self._last_full = (1 << ((size_bytes - 1) % EXTENT_BYTES // BLOCK_BYTES + 1)) - 1
        self._present.extend(bytes(self.extent_count - len(self._present)))

    def grow(self, size_bytes: int) -> None:
        """The volume has become larger; what is new is clean."""
        if size_bytes < self.size_bytes or size_bytes % BLOCK_BYTES:
            raise ValueError(f"a map of {self.size_bytes} bytes can't become one of {size_bytes}")
        self._reach(size_bytes)

    @property
    def dirty_bytes(self) -> int:
        return self.dirty_blocks * BLOCK_BYTES

    # -- one extent ---------------------------------------------------------------------------------------------------

    def bits(self, extent: int) -> int:
        """The dirty blocks of an extent, bit i for its block i."""
        return self._bits.get(extent, 0)

    def set_bits(self, extent: int, bits: int) -> None:
        """Replace what is known of an extent."""
        full = self._full(extent)
        if bits < 0 or bits & ~full:
            raise ValueError(f"extent {extent}: bits outside the volume")
        old = self._bits.get(extent, 0)
        if bits == old:
            return
        self.dirty_blocks += bits.bit_count() - old.bit_count()
        if bits:
            self._bits[extent] = FULL if bits == FULL else bits
            self._present[extent] = 1
        else:
            del self._bits[extent]
            self._present[extent] = 0

    def _full(self, extent: int) -> int:
        if not 0 <= extent <= self._last_extent:
            raise ValueError(f"extent {extent} is outside the volume")
        return self._last_full if extent == self._last_extent else FULL

    # -- marking and clearing -----------------------------------------------------------------------------------------

    def mark(self, offset_bytes: int, length_bytes: int) -> None:
        """Make every block dirty that the range touches."""
        end = offset_bytes + length_bytes
        if offset_bytes < 0 or end > self.size_bytes:
            raise ValueError(f"{offset_bytes}+{length_bytes} is outside the volume")
        if length_bytes <= 0:
            return
        first = offset_bytes >> _BLOCK_SHIFT
        last = (end - 1) >> _BLOCK_SHIFT
        if first != last:
            self._mark_blocks(first, last + 1)
            return
        extent = first >> _EXTENT_SHIFT
        bit = _BIT[first & _BLOCK_IN_EXTENT]
        old = self._bits.get(extent)
        if old is None:
            self._bits[extent] = bit
            self._present[extent] = 1
            self.dirty_blocks += 1
        elif not old & bit:
            new = old | bit
            self._bits[extent] = FULL if new == FULL else new
            self.dirty_blocks += 1

    def mark_extent(self, extent: int) -> None:
        self.set_bits(extent, self._full(extent))

    def mark_all(self) -> None:
        self._bits = dict.fromkeys(range(self.extent_count), FULL)
        self._bits[self._last_extent] = self._last_full
        self._present = bytearray(b"\x01") * self.extent_count
        self.dirty_blocks = self.size_bytes // BLOCK_BYTES

    def merge(self, other: "DirtyMap") -> None:
        """Make dirty here what is dirty there."""
        if other.size_bytes != self.size_bytes:
            raise ValueError(f"maps of {self.size_bytes} and {other.size_bytes} bytes")
        for extent, bits in other._bits.items():
            self.set_bits(extent, self._bits.get(extent, 0) | bits)

    def remove(self, other: "DirtyMap") -> None:
        """Make clean here what is dirty there."""
        for extent, bits in other._bits.items():
            if extent in self._bits:
                self.set_bits(extent, self._bits[extent] & ~bits)

    def copy(self) -> "DirtyMap":
        same = DirtyMap(self.size_bytes)
        same.merge(self)
        return same

    def mark_where(self, other: "DirtyMap", offset_bytes: int, length_bytes: int) -> None:
        """Make dirty here the blocks that are dirty in `other` and lie wholly inside the range."""
        first = -(-offset_bytes // BLOCK_BYTES)
        end = min(offset_bytes + length_bytes, self.size_bytes) // BLOCK_BYTES
        for extent, mask in self._masks(first, end):
            both = other.bits(extent) & mask
            if both:
                self.set_bits(extent, self._bits.get(extent, 0) | both)

    def clear(self, offset_bytes: int, length_bytes: int) -> None:
        """Make clean every block that lies wholly inside the range."""
        first = -(-offset_bytes // BLOCK_BYTES)
        end = min(offset_bytes + length_bytes, self.size_bytes) // BLOCK_BYTES
        for extent, mask in self._masks(first, end):
            old = self._bits.get(extent)
            if old is not None:
                self.set_bits(extent, old & ~mask)

    def clear_all(self) -> None:
        self._bits = {}
        self._present = bytearray(self.extent_count)
        self.dirty_blocks = 0

    def _mark_blocks(self, first: int, end: int) -> None:
        for extent, mask in self._masks(first, end):
            self.set_bits(extent, self._bits.get(extent, 0) | mask)

    def _masks(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The blocks from `first` up to `end` as (extent, bits)."""
        while first < end:
            extent = first >> _EXTENT_SHIFT
            start = first & _BLOCK_IN_EXTENT
            count = min(end - first, BLOCKS_PER_EXTENT - start)
            yield extent, FULL if count == BLOCKS_PER_EXTENT else ((1 << count) - 1) << start
            first += count

    # -- asking -------------------------------------------------------------------------------------------------------

    def is_dirty(self, offset_bytes: int, length_bytes: int) -> bool:
        """Whether the range touches a dirty block."""
        if length_bytes <= 0 or not self._bits:
            return False
        first = offset_bytes // BLOCK_BYTES
        end = -(-(offset_bytes + length_bytes) // BLOCK_BYTES)
        return any(self._bits.get(extent, 0) & mask for extent, mask in self._masks(first, end))

    def extents(self) -> list[int]:
        """The extents that have a dirty block, in order."""
        return sorted(self._bits)

    def next_run(self, from_offset_bytes: int, max_bytes: int) -> tuple[int, int] | None:
        """The first dirty (offset, length) at or after the block of `from_offset_bytes`; at most `max_bytes` of it."""
        count_max = max_bytes // BLOCK_BYTES
        if count_max < 1:
            raise ValueError(f"a run of {max_bytes} bytes holds no block")
        block = from_offset_bytes // BLOCK_BYTES
        extent = block >> _EXTENT_SHIFT
        rest = self._bits.get(extent, 0) >> (block & _BLOCK_IN_EXTENT)
        if not rest:
            extent = self._present.find(1, extent + 1)
            if extent < 0:
                return None
            block = extent << _EXTENT_SHIFT
            rest = self._bits[extent]
        skipped = _lowest_bit(rest)
        first = block + skipped
        count = self._count_run(first, rest >> skipped, count_max)
        return first * BLOCK_BYTES, count * BLOCK_BYTES

    def _count_run(self, first: int, rest: int, count_max: int) -> int:
        """How many blocks from `first` on are dirty; `rest` holds the bits of its extent from there, lowest first."""
        count = _lowest_bit(~rest)
        while count < count_max and not (first + count) & _BLOCK_IN_EXTENT:
            more = _lowest_bit(~self._bits.get((first + count) >> _EXTENT_SHIFT, 0))
            if not more:
                break
            count += more
        return min(count, count_max)

    def runs(self) -> Iterator[tuple[int, int]]:
        """All dirty (offset, length), neighbours merged, in order."""
        run = self.next_run(0, self.size_bytes)
        while run is not None:
            yield run
            run = self.next_run(run[0] + run[1], self.size_bytes)
