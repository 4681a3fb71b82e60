"""What runs at this moment, read from the stacks of the threads: it costs a request nothing, so every one is seen.

A table of requests in flight would be written twice a request, to be read when somebody asks. A thread's stack is that
table already: which request it carries, since when, and the function in which it waits. Nothing of a frame is kept.
"""

import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from mirror.batches import Awaited
from mirror.change import Change
from mirror.core import stages
from mirror.core.wire import Header
from mirror.deferred import Deferred
from mirror.flush import FlushRounds
from mirror.link import Stream
from mirror.log_writer import LogWriter
from mirror.primary import Primary
from mirror.secondary import Receiver
from mirror.session import Session
from mirror.store.data_file import DataFile

GATE = "gate"

# Where a request of a client begins, and of what kind it is.
_BEGINS: dict[CodeType, str] = {
    Primary.write.__code__: stages.WRITE,
    Primary.zero.__code__: "zero",
    Primary.trim.__code__: "trim",
    Primary.flush.__code__: stages.FLUSHES,
    Primary.read_into.__code__: "read",
    Receiver._answer.__code__: stages.APPLY,
}
# What a thread inside a function waits for. The innermost one counts, but for a log record: all inside is for its sake.
_WAITS: dict[CodeType, str] = {
    Primary._begin.__code__: stages.RANGE,
    Primary.lock_range.__code__: stages.RANGE,
    Primary._wait_open.__code__: GATE,
    Primary._await_stand_in.__code__: GATE,
    LogWriter.hold.__code__: stages.COLD,
    Session.borrow.__code__: stages.LINK,
    Stream.send.__code__: stages.LINK,
    Stream.receive.__code__: stages.LINK,
    Awaited.answer.__code__: stages.LINK,
    Deferred._change_queued.__code__: stages.LINK,
    Deferred.wait_applied.__code__: stages.LINK,
    DataFile.write.__code__: stages.DISK,
    DataFile.read_into.__code__: stages.DISK,
    DataFile.zero.__code__: stages.DISK,
    DataFile.flush.__code__: stages.DISK,
    FlushRounds.run_round.__code__: stages.FLUSH,
}
_ENDS_THE_LOOK = (stages.COLD,)


def requests(now_ns: int) -> list[dict[str, Any]]:
    """Those under way, the oldest first, each with what it waits for; `age_s` is None where nobody noted its start."""
    found = [request for frame in sys._current_frames().values() for request in _of(frame, now_ns)]
    return sorted(found, key=lambda request: -(request["age_s"] or 0))


def _of(innermost: FrameType, now_ns: int) -> Iterator[dict[str, Any]]:
    """The request that a thread carries, if any."""
    frames: list[FrameType] = []
    frame: FrameType | None = innermost
    while frame is not None:
        frames.append(frame)
        if frame.f_code in _BEGINS:
            yield _described(frames[::-1], now_ns)
            return
        frame = frame.f_back


def _described(frames: list[FrameType], now_ns: int) -> dict[str, Any]:
    waits_for = stages.PYTHON
    for frame in frames:
        waits_for = _WAITS.get(frame.f_code, waits_for)
        if waits_for in _ENDS_THE_LOOK:
            break
    known: dict[str, Any] = {}
    for frame in frames:
        variables = frame.f_locals
        for name in ("started", "started_ns", "began_ns", "change", "header"):
            # The outermost frame that has it: there it is the whole request's.
            if variables.get(name):
                known.setdefault(name, variables[name])
    started_ns = known.get("started") or known.get("started_ns") or known.get("began_ns")
    what = known.get("change") or known.get("header")
    where = (what.offset, what.length) if isinstance(what, Change | Header) else (None, None)
    return {
        "kind": _BEGINS[frames[0].f_code],
        "offset": where[0],
        "length": where[1],
        "age_s": round((now_ns - started_ns) / 1e9, 3) if started_ns else None,
        "waits_for": waits_for,
    }
