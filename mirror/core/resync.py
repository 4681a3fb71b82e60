"""Decisions of a resync: which blocks of a chunk travel, whether they are compressed, how far it is.

A chunk's blocks are compared by their digests: equal ones are skipped, zeroes travel as a range, the rest is sent.
Or nothing is compared and all of it is sent. Which of the two is measured: the share of the blocks that were equal of
late, what asking costs and what sending does. After a crash most blocks of the log's extents are equal; of what was
written while the peer was away hardly any is, and digests take as long as the sending or longer.

A digest is 16 bytes of SHA-256; that of a zero block is zero, so that sparse volumes are not hashed. A CRC-32C lost,
though it takes a tenth of the time: it takes one differing block in 2^32 for equal, a lost block in every 16 TiB.
BLAKE2b lost to SHA-256 on processors with SHA instructions (4.0 against 2.5 µs a block).

Whether LZ4 pays is not guessed from ratios and line rates but measured: the seconds that a byte costs, up to the peer's
answer, either way; the dearer way is tried again now and then, because contents and load change.

Pure: the clock is read by the caller. Payloads are looked at here alone in all of the core, and never kept.
"""

import enum
import hashlib
import itertools
import math
from collections.abc import Iterable

from mirror.core.errors import ProtocolError
from mirror.core.limits import (
    BLOCK_BYTES,
    RESYNC_CHUNK_BYTES,
    RESYNC_EVIDENCE_BYTES,
    RESYNC_HELD_CHUNK_BYTES,
    RESYNC_RUN_BYTES,
)

# -- what travels -----------------------------------------------------------------------------------------------------

DIGEST_BYTES = 16
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_ZERO_DIGEST = bytes(DIGEST_BYTES)


class Action(enum.Enum):
    """What is done about a run of blocks."""

    SKIP = "equal on both sides"
    ZERO = "zero here, something else there"
    SEND = "different"


def block_sums(content: bytes | memoryview) -> list[bytes]:
    """The digest of each block of `content`, whose length is a multiple of BLOCK_BYTES."""
    assert len(content) % BLOCK_BYTES == 0, f"{len(content)} bytes are no whole blocks"
    sums = []
    sha256 = hashlib.sha256
    for at in range(0, len(content), BLOCK_BYTES):
        # The copy makes the comparison a memcmp; comparing a memoryview goes byte by byte.
        block = bytes(content[at : at + BLOCK_BYTES])
        sums.append(_ZERO_DIGEST if block == _ZERO_BLOCK else sha256(block).digest()[:DIGEST_BYTES])
    return sums


def encode_sums(sums: list[bytes]) -> bytes:
    return b"".join(sums)


def decode_sums(payload: bytes | memoryview, length: int) -> list[bytes]:
    """The digests that a peer sent for a range of `length` bytes. Raises ProtocolError when they are not as many."""
    raw = bytes(payload)
    if len(raw) * BLOCK_BYTES != length * DIGEST_BYTES:
        raise ProtocolError(f"{len(raw)} bytes of digests for a range of {length} bytes")
    return [raw[at : at + DIGEST_BYTES] for at in range(0, len(raw), DIGEST_BYTES)]


def classify_blocks(local: list[bytes], remote: list[bytes], offset: int) -> list[tuple[Action, int, int]]:
    """Runs (action, offset, length) that make the remote blocks equal to the local ones; they cover the whole range."""
    return _runs(
        (
            Action.SKIP if ours == theirs else Action.ZERO if ours == _ZERO_DIGEST else Action.SEND
            for ours, theirs in zip(local, remote, strict=True)
        ),
        offset,
    )


def uncompared_runs(content: bytes, offset: int) -> list[tuple[Action, int, int]]:
    """The same runs, whatever the remote blocks are."""
    assert len(content) % BLOCK_BYTES == 0, f"{len(content)} bytes are no whole blocks"
    if 0 not in content[::BLOCK_BYTES]:
        # Each block's first byte says so, in a hundredth of the time.
        return [(Action.SEND, offset, len(content))] if content else []
    return _runs(
        (
            Action.ZERO if content[at : at + BLOCK_BYTES] == _ZERO_BLOCK else Action.SEND
            for at in range(0, len(content), BLOCK_BYTES)
        ),
        offset,
    )


