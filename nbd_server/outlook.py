"""What would come of it: the plan of a `connect`, and what differs between the replicas. Both change nothing.

Each asks the peer without a session (mirror.questions), decides by the handshake's own table, and tells.
"""

from typing import Any

from mirror.core import generation
from mirror.core.difference import Difference, compare
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import MirrorError, OperatorError
from mirror.core.generation import Standing
from mirror.core.layout import Superblock
from mirror.core.limits import DIFF_RUNS_DEFAULT, DIFF_RUNS_MAX
from mirror.core.states import ConnectionState
from mirror.peer import Peer
from mirror.questions import Answer, Said
from mirror.replica import Replica


def plan(peer: Peer, replica: Replica, discard_my_data: bool) -> dict[str, Any]:
    """What `connect` would do, with the plan's keys; `hindrance` says why nothing would come of it now, if so."""
    session = peer.session
    if session is not None and not session.ended and peer.plan is not None:
        return {**peer.plan.as_json(), "connected": True, "hindrance": None}
    mine, answer = peer.questions.ask(discard_my_data, with_map=True)
    theirs = answer.said.standing
    outcome = generation.decide(mine.standing, theirs)
    known = None if answer.dirty is None else _both(replica.own_map(), answer.dirty)
    expected = peer.forecast(outcome, mine.standing, theirs, known)
    return {**expected.as_json(), "connected": False, "hindrance": _hindrance(mine, answer.said)}


def _both(own: DirtyMap, theirs: DirtyMap) -> int:
    theirs.merge(own)
    return theirs.dirty_bytes


def _hindrance(mine: Said, theirs: Said) -> str | None:
    """What keeps the replicas apart beside the table's word."""
    one, other = (said.features.get("protocol") for said in (mine, theirs))
    if one != other:
        return f"this replica is set to protocol {one}, the peer to {other}"
    if theirs.connected:
        return "the peer still has a session, or is just ending one"
    if not theirs.wanted:
        return "the peer was disconnected by its operator: `nbdmirror connect DIR` there too"
    return None


def diff(peer: Peer, replica: Replica, limit: object) -> dict[str, Any]:
    """What differs since the histories parted. Without the peer's word, what this side changed, and why no more."""
    runs_max = DIFF_RUNS_DEFAULT if limit is None else limit
    if not isinstance(runs_max, int) or not 0 <= runs_max <= DIFF_RUNS_MAX:
        raise OperatorError(f"a list of {runs_max!r} ranges", remedy=f"ask for 0 to {DIFF_RUNS_MAX}")
    mine = peer.said(False).standing
    suspects = compare_suspects(_suspects(replica), runs_max)
    session = peer.session
    if session is not None and not session.ended:
        if peer.state is not ConnectionState.CONNECTED:
            raise OperatorError(
                "a resync is running: the two maps are merged already, and nobody knows any more who changed what",
                remedy="`nbdmirror status` shows how much is left",
            )
        nothing = DirtyMap(replica.size_bytes)
        return tell(mine, session.peer, compare(nothing, nothing, runs_max), suspects, None)
    try:
        _, answer = peer.questions.ask(False, with_map=True)
    except MirrorError as error:
        found = compare(replica.own_map(), DirtyMap(replica.size_bytes), runs_max)
        return tell(mine, None, found, suspects, error.message)
    theirs = answer.said.standing
    if answer.dirty is None:
        raise OperatorError(
            f"this replica has {mine.size_bytes} bytes, the peer {theirs.size_bytes}: they can't be compared",
            remedy="see what `nbdmirror connect --dry-run` says",
        )
    found = compare(replica.own_map(), answer.dirty, runs_max)
    return tell(mine, theirs, found, suspects, _unknown(mine, answer))


def _unknown(mine: Standing, answer: Answer) -> str | None:
    """Why the two maps do not tell everything, None where they do."""
    theirs = answer.said.standing
    if mine.name != theirs.name or mine.volume_id != theirs.volume_id:
        return "the replicas are of different volumes, so everything may differ"
    if not generation.shared_ground(mine, theirs):
        return "the maps do not reach back to a common moment, so everything may differ"
    return None


def _suspects(replica: Replica) -> DirtyMap:
    """As they are now; comparing a large map takes longer than the books may be held."""
    suspects = DirtyMap(replica.size_bytes)
    with replica.books:
        suspects.merge(replica.suspects.found)
    return suspects


def compare_suspects(suspects: DirtyMap, runs_max: int) -> Difference:
    """Blocks that were found different, in the same bounds; nobody is known to have changed them."""
    return compare(suspects, DirtyMap(suspects.size_bytes), runs_max)


def tell(
    mine: Standing | Superblock, theirs: Standing | None, found: Difference, suspects: Difference, unknown: str | None
) -> dict[str, Any]:
    """The keys of `nbdmirror diff --json`."""
    return {
        "name": mine.name,
        "size": mine.size_bytes,
        "generation": f"{mine.current:016x}",
        "peer_generation": None if theirs is None else f"{theirs.current:016x}",
        "complete": unknown is None,
        "unknown": unknown,
        "own_bytes": found.own_bytes,
        "peer_bytes": None if theirs is None else found.peer_bytes,
        "both_bytes": None if theirs is None else found.both_bytes,
        "ranges": [{"offset": run.offset, "length": run.length, "changed_by": run.who.value} for run in found.runs],
        "range_count": found.run_count,
        "suspect_bytes": suspects.bytes,
        "suspect_ranges": [{"offset": run.offset, "length": run.length} for run in suspects.runs],
        "suspect_range_count": suspects.run_count,
    }
