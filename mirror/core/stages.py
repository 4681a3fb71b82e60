"""The stages of a request, and how the stretches between two looks at the clock become stages. Pure.

A request's thread books each stretch of its time to a *lap* (mirror.spans). Laps follow each other; stages need not: a
peer's disk works while the own one does. So the time after the request was sent, until its answer is there, belongs to
the link as far as neither disk explains it.
"""

from collections.abc import Sequence
from typing import Final

# Laps: what the thread was about.
INTERPRETER: Final = 0
TURN: Final = 1
LOG: Final = 2
SEND: Final = 3
OWN_DISK: Final = 4
ANSWER: Final = 5
ROUND: Final = 6
LAPS: Final = 7

# Stages, in the order in which a request meets them.
RANGE: Final = "range"
COLD: Final = "log"
DISK: Final = "own_disk"
LINK: Final = "link"
PEER_DISK: Final = "peer_disk"
FLUSH: Final = "flush"
PYTHON: Final = "interpreter"
TOTAL: Final = "total"
STAGES = (RANGE, COLD, DISK, LINK, PEER_DISK, FLUSH, PYTHON)
# Of a request that nobody looked at until it was slow: before it was sent and written, and from then on.
BEFORE, AFTER = "range_or_log", "disk_or_link"

WRITE, DURABLE_WRITE, FLUSHES = "write", "durable write", "flush"
# What a secondary carries out for its peer, and the stages of that.
APPLY, DURABLE_APPLY, APPLY_FLUSH = "apply", "durable apply", "apply flush"
RECEIVE, REPLY = "receive", "reply"


def stages_of(laps_ns: Sequence[int], peer_ns: int) -> dict[str, int]:
    """Nanoseconds by stage; `peer_ns` is the peer's word of its disk, 0 where it gave none."""
    send_ns, answer_ns = laps_ns[SEND], laps_ns[ANSWER]
    # Of a flush that the peer began before it was asked for only the rest counts.
    peer_ns = min(peer_ns, send_ns + laps_ns[OWN_DISK] + answer_ns)
    # While the own disk was slower than all else, nobody saw when the answer came.
    link_ns = max(0, min(send_ns + laps_ns[OWN_DISK] + answer_ns - peer_ns, send_ns + answer_ns))
    return {
        RANGE: laps_ns[TURN],
        COLD: laps_ns[LOG],
        DISK: laps_ns[OWN_DISK],
        LINK: link_ns,
        PEER_DISK: peer_ns,
        FLUSH: laps_ns[ROUND],
        PYTHON: laps_ns[INTERPRETER],
    }
