"""A bug in what carries out the peer's requests ends the session: nobody waits for an answer that never comes."""

from pathlib import Path
from typing import Any

import pytest

from tests.pair import assert_equal_copies, pair, session_of, wait_ended, wait_in_step

DATA = memoryview(b"\x5a" * 4096)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("fua", "what"), [(False, "write"), (True, "write"), (None, "flush")])
def test_a_bug_ends_the_session_and_the_next_one_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fua: bool | None, what: str
) -> None:
    with pair(tmp_path) as (first, second):
        session, applying = session_of(first), session_of(second)
        # Its extent is hot from now on, so that no write is parked: those the end of the session would apply once more.
        first._primary.write(DATA, 0, False)
        first._primary.flush()
        with monkeypatch.context() as patch:

            def fail(*_: Any) -> None:
                raise OverflowError("a number that does not fit")

            patch.setattr(second._replica.store, what, fail)
            first._primary.write(DATA, 0, bool(fua))
            if fua is None:
                first._primary.flush()
            wait_ended(first, session)
            # And not by the time that a slow disk is given.
            assert "does not fit" in applying.reason
        wait_in_step(first)
        wait_in_step(second)
        assert_equal_copies(first, second)
        assert first._replica.store.read(len(DATA), 0) == DATA
