"""A read that a stop overtakes stays unanswered: it may have seen a write that was cut off with it, and may vanish.

In the simulator as good as no life comes to that moment, so it is made here.
"""

from pathlib import Path

import pytest

from mirror.core.errors import ConnectionCut
from mirror.primary import Gate
from tests.pair import pair


def test_a_read_that_a_stop_overtakes_is_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair(tmp_path) as (first, _):
        primary, store = first._primary, first._replica.store
        really_read = store.read_into

        def read_into(buffer: memoryview, offset: int) -> None:
            really_read(buffer, offset)
            primary.set_gate(Gate.CUT)

        with monkeypatch.context() as patched:
            patched.setattr(store, "read_into", read_into)
            with pytest.raises(ConnectionCut):
                first.read_into(memoryview(bytearray(4096)), 0)
        primary.set_gate(Gate.OPEN)
        first.read_into(memoryview(bytearray(4096)), 0)