def _runs(actions: Iterable[Action], offset: int) -> list[tuple[Action, int, int]]:
    """One action a block from `offset` on, neighbours merged."""
    runs = []
    for action, blocks in itertools.groupby(actions):
        length = BLOCK_BYTES * sum(1 for _ in blocks)
        runs.append((action, offset, length))
        offset += length
    return runs


# -- what was measured of late ----------------------------------------------------------------------------------------

# Weight of the newest whole chunk: four are enough to follow a change, one outlier is not enough to turn it.
_WEIGHT = 0.25
# The way that is not taken is tried again after this many chunks, less and less often while it stays the worse one.
_TRIAL_CHUNKS_MIN = 16
_TRIAL_CHUNKS_MAX = 256


class _Average:
    """Something a byte, of late. Small chunks, whose time is the round trip, count little."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._bytes = 0.0

    def note(self, count_bytes: int, amount: float) -> None:
        kept = 1 - _WEIGHT * min(1.0, count_bytes / RESYNC_CHUNK_BYTES)
        self._sum = self._sum * kept + amount
        self._bytes = self._bytes * kept + count_bytes

    @property
    def known(self) -> bool:
        return self._bytes > 0

    @property
    def well_known(self) -> bool:
        return self._bytes >= RESYNC_EVIDENCE_BYTES

    @property
    def per_byte(self) -> float:
        return self._sum / self._bytes


class _Trials:
    """When the other way is tried again."""

    def __init__(self) -> None:
        self._since = 0
        self._interval_chunks = _TRIAL_CHUNKS_MIN

    def due(self) -> bool:
        """Whether the next chunk is to be one; counts it."""
        self._since += 1
        if self._since < self._interval_chunks:
            return False
        self._since = 0
        self._interval_chunks = min(2 * self._interval_chunks, _TRIAL_CHUNKS_MAX)
        return True

    def restart(self) -> None:
        self._since = 0
        self._interval_chunks = _TRIAL_CHUNKS_MIN


# -- whether to ask for digests ---------------------------------------------------------------------------------------

# Where so much is equal it asks in any case: what is not written spares links and disks that others want too.
_EQUAL_ENOUGH = 0.5


class Asking:
    """Whether to ask for the digests of the next chunk. Ask `wanted`, then report what it took.

    Asking costs digests on both sides and saves the sending of what is equal. Several threads may ask and report
    without a lock: a lost update costs a measurement, never correctness.
    """

    def __init__(self) -> None:
        self._equal = _Average()
        self._ask = _Average()
        self._send = _Average()
        self._flush_s_per_byte = 0.0
        self._unflushed_bytes = 0
        # Of the last chunk that was compared so much was equal that those behind it are looked at, too.
        self._found = False
        self._trials = _Trials()

    def wanted(self) -> bool:
        return self._found or self._pays() or self._trials.due()

    def asked(self, count_bytes: int, equal_bytes: int, seconds: float) -> None:
        """A chunk was compared; `equal_bytes` of it need not be sent."""
        before = self._pays()
        self._found = equal_bytes >= _EQUAL_ENOUGH * count_bytes
        self._equal.note(count_bytes, equal_bytes)
        self._ask.note(count_bytes, seconds)
        if self._pays() is not before:
            self._trials.restart()

    def sent(self, count_bytes: int, seconds: float) -> None:
        """So much was sent and answered."""
        self._send.note(count_bytes, seconds)
        self._unflushed_bytes += count_bytes

    def flushed(self, seconds: float) -> None:
        """What was sent since the last time is stable: a part of what sending costs."""
        if self._unflushed_bytes:
            self._flush_s_per_byte = seconds / self._unflushed_bytes
            self._unflushed_bytes = 0

    def _pays(self) -> bool:
        if not self._equal.well_known:
            # A few scattered blocks say nothing of what comes.
            return True
        equal = self._equal.per_byte
        if equal >= _EQUAL_ENOUGH or not self._send.known:
            return True
        return self._ask.per_byte < equal * (self._send.per_byte + self._flush_s_per_byte)


# -- how many runs go together ----------------------------------------------------------------------------------------

# A chunk that took longer is too long to lock its blocks, and for the target to owe its answers; one that took less
# may be doubled. Far above the two round trips of any link, on which many runs at a time pay most.
_LONG_S, _SHORT_S = 0.5, 0.25


class Gathering:
    """How many scattered runs make a chunk, and requests go together: what is carried out soon, at whatever speed.

    The target answers the requests of one stream together, and those of the next after them, so that on a slow disk
    many would outlast the time after which a request counts as lost. It begins with few, or a session that ended so
    would be followed by another. Several threads may report without a lock: a lost update costs a step.
    """

    def __init__(self) -> None:
        self.bytes_max = RESYNC_HELD_CHUNK_BYTES

    @property
    def count_max(self) -> int:
        return self.bytes_max // RESYNC_RUN_BYTES

    def copied(self, bytes_max: int, seconds: float) -> None:
        """A chunk that began at this `bytes_max` took so long; several that did so say no more than one."""
        if seconds > _LONG_S:
            self.bytes_max = min(self.bytes_max, max(RESYNC_RUN_BYTES, bytes_max // 2))
        elif seconds < _SHORT_S:
            self.bytes_max = max(self.bytes_max, min(RESYNC_CHUNK_BYTES, bytes_max * 2))


# -- compression ------------------------------------------------------------------------------------------------------

# It must save a tenth, or it is not worth the processor time that others want too.
_WORTH_IT = 0.9


class Compression:
    """Whether to compress the next chunk. Ask `wanted`, then report what it took.

    Several threads may ask and report without a lock: a lost update costs a measurement, never correctness.
    """

    def __init__(self) -> None:
        self._packed = _Average()
        self._plain = _Average()
        # Bytes that travel of one that was compressed.
        self._left = _Average()
        self._trials = _Trials()

    def wanted(self) -> bool:
        if not (self._packed.known and self._plain.known):
            return not self._packed.known
        pays = self._pays()
        return not pays if self._trials.due() else pays

    def packed(self, raw_bytes: int, packed_bytes: int, pack_s: float, send_s: float) -> None:
        """A chunk was compressed, and answered `send_s` after that."""
        self._left.note(raw_bytes, packed_bytes)
        self._note(self._packed, raw_bytes, pack_s + send_s)

    def plain(self, raw_bytes: int, send_s: float) -> None:
        """A chunk was sent as it is, and answered after `send_s`."""
        self._note(self._plain, raw_bytes, send_s)

    def _note(self, cost: _Average, raw_bytes: int, seconds: float) -> None:
        before = self._pays()
        cost.note(raw_bytes, seconds)
        if self._pays() is not before:
            self._trials.restart()

    def _pays(self) -> bool:
        if not (self._packed.known and self._plain.known):
            return False
        if self._left.per_byte > _WORTH_IT:
            # Then no time that it saved was its merit.
            return False
        return self._packed.per_byte < _WORTH_IT * self._plain.per_byte


# -- progress ---------------------------------------------------------------------------------------------------------

# The rate shown follows the last seconds, so that it is neither nervous nor about the past.
_RATE_WINDOW_S = 5.0
# Measured over at least this time, or a few chunks that finish together would look like a leap.
_RATE_SAMPLE_S = 0.5


class Progress:
    """How much is done, how fast it goes, when it ends. The caller locks."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.bytes_per_s = 0.0
        self._sampled_s = 0.0
        self._sampled_bytes = 0
        self._samples = 0

    def advance(self, count_bytes: int, elapsed_s: float) -> None:
        """`count_bytes` more are done, `elapsed_s` after the resync began."""
        self.done_bytes += count_bytes
        interval_s = elapsed_s - self._sampled_s
        if interval_s < _RATE_SAMPLE_S:
            if not self._samples and elapsed_s > 0:
                self.bytes_per_s = self.done_bytes / elapsed_s
            return
        rate = (self.done_bytes - self._sampled_bytes) / interval_s
        weight = 1 - math.exp(-interval_s / _RATE_WINDOW_S) if self._samples else 1.0
        self.bytes_per_s += weight * (rate - self.bytes_per_s)
        self._samples += 1
        self._sampled_s = elapsed_s
        self._sampled_bytes = self.done_bytes

    @property
    def eta_s(self) -> int | None:
        """Whole seconds until the end, None while that is not known."""
        left = max(0, self.total_bytes - self.done_bytes)
        if not left:
            return 0
        return math.ceil(left / self.bytes_per_s) if self.bytes_per_s > 0 else None
