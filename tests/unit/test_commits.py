"""When a write is begun before its flush comes: what a client did of late, and whether the next flush is near."""

import pytest

from mirror.core.commits import WRITES_MAX, Commits
from mirror.core.limits import COMMITS_ALIKE_MIN, COMMITS_MIN


def after(*writes: int) -> Commits:
    """A flush after each of these counts of writes but the last, which has none yet."""
    commits = Commits()
    for number, count in enumerate(writes):
        if number:
            commits.flushed()
        commits.writes += count
    return commits


@pytest.mark.parametrize(
    ("writes", "likely"),
    [
        ([1], False),
        ([1] * COMMITS_MIN, False),
        ([1] * (COMMITS_MIN + 1), True),
        ([WRITES_MAX] * (COMMITS_MIN + 1), True),
        ([WRITES_MAX + 1] * (COMMITS_MIN + 1), False),
        # Who goes on writing is no committer, from the first write too many on, until it has become one again.
        ([1] * COMMITS_MIN + [WRITES_MAX + 1], False),
        ([1] * COMMITS_MIN + [WRITES_MAX + 1, 1], False),
        ([1] * COMMITS_MIN + [WRITES_MAX + 1] + [1] * COMMITS_MIN, False),
        ([1] * COMMITS_MIN + [WRITES_MAX + 1] + [1] * (COMMITS_MIN + 1), True),
        # A flush of nothing says nothing.
        ([0] * 9 + [1], False),
        ([1, 0, 1, 0, 1, 0, 1], True),
    ],
)
def test_a_flush_is_likely(writes: list[int], likely: bool) -> None:
    assert after(*writes).likely is likely


@pytest.mark.parametrize(
    ("writes", "last"),
    [
        ([0], False),
        ([1] * COMMITS_ALIKE_MIN + [0], True),
        ([1] * (COMMITS_ALIKE_MIN - 1) + [0], False),
        # Of two writes each, behind the second one.
        ([2] * COMMITS_ALIKE_MIN + [0], False),
        ([2] * COMMITS_ALIKE_MIN + [1], True),
        # It is written already, and more came.
        ([1] * COMMITS_ALIKE_MIN + [1], False),
        ([2] * COMMITS_ALIKE_MIN + [2], False),
        # One like the other, and so many in a row.
        ([1, 2] * COMMITS_ALIKE_MIN + [0], False),
        ([1] * COMMITS_ALIKE_MIN + [2, 0], False),
        ([1] * COMMITS_ALIKE_MIN + [2] + [1] * COMMITS_ALIKE_MIN + [0], True),
        ([WRITES_MAX] * COMMITS_ALIKE_MIN + [WRITES_MAX - 1], True),
        ([WRITES_MAX + 1] * COMMITS_ALIKE_MIN + [WRITES_MAX], False),
    ],
)
def test_the_write_behind_which_a_flush_comes(writes: list[int], last: bool) -> None:
    assert after(*writes).next_is_last is last
