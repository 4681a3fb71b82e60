"""The state of a served replica as `nbdmirror status` shows it: one dictionary with documented, stable keys."""

import datetime
from collections.abc import Mapping
from typing import Any

from mirror.core.layout import Superblock
from mirror.core.limits import SUSPECT_PARTS_MAX
from mirror.core.states import ConnectionState, DiskState, Role
from mirror.core.wire import words
from mirror.peer import Peer
from mirror.primary import Primary
from mirror.replica import Replica
from nbd_server import compiled
from nbd_server.config import Config

SYNCING = (ConnectionState.SYNC_SOURCE, ConnectionState.SYNC_TARGET)


def of_server(
    config: Config,
    replica: Replica,
    primary: Primary,
    peer: Peer | None,
    clients: dict[str, int],
    notes: list[str],
    resize_stage: str,
    log_trade: dict[str, Any],
) -> dict[str, Any]:
    """Everything about a replica that is being served; docs/operations.md describes each key."""
    known = replica.superblock
    session = peer.session if peer is not None else None
    connected = session is not None and not session.ended
    compared = peer.verifier.status() if peer is not None else {"proof": None, "verify": None}
    with replica.books:
        dirty_bytes = replica.dirty_bytes
        suspects = replica.suspects.status()
        activity_log = {
            **log_trade,
            "used": replica.log.used,
            "hits": replica.log.hits,
            "misses": replica.log.misses,
        }
    return {
        "name": config.name,
        "size": replica.size_bytes,
        "serving": True,
        "role": replica.role.value,
        "disk": replica.disk_state(connected).value,
        "connection": (peer.state if peer is not None else ConnectionState.STANDALONE).value,
        "peer": _peer(config, replica, peer),
        "protocol": config.protocol,
        "plan": peer.plan.as_json() if peer is not None and peer.plan is not None else None,
        "retry": _retry(peer),
        "generation": f"{known.current:016x}",
        "dirty_bytes": dirty_bytes,
        "resync": _resync(peer),
        "last_resync": last_resync(known.last_resync),
        "suspects": suspects,
        **compared,
        "last_verify": last_verify(known.last_verify, connected),
        "resize": resize(known, resize_stage),
        "activity_log": activity_log,
        "spin": {
            "setting": config.spin,
            "pays": primary.spin.pays if connected and replica.role is Role.PRIMARY else None,
        },
        "io": primary.trace.counters(),
        "latency": primary.trace.latency(),
        "clients": clients,
        "compiled": compiled.is_running(),
        "warnings": [
            *notes,
            *suspects_warning(suspects),
            *_decided_warnings(replica),
            *_proof_warnings(compared["proof"]),
            *_disk_warnings(replica, primary),
            *_peer_warnings(config, replica, peer),
        ],
    }


