"""What travels in a resync, when it is compressed, and what its progress says, on synthetic traces."""

import hashlib
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.core.errors import ProtocolError
from mirror.core.limits import BLOCK_BYTES, MIB, RESYNC_CHUNK_BYTES, RESYNC_HELD_CHUNK_BYTES, RESYNC_RUN_BYTES
from mirror.core.resync import (
    DIGEST_BYTES,
    Action,
    Asking,
    Compression,
    Gathering,
    Progress,
    block_sums,
    classify_blocks,
    decode_sums,
    encode_sums,
    uncompared_runs,
)

# Few different blocks, so that equal ones meet; 0 is the zero block.
CONTENTS = [bytes([value]) * BLOCK_BYTES for value in range(4)]


def content_of(blocks: list[int]) -> bytes:
    return b"".join(CONTENTS[block] for block in blocks)


def apply(runs: list[tuple[Action, int, int]], local: bytes, remote: bytes, offset: int) -> bytes:
    """What a target has after it did what the runs say."""
    result = bytearray(remote)
    for action, at, length in runs:
        place = slice(at - offset, at - offset + length)
        if action is Action.ZERO:
            result[place] = bytes(length)
        elif action is Action.SEND:
            result[place] = local[place]
    return bytes(result)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=24), st.integers(0, 5))
def test_the_runs_make_the_copies_equal_and_send_nothing_needless(pairs: list[tuple[int, int]], first: int) -> None:
    local = content_of([one for one, _ in pairs])
    remote = content_of([other for _, other in pairs])
    offset = first * BLOCK_BYTES
    runs = classify_blocks(block_sums(local), block_sums(memoryview(bytearray(remote))), offset)
    assert apply(runs, local, remote, offset) == local
    # They cover the range without gaps, and neighbours differ in what is done about them.
    assert [at for _, at, _ in runs] == [offset + sum(length for _, _, length in runs[:n]) for n in range(len(runs))]
    assert sum(length for _, _, length in runs) == len(local)
    assert all(one[0] is not other[0] for one, other in itertools.pairwise(runs))
    for action, wanted in (
        (Action.SKIP, [one == other for one, other in pairs]),
        (Action.ZERO, [one == 0 != other for one, other in pairs]),
        (Action.SEND, [one not in (0, other) for one, other in pairs]),
    ):
        assert sum(length for kind, _, length in runs if kind is action) == sum(wanted) * BLOCK_BYTES


def test_digests_are_of_sha256_and_zero_for_zeroes() -> None:
    sums = block_sums(CONTENTS[0] + CONTENTS[2] + bytes(BLOCK_BYTES - 1) + b"\1")
    assert sums[0] == bytes(DIGEST_BYTES)
    assert sums[1] == hashlib.sha256(CONTENTS[2]).digest()[:DIGEST_BYTES]
    assert any(sums[2])
    assert block_sums(b"") == []


def test_digests_travel_and_their_number_is_checked() -> None:
    sums = block_sums(content_of([0, 1, 2]))
    payload = encode_sums(sums)
    assert decode_sums(memoryview(payload), 3 * BLOCK_BYTES) == sums
    for wrong in (payload[:-1], payload + b"\0", payload[:-DIGEST_BYTES], b""):
        with pytest.raises(ProtocolError):
            decode_sums(wrong, 3 * BLOCK_BYTES)


@given(st.lists(st.integers(0, 3), max_size=24), st.integers(0, 5))
def test_uncompared_runs_send_all_but_zeroes(blocks: list[int], first: int) -> None:
    # A block that only begins with zeroes is none of them.
    local = b"".join(bytes(BLOCK_BYTES - 1) + b"\1" if block == 3 else CONTENTS[block] for block in blocks)
    offset = first * BLOCK_BYTES
    runs = uncompared_runs(local, offset)
    assert apply(runs, local, b"?" * len(local), offset) == local
    assert sum(length for _, _, length in runs) == len(local)
    assert all(one[0] is not other[0] for one, other in itertools.pairwise(runs))
    assert sum(length for action, _, length in runs if action is Action.ZERO) == blocks.count(0) * BLOCK_BYTES
    assert not any(action is Action.SKIP for action, _, _ in runs)


# -- whether to ask for digests ---------------------------------------------------------------------------------------


