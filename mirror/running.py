"""What runs at this moment: each request notes itself here, and what it waits for.

One in a table costs two operations on a set and a few assignments. Reading the stacks of the threads instead, which
costs a request nothing, lost: compiled functions have no frames.
"""

from typing import Any

from mirror.core import stages
from mirror.spans import Span

GATE = "gate"


class Running:
    """A request under way. `started_ns` is 0 where nobody looked at the clock; `span` measures its stages.

    `waits_for` is for whoever carries it out to set: a stage, or GATE.
    """

    __slots__ = ("kind", "length", "offset", "span", "started_ns", "waits_for")

    def __init__(self, kind: str, offset: int, length: int, started_ns: int, span: Span | None = None) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.started_ns = started_ns
        self.span = span
        self.waits_for = stages.PYTHON


def described(under_way: set[Running], now_ns: int) -> list[dict[str, Any]]:
    """Those under way, the oldest first, each with what it waits for; `age_s` is None where nobody noted its start."""
    found = [
        {
            "kind": one.kind,
            "offset": None if one.kind == stages.FLUSHES else one.offset,
            "length": None if one.kind == stages.FLUSHES else one.length,
            "age_s": round((now_ns - one.started_ns) / 1e9, 3) if one.started_ns else None,
            "waits_for": one.waits_for,
        }
        # A copy, made in one step: they come and go meanwhile.
        for one in list(under_way)
    ]
    return sorted(found, key=lambda request: -(request["age_s"] or 0))
