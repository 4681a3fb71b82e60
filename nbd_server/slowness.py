"""The facts behind `nbdmirror why-slow`, gathered from a live server, and the cause that follows from them."""

from typing import Any

from mirror.core import why_slow
from mirror.core.errors import MirrorError
from mirror.core.limits import EXTENT_BYTES
from mirror.core.states import Role
from mirror.peer import Peer
from mirror.primary import Primary
from mirror.replica import Replica
from mirror.running import described
from nbd_server.processor import Processor, of_peer

# That of this process: `start` is for the plugin to call.
PROCESSOR = Processor()
# A peer that does not answer at once is slow or silent for another reason.
PEER_ANSWERS_S = 0.5


def of_server(replica: Replica, primary: Primary, peer: Peer | None, status: dict[str, Any]) -> dict[str, Any]:
    """What docs/operations.md describes; `status` is the same server's."""
    processor = PROCESSOR.report()
    peer_processor = _of_peer(replica, peer)
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
        "peer_processor": peer_processor,
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


def _of_peer(replica: Replica, peer: Peer | None) -> dict[str, Any] | None:
    """How the processors of the peer's node were used; None where that is not known: an older release can't say it.

    The primary alone asks, since it waits for the peer.
    """
    session = peer.session if peer is not None else None
    if session is None or replica.role is not Role.PRIMARY:
        return None
    try:
        return of_peer(session.request("processor", PEER_ANSWERS_S).get("processor"))
    except MirrorError:
        return None