class Target:
    """What a target holds, and what a byte costs: asking, sending, making it stable."""

    def __init__(self, equal: float, ask_s_per_mib: float, send_s_per_mib: float, flush_s_per_mib: float = 0.0) -> None:
        self.equal = equal
        self.ask_s = ask_s_per_mib / MIB
        self.send_s = send_s_per_mib / MIB
        self.flush_s = flush_s_per_mib / MIB

    def run(self, asking: Asking, chunks: int, rng: random.Random) -> float:
        """The share of the chunks that were asked for."""
        asked = unstable_bytes = 0
        for number in range(chunks):
            sent_bytes = RESYNC_CHUNK_BYTES
            if asking.wanted():
                asked += 1
                equal_bytes = round(RESYNC_CHUNK_BYTES * min(1.0, self.equal * rng.uniform(0.8, 1.2)))
                asking.asked(RESYNC_CHUNK_BYTES, equal_bytes, RESYNC_CHUNK_BYTES * self.ask_s * rng.uniform(0.8, 1.2))
                sent_bytes -= equal_bytes
            if sent_bytes:
                asking.sent(sent_bytes, sent_bytes * self.send_s * rng.uniform(0.8, 1.2))
                unstable_bytes += sent_bytes
            if number % 64 == 63:
                asking.flushed(unstable_bytes * self.flush_s)
                unstable_bytes = 0
        return asked / chunks


@pytest.mark.parametrize(
    ("target", "pays"),
    [
        (Target(0.0, 0.0015, 0.001), False),  # written while the peer was away
        (Target(0.0, 0.0015, 0.08), False),  # the same over 100 Mbit
        (Target(0.1, 0.0015, 0.001), False),  # hashing is dearer than the line
        (Target(0.1, 0.003, 0.08), True),  # the line is dearer than hashing
        (Target(0.3, 0.0015, 0.001, 0.01), True),  # the disk is
        (Target(0.98, 0.0015, 0.001), True),  # after a crash
        (Target(1.0, 0.0015, 0.0001), True),  # for the sake of what others want of the disk
    ],
)
def test_it_asks_where_that_saves_more_than_it_costs(target: Target, pays: bool, rng: random.Random) -> None:
    asking = Asking()
    target.run(asking, 80, rng)
    share = target.run(asking, 1000, rng)
    assert share == 1 if pays else share < 0.02


def test_the_first_chunks_are_asked_for_and_tell() -> None:
    asking = Asking()
    for _ in range(3):
        assert asking.wanted()
        asking.asked(RESYNC_CHUNK_BYTES, 0, 0.001)
        asking.sent(RESYNC_CHUNK_BYTES, 0.001)
    assert not asking.wanted()


def test_a_few_scattered_blocks_tell_nothing() -> None:
    asking = Asking()
    for _ in range(100):
        assert asking.wanted()
        asking.asked(BLOCK_BYTES, 0, 0.001)
        asking.sent(BLOCK_BYTES, 0.001)
    for _ in range(5):
        assert asking.wanted()
        asking.asked(RESYNC_CHUNK_BYTES, RESYNC_CHUNK_BYTES, 0.001)


def test_it_notices_where_equal_blocks_begin_and_end(rng: random.Random) -> None:
    asking = Asking()
    target = Target(0.0, 0.0015, 0.001)
    target.run(asking, 1000, rng)
    target.equal = 1.0
    target.run(asking, 300, rng)
    assert target.run(asking, 100, rng) == 1
    target.equal = 0.0
    target.run(asking, 20, rng)
    assert target.run(asking, 500, rng) < 0.05


# -- compression ------------------------------------------------------------------------------------------------------


class Line:
    """A link and a processor: what a chunk takes, compressed or not."""

    def __init__(self, rng: random.Random, bytes_per_s: float, pack_bytes_per_s: float, ratio: float) -> None:
        self.rng = rng
        self.bytes_per_s = bytes_per_s
        self.pack_bytes_per_s = pack_bytes_per_s
        self.ratio = ratio

    def run(self, compression: Compression, chunks: int) -> float:
        """The share of chunks that were compressed."""
        packed = 0
        for _ in range(chunks):
            noise = self.rng.uniform(0.8, 1.2)
            size = RESYNC_CHUNK_BYTES
            if compression.wanted():
                packed += 1
                out = int(size * self.ratio)
                compression.packed(size, out, size / self.pack_bytes_per_s * noise, out / self.bytes_per_s * noise)
            else:
                compression.plain(size, size / self.bytes_per_s * noise)
        return packed / chunks


@pytest.mark.parametrize(
    ("bytes_per_s", "pack_bytes_per_s", "ratio", "pays"),
    [
        (12 * MIB, 500 * MIB, 0.4, True),  # 100 Mbit, text
        (120 * MIB, 500 * MIB, 0.5, True),  # 1 Gbit, a database
        (120 * MIB, 1500 * MIB, 1.0, False),  # what is compressed already: LZ4 gives up quickly, yet not for free
        (1200 * MIB, 500 * MIB, 0.5, False),  # 10 Gbit: the processor is slower than the line
        (1200 * MIB, 4000 * MIB, 0.05, True),  # nearly empty pages
    ],
)
def test_it_compresses_where_that_is_faster(
    bytes_per_s: float, pack_bytes_per_s: float, ratio: float, pays: bool, rng: random.Random
) -> None:
    compression = Compression()
    line = Line(rng, bytes_per_s, pack_bytes_per_s, ratio)
    line.run(compression, 30)
    share = line.run(compression, 1000)
    assert share > 0.95 if pays else share < 0.05


