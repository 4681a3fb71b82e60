"""Leaving the primary's role where the own disk refuses the record of it."""

from pathlib import Path

import pytest

from mirror.core.errors import DeviceError
from mirror.core.states import Role
from tests.pair import PATIENCE_S, pair, peer_of, session_of


def test_the_peer_learns_of_a_demotion_whose_record_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair(tmp_path) as (first, second):
        with monkeypatch.context() as patched:

            def refuse(*_: object) -> None:
                raise DeviceError("metadata", "write", 5, "Input/output error")

            patched.setattr(first._replica.store, "write_superblock", refuse)
            with pytest.raises(DeviceError):
                first.demote(force=True)
        peer = peer_of(second)
        with peer.changed:
            assert peer.changed.wait_for(lambda: session_of(second).peer.role is Role.SECONDARY, PATIENCE_S)
        second.promote(force=False)
