"""Makes the processes of a replica, or a command, kill themselves at a crash point, and shows that they did."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

from nbd_server.compiled import SOURCES
from nbd_server.serve import NBDKIT_VARIABLE, find_nbdkit
from tests.crash.points import POINTS
from tests.integration.cluster import NBDMIRROR, Replica
from tests.integration.processes import wait_for, wait_gone

LOADER = Path(__file__).with_name("loader")
_numbers = itertools.count()


def nbdkit_with_loader(directory: Path) -> Path:
    """A program that is nbdkit with the loader; its parent `serve` must live on, or be killed by it, and gets none.

    It runs the sources: functions of the compiled copy can't be wrapped.
    """
    program = directory / "nbdkit"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{LOADER}:{SOURCES}:$PYTHONPATH" exec {find_nbdkit()} "$@"\n')
    program.chmod(0o700)
    return program


class Deaths:
    """The crash points of one replica; make it before the replica is served."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        directory = replica.log_path.with_suffix(".crash")
        directory.mkdir()
        self._armed, self._reached, self._draft = (directory / name for name in ("armed", "reached", "draft"))
        nbdkit = nbdkit_with_loader(directory)
        replica.runs_under("env", f"NBDMIRROR_CRASH={directory}", f"{NBDKIT_VARIABLE}={nbdkit}")
        self._whom = ""

    def arm(self, point: str, whom: str) -> None:
        """The next time that its process gets there it dies; `whom`: self (nbdkit) or both (its parent, too)."""
        assert point in POINTS, point
        self._reached.unlink(missing_ok=True)
        self._draft.write_text(f"{point} {whom} {next(_numbers)}")
        self._draft.rename(self._armed)
        self._whom = whom

    def disarm(self) -> None:
        self._armed.unlink(missing_ok=True)

    def wait(self, timeout_s: float = 15.0) -> None:
        """Wait until the process has died at the point; that it was reached is part of the test."""
        what = f"{self.replica.directory.name} to reach the crash point"
        try:
            wait_for(self._reached.exists, timeout_s, what)
        except AssertionError as late:
            self.disarm()
            raise AssertionError(f"{late}\n{self.replica.log()[-3000:]}") from None
        pid = int(self._reached.read_text())
        wait_gone(pid)
        if self._whom == "both":
            assert self.replica.process is not None
            self.replica.process.wait(5)


def command_and_die(verb: str, directory: Path, point: str, *options: str) -> None:
    """Run `nbdmirror VERB DIR OPTIONS` until it kills itself at the point."""
    orders = directory.with_name(f"{directory.name}.{point}")
    orders.mkdir()
    (orders / "armed").write_text(f"{point} self 0")
    environment = os.environ | {"PYTHONPATH": str(LOADER), "NBDMIRROR_CRASH": str(orders)}
    words = [sys.executable, str(NBDMIRROR), verb, str(directory), *options]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=20)
    assert (orders / "reached").exists(), f"never reached {point}: {done}"
    assert done.returncode == -signal.SIGKILL, done
