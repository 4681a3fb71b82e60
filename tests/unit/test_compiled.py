"""The compiled copy is run only while it is of the sources."""

from pathlib import Path

import pytest

from nbd_server import compiled


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources with a copy that was made of them."""
    root, copy = tmp_path / "root", tmp_path / "copy"
    for path in ("mirror/core/wire.py", "mirror/link.py", "nbd_server/plugin.py", "cli/main.py"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"# {path}\n")
    copy.mkdir()
    (copy / compiled.MADE_FROM).write_text(compiled.fingerprint(root))
    monkeypatch.setattr(compiled, "SOURCES", root)
    monkeypatch.setattr(compiled, "COPY", copy)
    return root


def test_of_these_very_sources(sources: Path) -> None:
    assert compiled.import_root() == compiled.COPY
    (sources / "cli" / "main.py").write_text("nothing that a server runs")
    assert compiled.import_root() == compiled.COPY


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "mirror" / "link.py").write_text("# changed\n"),
        lambda root: (root / "mirror" / "new.py").write_text(""),
        lambda root: (root / "mirror" / "link.py").unlink(),
        lambda root: (root / "mirror" / "link.py").rename(root / "mirror" / "other.py"),
        lambda root: (root / "mirror" / "core" / "wire.py").rename(root / "mirror" / "wire.py"),
        lambda _: (compiled.COPY / compiled.MADE_FROM).unlink(),
        lambda _: (compiled.COPY / compiled.MADE_FROM).write_text("torn"),
    ],
)
def test_of_others(sources: Path, change: object) -> None:
    assert callable(change)
    change(sources)
    assert compiled.import_root() == compiled.SOURCES


def test_of_another_python(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.sys, "version_info", (3, 99, 0))
    assert compiled.import_root() == compiled.SOURCES


def test_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "COPY", tmp_path / "none")
    assert compiled.import_root() == compiled.SOURCES