def test_what_becomes_no_smaller_is_not_compressed_however_times_vary(rng: random.Random) -> None:
    """Beside clients a chunk takes now this, now that; a compressed one that was quick says nothing."""
    compression = Compression()
    packed = 0
    for _ in range(2000):
        took_s = 0.0003 * rng.lognormvariate(0, 0.6)
        if compression.wanted():
            packed += 1
            compression.packed(RESYNC_HELD_CHUNK_BYTES, RESYNC_HELD_CHUNK_BYTES + 500, 0.00001, took_s)
        else:
            compression.plain(RESYNC_HELD_CHUNK_BYTES, took_s)
    assert packed < 40


def test_it_notices_that_contents_or_line_have_changed(rng: random.Random) -> None:
    compression = Compression()
    line = Line(rng, 120 * MIB, 500 * MIB, 0.4)
    line.run(compression, 1000)
    line.ratio = 1.0
    line.run(compression, 300)
    assert line.run(compression, 300) < 0.1
    # Here nothing but a trial can tell: plain chunks take as long as before.
    line.ratio = 0.2
    line.run(compression, 1500)
    assert line.run(compression, 300) > 0.9
    line.ratio = 1.0
    line.run(compression, 300)
    line.bytes_per_s, line.ratio = 12 * MIB, 0.4
    # Trials have become rare while it did not pay.
    line.run(compression, 600)
    assert line.run(compression, 300) > 0.9


def test_small_chunks_do_not_spoil_what_the_large_ones_tell() -> None:
    compression = Compression()
    for _ in range(8):
        compression.packed(RESYNC_CHUNK_BYTES, RESYNC_CHUNK_BYTES // 2, 0.001, 0.004)
        compression.plain(RESYNC_CHUNK_BYTES, 0.008)
    for _ in range(8):
        compression.packed(BLOCK_BYTES, BLOCK_BYTES // 2, 0.0001, 0.0005)
    assert compression.wanted()


def test_the_first_two_chunks_measure_either_way() -> None:
    compression = Compression()
    assert compression.wanted()
    assert compression.wanted(), "nothing was measured yet"
    compression.packed(100, 50, 1.0, 1.0)
    assert not compression.wanted()
    compression.plain(100, 5.0)
    assert compression.wanted()


# -- how many runs go together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run_s", "runs"),
    [(0.0, RESYNC_CHUNK_BYTES // RESYNC_RUN_BYTES), (0.02, 16), (0.2, 2), (2.0, 1)],
)
def test_as_many_runs_are_gathered_as_are_carried_out_soon(run_s: float, runs: int) -> None:
    gathering = Gathering()
    assert gathering.bytes_max == RESYNC_HELD_CHUNK_BYTES
    for _ in range(10):
        bytes_max, seconds = gathering.bytes_max, run_s * gathering.count_max
        for _ in range(4):
            gathering.copied(bytes_max, seconds)
    assert gathering.count_max == runs
    assert gathering.bytes_max == runs * RESYNC_RUN_BYTES


# -- progress ---------------------------------------------------------------------------------------------------------


def test_a_steady_resync_says_when_it_ends() -> None:
    progress = Progress(1000 * MIB)
    assert progress.eta_s is None
    for second in range(1, 11):
        progress.advance(50 * MIB, second)
        assert progress.bytes_per_s == pytest.approx(50 * MIB)
        assert progress.eta_s == 20 - second
    assert progress.done_bytes == 500 * MIB
    progress.advance(500 * MIB, 11)
    assert progress.eta_s == 0


def test_the_rate_follows_a_change_within_seconds_but_not_each_chunk() -> None:
    progress = Progress(10_000 * MIB)
    elapsed_s = 0.0
    for _ in range(200):
        elapsed_s += 0.1
        progress.advance(10 * MIB, elapsed_s)
    steady = progress.bytes_per_s
    assert steady == pytest.approx(100 * MIB, rel=0.01)
    # Several chunks that end at one moment are no leap.
    for _ in range(4):
        progress.advance(10 * MIB, elapsed_s)
    assert progress.bytes_per_s == steady
    for _ in range(150):
        elapsed_s += 0.1
        progress.advance(1 * MIB, elapsed_s)
    assert progress.bytes_per_s == pytest.approx(10 * MIB, rel=0.7)
    assert progress.bytes_per_s < 20 * MIB


def test_nothing_to_do_is_done() -> None:
    assert Progress(0).eta_s == 0


def test_a_rate_is_shown_from_the_first_chunk_on() -> None:
    progress = Progress(10 * MIB)
    progress.advance(1 * MIB, 0.1)
    assert progress.bytes_per_s == pytest.approx(10 * MIB)
    assert progress.eta_s == 1
    early = Progress(10 * MIB)
    early.advance(1 * MIB, 0.0)
    assert early.eta_s is None
