"""Python runs this by itself where its directory is on PYTHONPATH: it lays the crash points into a product's process.

NBDMIRROR_CRASH names a directory. A file `armed` in it holds the name of a point and whom to kill (`self`, or `both`:
the parent too, and first). The process that reaches the point renames the file to `reached` and kills itself. Every
function of a point is wrapped from the start, so that a point can be armed at any moment of the process's life.

NBDMIRROR_CRASH_FLUSHES=no makes every flush of this process do nothing: a test that can't fail proves nothing.
"""

import functools
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[3]))

from tests.crash.points import POINTS, Moment, Point

ANSWER_LIMIT_MS = 5000


class Orders:
    """What is armed, and how often the armed point was passed since."""

    def __init__(self, directory: Path) -> None:
        self._armed, self._reached = directory / "armed", directory / "reached"
        self._text = ""
        self._calls = 0
        self._lock = threading.Lock()
        self._running = threading.local()

    def running(self) -> list[str]:
        """The wrapped functions that this thread is in, outermost first."""
        try:
            return self._running.names  # type: ignore[no-any-return]
        except AttributeError:
            self._running.names = []
            return self._running.names

    def armed_at(self, target: str) -> tuple[Point, bool] | None:
        """The armed point and whether this is its call, if it is one of this function."""
        try:
            text = self._armed.read_text()
        except FileNotFoundError:
            return None
        point = POINTS[text.split()[0]]
        if point.function != target or (point.inside and point.inside not in self.running()):
            return None
        with self._lock:
            if text != self._text:
                self._text, self._calls = text, 0
            self._calls += 1
            return point, self._calls == point.call

    def die(self) -> None:
        whom = self._armed.read_text().split()[1] if self._armed.exists() else ""
        try:
            self._armed.unlink()
        except FileNotFoundError:
            signal.pause()  # another thread is dying already
        draft = self._reached.with_suffix(".draft")
        draft.write_text(str(os.getpid()))
        draft.rename(self._reached)
        if whom == "both":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, target: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            found = self.armed_at(target)
            moment = found[0].moment if found is not None and found[1] else None
            if moment is Moment.BEFORE:
                self.die()
            if moment is Moment.TORN:
                descriptor, buffer, *rest = arguments
                half = memoryview(buffer).cast("B")
                function(descriptor, half[: len(half) // 2], *rest)
                self.die()
            running = self.running()
            running.append(target)
            try:
                result = function(*arguments, **named)
            finally:
                running.pop()
            if moment is Moment.ANSWERED:
                poller = select.poll()
                poller.register(result.fileno(), select.POLLIN)
                poller.poll(ANSWER_LIMIT_MS)
                self.die()
            if moment is Moment.AFTER:
                self.die()
            return result

        return wrapped


def lay(orders: Orders, modules: tuple[str, ...]) -> None:
    """Wrap every function of a point that lives in these packages."""
    targets = {target for point in POINTS.values() for target in (point.function, point.inside) if target}
    for target in sorted(targets):
        module, _, path = target.partition(":")
        if not module.startswith(modules):
            continue
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, name, orders.wrap(target, getattr(owner, name)))


def confirm_each_write() -> None:
    """Under B a peer whose disk is quick says nothing but the answer, and no write would be answered before that."""
    importlib.import_module("mirror.confirmer").QUICK_BYTES_MAX = -1  # type: ignore[attr-defined]


def lose_flushes() -> None:
    os.fsync = os.fdatasync = lambda descriptor: None
    os.RWF_DSYNC = 0


if os.environ.get("NBDMIRROR_CRASH_FLUSHES") == "no":
    lose_flushes()
if "NBDMIRROR_CRASH" in os.environ:
    # The command line has another life than the server, and need not load it.
    command = any("nbdmirror" in Path(word).name for word in sys.orig_argv[1:2])
    lay(
        Orders(Path(os.environ["NBDMIRROR_CRASH"])), ("cli.", "mirror.store") if command else ("mirror.", "nbd_server.")
    )
    if not command:
        confirm_each_write()
