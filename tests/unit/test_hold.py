"""Who holds a replica: the second one fails at once and learns who was first."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirror.runtime import Runtime
from nbd_server import hold
from nbd_server.hold import HeldElsewhere

RUNTIME = Runtime()


def test_a_second_holder_is_told_who_was_first(tmp_path: Path) -> None:
    assert hold.holder(tmp_path) is None
    held = hold.hold_directory(tmp_path, RUNTIME)
    assert hold.holder(tmp_path) == os.getpid()
    with pytest.raises(HeldElsewhere, match=f"process {os.getpid()}"):
        hold.hold_directory(tmp_path, RUNTIME)
    with (
        pytest.raises(HeldElsewhere, match=f"can't be destroyed while it is served, by process {os.getpid()}"),
        hold.held_for_change(tmp_path, "destroyed", RUNTIME),
    ):
        pass
    os.close(held)
    assert hold.holder(tmp_path) is None
    os.close(hold.hold_directory(tmp_path, RUNTIME))


def test_two_names_of_one_data_file_are_one(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    os.link(tmp_path / "data", tmp_path / "other")
    held = hold.hold_data(tmp_path / "data", RUNTIME)
    with pytest.raises(HeldElsewhere, match=f"process {os.getpid()}"):
        hold.hold_data(tmp_path / "other", RUNTIME)
    os.close(held)
    os.close(hold.hold_data(tmp_path / "other", RUNTIME))


def heir_of_a_dead_holder(directory: Path, *command: str) -> subprocess.Popen[bytes]:
    """The process that is named in the lock file is gone, but `command` has the locked descriptor still."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with (directory / "lock").open("w") as file:
        file.write(f"{gone.pid}\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[file.fileno()])


def test_a_dying_heir_is_waited_for(tmp_path: Path) -> None:
    heir = heir_of_a_dead_holder(tmp_path, "sleep", "0.3")
    os.close(hold.hold_directory(tmp_path, RUNTIME))
    heir.communicate()


def test_an_heir_that_does_not_die_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "DYING_HOLDER_S", 0.1)
    heir = heir_of_a_dead_holder(tmp_path, "cat")
    try:
        with pytest.raises(HeldElsewhere, match=f"process {heir.pid}, left behind by a server that ended"):
            hold.hold_directory(tmp_path, RUNTIME)
    finally:
        heir.communicate()
    os.close(hold.hold_directory(tmp_path, RUNTIME))