def last_resync(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The superblock's note of the last resync, its start as ISO time."""
    if record is None:
        return None
    return {**record, "started": iso_time(record.get("started"))}


def resize(known: Superblock, stage: str) -> dict[str, Any] | None:
    """The resize under way, also one that was broken off: which only a handshake ends."""
    if not stage and not known.next_size_bytes:
        return None
    waiting = "broken off; finished or undone when both replicas meet"
    return {"size": known.size_bytes, "next_size": known.next_size_bytes or None, "stage": stage or waiting}


def last_verify(record: Mapping[str, Any] | None, running: bool) -> dict[str, Any] | None:
    """The superblock's note of the last verify, its times as ISO times. `running`: one may be running now."""
    if record is None:
        return None
    result = record.get("result")
    if result == "running" and not running:
        result = "stopped"
    return {
        **{key: record.get(key) for key in ("checked_bytes", "differing_bytes", "repaired_bytes")},
        "started": iso_time(record.get("started")),
        "ended": iso_time(record["ended"]) if record.get("ended") else None,
        "result": result,
    }


def _proof_warnings(proof: Mapping[str, Any] | None) -> list[str]:
    if proof is None or proof["state"] != "failed":
        return []
    return [f"the copies could not be compared after the last handshake: {proof['reason']}"]


def _decided_warnings(replica: Replica) -> list[str]:
    if not replica.decided_alone_bytes:
        return []
    return [
        f"{replica.decided_alone_bytes} bytes were suspect, and the peer gets this replica's version: while it is away "
        f"clients wrote parts of more suspect blocks than can be noted ({SUSPECT_PARTS_MAX})"
    ]


def suspects_warning(suspects: Mapping[str, Any]) -> list[str]:
    """The fault that suspects are, as a warning."""
    if not suspects["bytes"]:
        return []
    offset, length = suspects["ranges"][0]
    return [
        f"{suspects['bytes']} bytes are suspect: the copies were found different there (first at {offset}, {length} "
        "bytes) and nobody knows which is right; look at both, then `nbdmirror verify DIR --repair --from SIDE`"
    ]


def iso_time(seconds: object) -> str:
    """A moment in words. It may be the peer's word for it, so it may be anything."""
    if isinstance(seconds, int | float):
        try:
            return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
        except (OverflowError, OSError, ValueError):
            pass
    return f"at an unknown time ({words(seconds)})"


def _peer(config: Config, replica: Replica, peer: Peer | None) -> dict[str, Any]:
    if peer is None:
        return {"address": None, "role": None, "disk": None}
    address, session = str(config.peer), peer.session
    if session is None or session.ended:
        # All that is known of a peer out of reach is what was recorded when it was left behind.
        disk = replica.superblock.peer_disk
        return {"address": address, "role": None, "disk": None if disk in (None, DiskState.UP_TO_DATE) else disk.value}
    disk = DiskState.INCONSISTENT if peer.state is ConnectionState.SYNC_SOURCE else session.peer.disk
    return {"address": address, "role": session.peer.role.value, "disk": disk.value}


def _resync(peer: Peer | None) -> dict[str, Any] | None:
    if peer is None or peer.state not in SYNCING:
        return None
    source, progress = peer.source, peer.target_progress
    if peer.state is ConnectionState.SYNC_SOURCE and source is not None:
        return {"direction": "to the peer", **source.status(), "limit": source.limit()}
    unknown = {"done_bytes": 0, "total_bytes": 0, "bytes_per_s": 0, "eta_s": None}
    return {"direction": "from the peer", **(progress or unknown), "limit": None}


def _retry(peer: Peer | None) -> dict[str, Any] | None:
    """A plan that failed, until it could be carried out."""
    if peer is None or not peer.retry.backoff.failures:
        return None
    failures, reason, _ = peer.retry.backoff
    return {"failures": failures, "reason": reason, "next_try_in_s": round(peer.retry.left_s(), 1)}


def _disk_warnings(replica: Replica, primary: Primary) -> list[str]:
    warnings = []
    if replica.failed:
        warnings.append(f"this replica's disk is Failed: {replica.failure or 'found so at the start'}")
    elif replica.failure:
        warnings.append(f"this replica's disk had an error: {replica.failure}")
    if primary.peer_only:
        warnings.append("the volume goes on through the peer's copy alone")
    if primary.read_errors:
        warnings.append(f"{primary.read_errors} read errors of this disk were answered from the peer")
    return warnings


def _peer_warnings(config: Config, replica: Replica, peer: Peer | None) -> list[str]:
    if peer is None:
        return ["this volume stands alone: it has no redundancy"]
    warnings = []
    session = peer.session
    if session is None or session.ended:
        since = replica.superblock.redundancy_lost_at
        lost = f"redundancy is lost since {iso_time(since)}" if since else "not connected to the peer"
        warnings.append(f"{lost}: {peer.reason}")
    elif peer.state in SYNCING:
        warnings.append("redundancy is incomplete until the resync ends")
    if session is not None and session.peer.policies != config.policies:
        warnings.append("the split_brain_... keys of the two volume.toml differ: a split brain will stay unresolved")
    if replica.disk_state(session is not None) is DiskState.CONSISTENT:
        warnings.append("this replica was in step when the link was lost; it can't know whether the peer moved on")
    return warnings
