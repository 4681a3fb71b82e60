"""A plan that failed, and when it may be tried again: mirror.core.backoff with the runtime's clock and chance."""

import contextlib
from collections.abc import Iterator
from typing import Any

from mirror.core.backoff import Backoff
from mirror.core.errors import MirrorError
from mirror.runtime import Condition, Runtime


class Retry:
    """Shared by both ways in which a handshake may begin; `changed` is told of every failure."""

    def __init__(self, runtime: Runtime, changed: Condition) -> None:
        self.backoff = Backoff()
        self._runtime = runtime
        self._changed = changed

    def failed(self, reason: str) -> None:
        """What both sides agreed on could not be carried out."""
        with self._changed:
            self.backoff = self.backoff.failed(reason, self._runtime.now_s(), self._runtime.random_number())
            self._changed.notify_all()

    def begin_anew(self) -> None:
        """It was carried out, or the operator wants it tried at once."""
        self.backoff = Backoff()

    def left_s(self) -> float:
        """Seconds until it may be tried again."""
        return self.backoff.left_s(self._runtime.now_s())

    @contextlib.contextmanager
    def carrying_out(self) -> Iterator[None]:
        """Whatever fails inside is a plan that failed."""
        try:
            yield
        except MirrorError as error:
            self.failed(error.message)
            raise

    def forbids(self, features: dict[str, Any]) -> bool:
        """Whether it is too soon for the peer's handshake. What the operator asked for, on either side, never is."""
        if not self.left_s():
            return False
        if features.get("asked_by_operator") is not True:
            return True
        self.begin_anew()
        return False
