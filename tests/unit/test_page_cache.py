"""The proof that the page cache lost nothing: quick where the kernel can tell so, by fsync where it can't."""

import os
from pathlib import Path

import pytest

from nbd_server import page_cache
from nbd_server.page_cache import check_no_write_lost


@pytest.fixture
def fsyncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors that were given to fsync."""
    seen: list[int] = []
    monkeypatch.setattr(os, "fsync", seen.append)
    return seen


def test_a_sound_file_passes(tmp_path: Path) -> None:
    with (tmp_path / "data").open("wb") as file:
        file.write(b"x" * 100_000)
        file.flush()
        check_no_write_lost(file.fileno())


def test_overlayfs_is_asked_by_fsync(tmp_path: Path, fsyncs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_is_overlayfs", lambda _: True)
    with (tmp_path / "data").open("wb") as file:
        check_no_write_lost(file.fileno())
        assert fsyncs == [file.fileno()]


def test_what_sync_file_range_does_not_do_is_asked_by_fsync(fsyncs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_is_overlayfs", lambda _: False)
    reader, writer = os.pipe()  # ESPIPE
    check_no_write_lost(writer)
    assert fsyncs == [writer]
    os.close(reader)
    os.close(writer)


def test_any_other_error_counts_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_is_overlayfs", lambda _: False)
    gone = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    os.close(gone)
    with pytest.raises(OSError, match="Bad file descriptor"):
        check_no_write_lost(gone)
