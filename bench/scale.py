"""How much is measured: in full, which takes a quarter of an hour at most, or quickly, to see that all of it works."""

from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Scale:
    """Sizes and times of one run."""

    # Medians are of so many rounds; odd, so that a median is one of them.
    rounds: int
    # Length of one measurement. Many short rounds see the same state of a machine that others use too; a few thousand
    # writes are enough for a p99.
    seconds: float
    volume_bytes: int
    # Fits into the smallest log.
    hot_bytes: int
    # Of the volume with the smallest log, written before.
    cold_bytes: int
    # Of the volume that was never written, in each round: 4 MiB an extent.
    touched_bytes: int
    resync_bytes: int
    # How long the foreground writes alone before the resync, and after it.
    foreground_s: float
    scattered_volume_bytes: int
    memory_volume_bytes: int
    free_bytes: int


FULL = Scale(
    rounds=5,
    seconds=1.5,
    volume_bytes=256 * MIB,
    hot_bytes=128 * MIB,
    cold_bytes=5 * GIB,
    touched_bytes=128 * MIB,
    resync_bytes=4 * GIB,
    foreground_s=4.0,
    scattered_volume_bytes=20 * GIB,
    memory_volume_bytes=100 * GIB,
    free_bytes=24 * GIB,
)
QUICK = Scale(
    rounds=1,
    seconds=0.5,
    volume_bytes=32 * MIB,
    hot_bytes=32 * MIB,
    cold_bytes=32 * MIB,
    touched_bytes=32 * MIB,
    resync_bytes=256 * MIB,
    foreground_s=1.0,
    scattered_volume_bytes=2 * GIB,
    # As large as in full: it is sparse, and takes no longer.
    memory_volume_bytes=100 * GIB,
    free_bytes=3 * GIB,
)
