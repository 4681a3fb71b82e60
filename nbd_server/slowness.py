"""The facts behind `nbdmirror why-slow`, gathered from a live server, and the cause that follows from them."""

import os
import time
from pathlib import Path
from typing import Any

from mirror.core import why_slow
from mirror.peer import Peer
from mirror.primary import Primary
from mirror.replica import Replica
from mirror.running import described

# How long the processor is watched: a hundred of its clock's ticks on most machines.
WATCH_S = 0.2


def of_server(replica: Replica, primary: Primary, peer: Peer | None, status: dict[str, Any]) -> dict[str, Any]:
    """What docs/operations.md describes; `status` is the same server's."""
    processor = _processor()
    now_ns = primary.trace.start()
    own = described(replica.under_way, now_ns)
    facts = {
        "name": status["name"],
        "role": replica.role.value,
        "connection": status["connection"],
        "peer": status["peer"]["address"],
        "peer_silence": peer.silence() if peer is not None else None,
        "protocol": status["protocol"],
        **primary.trace.spans.report(now_ns),
        "oldest": own[0] if own else None,
        "in_flight": len(own),
        "processor": processor,
        "activity_log": {
            key: status["activity_log"][key] for key in ("extents", "used", "miss_rate", "goal_s", "larger")
        },
        "resync": status["resync"],
        "proof": status["proof"],
        "verify": status["verify"],
    }
    found = why_slow.answer(facts)
    return {**facts, "cause": found.cause.name, "says": found.sentence, "helps": found.cause.helps}


def _processor() -> dict[str, Any]:
    """What this process takes of the processor for a moment, and what the machine has left."""
    idle_s, own_s, began_s = _idle_s(), time.process_time(), time.perf_counter()
    time.sleep(WATCH_S)
    taken_s = time.perf_counter() - began_s
    cores = os.cpu_count() or 1
    return {
        "cores": cores,
        "own_cores": round((time.process_time() - own_s) / taken_s, 2),
        "idle_percent": min(100, round(100 * (_idle_s() - idle_s) / taken_s / cores)),
    }


def _idle_s() -> float:
    """Seconds that processors had nothing to do, or waited for a disk, summed over all of them."""
    fields = Path("/proc/stat").read_text().split(maxsplit=6)
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")
