"""The facts behind `nbdmirror why-slow`, gathered from a live server, and the cause that follows from them."""

from typing import Any

from mirror.core import why_slow
from mirror.core.limits import EXTENT_BYTES
from mirror.peer import Peer
from mirror.primary import Primary
from mirror.replica import Replica
from mirror.running import described
from nbd_server.processor import Processor

# That of this process: `start` is for the plugin to call.
PROCESSOR = Processor()


def of_server(replica: Replica, primary: Primary, peer: Peer | None, status: dict[str, Any]) -> dict[str, Any]:
    """What docs/operations.md describes; `status` is the same server's."""
    processor = PROCESSOR.report()
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
            **{key: status["activity_log"][key] for key in ("extents", "used", "miss_rate", "goal_s", "larger")},
            "holds_all": status["activity_log"]["extents"] * EXTENT_BYTES >= status["size"],
        },
        "resync": status["resync"],
        "proof": status["proof"],
        "verify": status["verify"],
    }
    found = why_slow.answer(facts)
    return {**facts, "cause": found.cause.name, "says": found.sentence, "helps": found.cause.helps}
