"""The checker of the kill tests can fail: planted losses, tears and old contents are found."""

from pathlib import Path

import pytest

from tests.integration.history import History
from tests.integration.writer import BLOCK_BYTES, block_contents

SEED = 42


def history_of(tmp_path: Path, *runs: str) -> History:
    history = History(SEED)
    for number, lines in enumerate(runs):
        path = tmp_path / f"{number}.log"
        path.write_text("\n".join(f"{line.strip()} 1.0" for line in lines.strip().splitlines()) + "\n")
        history.add(path)
    return history


def wrong(history: History, **blocks: bytes) -> list[str]:
    contents = {int(name.removeprefix("b")): data for name, data in blocks.items()}
    return history.wrong_blocks(lambda block: contents[block], contents)


def data(identifier: int, block: int = 0) -> bytes:
    return block_contents(SEED, block, identifier)


ZERO = bytes(BLOCK_BYTES)
TWO_ANSWERED = """
    S 1 W 0 1 0
    A 1
    S 2 W 0 1 0
    A 2
"""


def test_the_last_answered_write_must_be_there(tmp_path: Path) -> None:
    history = history_of(tmp_path, TWO_ANSWERED)
    assert wrong(history, b0=data(2)) == []
    assert "a later one" in wrong(history, b0=data(1))[0]
    assert "zeroes" in wrong(history, b0=ZERO)[0]


@pytest.mark.parametrize("second", ["E 2 5", "L 2", ""])
def test_an_unanswered_write_may_stand_or_not(tmp_path: Path, second: str) -> None:
    history = history_of(tmp_path, f"S 1 W 0 1 0\nA 1\nS 2 W 0 1 0\n{second or 'S 3 F 0 0 0'}")
    assert wrong(history, b0=data(1)) == []
    assert wrong(history, b0=data(2)) == []
    assert wrong(history, b0=ZERO) != []


def test_overlapping_writes_may_end_in_either_order(tmp_path: Path) -> None:
    history = history_of(tmp_path, "S 1 W 0 1 0\nS 2 W 0 1 0\nA 2\nA 1")
    assert wrong(history, b0=data(1)) == wrong(history, b0=data(2)) == []


def test_an_unanswered_write_is_over_with_its_run(tmp_path: Path) -> None:
    history = history_of(tmp_path, "S 1 W 0 1 0\nL 1", "S 5 W 0 1 0\nA 5")
    assert wrong(history, b0=data(5)) == []
    assert wrong(history, b0=data(1)) != []


def test_only_what_was_flushed_survives_where_that_is_the_promise(tmp_path: Path) -> None:
    lines = "S 1 W 0 2 0\nA 1\nS 2 F 0 0 0\nS 3 W 0 1 0\nA 3\nA 2\nS 4 W 1 1 1\nA 4"
    strict = history_of(tmp_path, lines)
    assert wrong(strict, b0=data(1)) != []
    flushed = history_of(tmp_path, lines)
    flushed.forget_unflushed()
    assert wrong(flushed, b0=data(1)) == [], "write 3 was answered after the flush was submitted"
    assert wrong(flushed, b0=data(3)) == []
    assert wrong(flushed, b0=ZERO) != [], "the flush covers write 1"
    assert wrong(flushed, b1=data(1, 1)) != [], "write 4 had FUA"


def test_zeroes_and_trims(tmp_path: Path) -> None:
    history = history_of(tmp_path, "S 1 W 0 1 0\nA 1\nS 2 T 0 1 0\nA 2")
    assert wrong(history, b0=ZERO) == []
    assert wrong(history, b0=data(1)) != []


def test_foreign_torn_and_misplaced_contents(tmp_path: Path) -> None:
    history = history_of(tmp_path, "S 1 W 0 2 0\nA 1\nS 2 W 0 2 0\nA 2")
    assert "never written" in wrong(history, b0=b"x" * BLOCK_BYTES)[0]
    assert "never written" in wrong(history, b0=data(2, 1))[0]
    assert "torn" in wrong(history, b0=data(2)[:2048] + data(1)[2048:])[0]
    assert "not in the log" in wrong(history, b0=data(7))[0]


def test_a_read_of_old_data_is_told(tmp_path: Path) -> None:
    history = history_of(tmp_path, "S 1 W 0 1 0\nA 1\nS 2 R 0 1 0\nM 2 0\nA 2")
    image = tmp_path / "image"
    image.write_bytes(data(1))
    with pytest.raises(AssertionError, match="old data"):
        history.assert_in_file(image)
