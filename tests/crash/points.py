"""The crash points: where in the product's own code a process can be made to kill itself.

A point names a function, the side of it (before, after, or in the middle of a write), the function inside which it must
be running, and which call counts. The product knows nothing of them: `loader/sitecustomize.py` wraps the named
functions in the processes that a test starts, and `deaths.py` arms one point of one process at a time.
"""

import enum
from dataclasses import dataclass


class Moment(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    # Of a write of bytes: the first half has been written, the rest never is, as when the power goes.
    TORN = "torn"
    # After a request was sent: its answer has arrived and nobody has looked at it.
    ANSWERED = "answered"


@dataclass(frozen=True)
class Point:
    """`function` and `inside` are MODULE:NAME; `call` counts from when the point was armed, inside `inside`."""

    function: str
    moment: Moment
    inside: str = ""
    call: int = 1


BEFORE, AFTER, TORN, ANSWERED = Moment.BEFORE, Moment.AFTER, Moment.TORN, Moment.ANSWERED

_PRIMARY = "mirror.primary:Primary."
_FLUSH = "mirror.flush:FlushRounds."
_DATA = "mirror.store.data_file:DataFile."
_META = "mirror.store.metadata_file:MetadataFile."
_META_WRITE = "mirror.store.metadata_file:write_all"
_REPLICA = "mirror.replica:Replica."
_SYNC = "mirror.sync:SyncSource."
_PEER = "mirror.peer:Peer."
_VOLUME = "nbd_server.volume:Volume."
_CREATE = "mirror.store:"
_COMMAND = "cli.create:"

WRITE = {
    "write-locked": Point(_PRIMARY + "_begin", AFTER, call=20),
    "write-sent": Point("mirror.change:Change.ask_peer", AFTER, call=20),
    "write-answered-by-peer-only": Point("mirror.change:Change.ask_peer", ANSWERED, call=20),
    "write-here": Point("mirror.change:Change.apply_here", AFTER, call=20),
    "write-on-both": Point(_PRIMARY + "settle", BEFORE, call=20),
    "write-not-answered": Point(_PRIMARY + "_change", AFTER, call=20),
    "durable-write-begins": Point(_DATA + "_write_durable", BEFORE, call=2),
    "durable-write-done": Point(_DATA + "_write_durable", AFTER, call=2),
    "flush-begins": Point(_FLUSH + "_round", BEFORE, call=2),
    "flush-sent": Point(_FLUSH + "_ask_peer", AFTER, call=2),
    "flush-here": Point(_FLUSH + "_flush_here", AFTER, call=2),
    "flush-on-both": Point(_FLUSH + "_await_peer", AFTER, call=2),
    "flush-not-answered": Point(_FLUSH + "_round", AFTER, call=2),
    "write-in-a-later-piece": Point(_PRIMARY + "_change", BEFORE, inside=_PRIMARY + "zero", call=2),
}

# Under A and B: answered, and on its way.
DEFERRED = {
    "queued": Point("mirror.deferred:Deferred._register", AFTER, call=20),
    "applied-not-unlocked": Point("mirror.deferred:Deferred.applied", BEFORE, call=20),
    "applied": Point("mirror.deferred:Deferred.applied", AFTER, call=20),
    "waits-applied": Point("mirror.deferred:Deferred.wait_applied", AFTER, call=2),
}

# What the peer's process does with a write.
APPLY = {
    "apply-begins": Point("mirror.secondary:Receiver._answer", BEFORE, call=20),
    "apply-written": Point(_DATA + "write", AFTER, inside="mirror.secondary:Receiver._answer", call=20),
    "apply-zeroed": Point(_DATA + "zero", AFTER, call=2),
    "apply-answered": Point("mirror.secondary:Receiver._answer", AFTER, call=20),
    "apply-durable": Point(_DATA + "_write_durable", AFTER, call=2),
    "apply-flush-begins": Point(_DATA + "flush", BEFORE, call=2),
    "apply-flushed": Point(_DATA + "flush", AFTER, call=2),
}

LOG = {
    "log-parked-by-peer-only": Point("mirror.log_writer:LogWriter.hold", BEFORE, call=5),
    "log-record-begins": Point(_META + "write_log_record", BEFORE, call=3),
    "log-record-torn": Point(_META_WRITE, TORN, inside=_META + "write_log_record", call=3),
    "log-record-written": Point(_META + "write_log_record", AFTER, call=3),
    "log-full": Point(_PRIMARY + "_stabilise", BEFORE),
    "log-room-made": Point(_PRIMARY + "_stabilise", AFTER),
}

_PARKED_FILE = "mirror.store.parked_file:"
_PARK = "mirror.parking:Parking."
# What the peer's process does with a write that it must not apply yet.
PARKED = {
    "parked-torn": Point(_PARKED_FILE + "write_all", TORN, inside=_PARKED_FILE + "ParkedFile.keep", call=5),
    "parked-kept": Point(_PARK + "park", AFTER, call=5),
    "parked-answered": Point(_PARK + "release", BEFORE, inside="mirror.secondary:Receiver._after_write", call=5),
    "parked-applied": Point(_DATA + "write", AFTER, inside=_PARK + "_apply", call=5),
    "parked-forgotten": Point(_PARK + "_apply", AFTER, call=5),
    "parked-flush-begins": Point("mirror.core.parked:decode_news", AFTER, call=2),
}

# The peer dies, and the primary goes on alone.
ALONE = {
    "alone-begins": Point(_PRIMARY + "record_alone", BEFORE),
    "alone-first-copy-torn": Point(_META_WRITE, TORN, inside=_REPLICA + "move_on", call=1),
    "alone-first-copy-written": Point(_META_WRITE, AFTER, inside=_REPLICA + "move_on", call=1),
    "alone-second-copy-torn": Point(_META_WRITE, TORN, inside=_REPLICA + "move_on", call=2),
    "alone-recorded": Point(_PRIMARY + "record_alone", AFTER),
    "detached": Point(_PRIMARY + "detach", AFTER),
    "map-begins": Point(_META + "write_map_pages", BEFORE),
    "map-torn": Point(_META_WRITE, TORN, inside=_META + "write_map_pages"),
    "map-written": Point(_META_WRITE, AFTER, inside=_META + "write_map_pages"),
    "map-stable": Point(_REPLICA + "persist_extents", AFTER),
}

SYNC_SOURCE = {
    "source-prepared": Point("mirror.handshake:prepare", AFTER),
    "source-copies": Point(_SYNC + "_copy_chunk", BEFORE),
    "source-sends": Point(_SYNC + "_send", BEFORE, call=2),
    "source-sent": Point(_SYNC + "_copied", BEFORE, call=2),
    "source-copied": Point(_SYNC + "_copied", AFTER, call=3),
    "source-finishes": Point(_SYNC + "_finish", BEFORE),
    "source-flushed": Point(_FLUSH + "run_round", AFTER, inside=_SYNC + "_finish"),
    "source-target-has-all": Point("mirror.session:Session.request", AFTER, inside=_SYNC + "_finish"),
    "source-in-step": Point(_PRIMARY + "in_step", AFTER, inside=_SYNC + "_finish"),
    "source-map-cleared": Point(_REPLICA + "persist_map", AFTER, inside=_SYNC + "_finish"),
}

SYNC_TARGET = {
    "target-says-its-map": Point("mirror.handshake:own_maps", AFTER),
    "target-inconsistent": Point("mirror.handshake:prepare", AFTER),
    "target-attached": Point(_PEER + "_attach", AFTER),
    "target-applies": Point(_DATA + "write", BEFORE, inside="mirror.secondary:Receiver._answer", call=2),
    "target-has-all": Point(_PEER + "_target_done", BEFORE),
    "target-up-to-date-torn": Point(_META_WRITE, TORN, inside=_PEER + "_target_done"),
    "target-up-to-date": Point(_PRIMARY + "in_step", AFTER, inside=_PEER + "_target_done"),
    "target-map-cleared": Point(_REPLICA + "persist_map", AFTER, inside=_PEER + "_target_done"),
    "target-done": Point(_PEER + "_target_done", AFTER),
}

# A handshake that finds nothing to copy.
HANDSHAKE = {
    "handshake-begins": Point("mirror.handshake:prepare", BEFORE),
    "handshake-first-copy": Point(_META_WRITE, AFTER, inside="mirror.handshake:prepare"),
    "handshake-prepared": Point("mirror.handshake:prepare", AFTER),
    "handshake-in-step": Point(_PRIMARY + "in_step", AFTER, inside=_PEER + "_attach"),
    "handshake-attached": Point(_PEER + "_attach", AFTER),
}

PROMOTE_ALONE = {
    "promote-begins": Point(_VOLUME + "_take_role_alone", BEFORE),
    "promote-flushed": Point(_DATA + "flush", AFTER, inside=_VOLUME + "_take_role_alone"),
    "promote-first-copy": Point(_META_WRITE, AFTER, inside=_VOLUME + "_take_role_alone"),
    "promote-recorded": Point(_REPLICA + "take_role", AFTER, inside=_VOLUME + "_take_role_alone"),
    "promote-serves": Point(_VOLUME + "_serve_as_primary", AFTER),
}

PROMOTE_CONNECTED = {
    "promote-asks": Point(_VOLUME + "_promote_connected", BEFORE),
    "promote-allowed": Point("mirror.session:Session.request", AFTER, inside=_VOLUME + "_promote_connected"),
    "promote-first-copy-connected": Point(_META_WRITE, AFTER, inside=_VOLUME + "_promote_connected"),
    "promote-recorded-connected": Point(_REPLICA + "take_role", AFTER, inside=_VOLUME + "_promote_connected"),
    "promote-told": Point(_VOLUME + "_serve_as_primary", AFTER),
}

DEMOTE = {
    "demote-begins": Point(_VOLUME + "_drain_and_flush", BEFORE),
    "demote-flushed": Point(_VOLUME + "_drain_and_flush", AFTER),
    "demote-gate-closed": Point(_REPLICA + "persist_map", BEFORE, inside=_VOLUME + "_leave_role"),
    "demote-first-copy": Point(_META_WRITE, AFTER, inside=_VOLUME + "_leave_role"),
    "demote-recorded": Point(_REPLICA + "take_role", AFTER, inside=_VOLUME + "_leave_role"),
    "demote-told": Point(_VOLUME + "_leave_role", AFTER),
}

SWITCH_PRIMARY = {
    "switch-drained": Point(_VOLUME + "_drain_and_flush", AFTER),
    "switch-asked": Point("mirror.session:Session._send_control", AFTER, inside=_VOLUME + "_hand_over"),
    "switch-taken-over": Point("mirror.session:Session.request", AFTER, inside=_VOLUME + "_hand_over"),
    "switch-left": Point(_VOLUME + "_leave_role", AFTER),
}

SWITCH_SECONDARY = {
    "take-over-begins": Point(_VOLUME + "_take_over", BEFORE),
    "take-over-flushed": Point(_DATA + "flush", AFTER, inside=_VOLUME + "_take_over"),
    "take-over-first-copy": Point(_META_WRITE, AFTER, inside=_VOLUME + "_take_over"),
    "take-over-recorded": Point(_REPLICA + "take_role", AFTER, inside=_VOLUME + "_take_over"),
    "take-over-serves": Point(_VOLUME + "_take_over", AFTER),
}

STOP = {
    "stop-drained": Point(_VOLUME + "_flush_for_stop", AFTER),
    "stop-parted": Point(_VOLUME + "_say_goodbye", AFTER),
    "stop-map": Point(_REPLICA + "persist_map", BEFORE, inside=_VOLUME + "_close"),
    "stop-clean-first-copy": Point(_META_WRITE, AFTER, inside=_VOLUME + "_close"),
    "stop-clean-torn": Point(_META_WRITE, TORN, inside=_VOLUME + "_close"),
    "stop-closed": Point(_VOLUME + "_close", AFTER),
}

START = {
    "start-read": Point("mirror.opening:_mark", AFTER),
    "start-map-torn": Point(_META_WRITE, TORN, inside=_META + "write_map_pages"),
    "start-map": Point(_REPLICA + "persist_map", AFTER),
    "start-log": Point(_META + "reset_log", AFTER),
    "start-epoch-first-copy": Point(_META_WRITE, AFTER, inside=_REPLICA + "update"),
    "start-epoch": Point(_REPLICA + "update", AFTER),
}

DISCONNECT = {
    "outdate-begins": Point(_VOLUME + "_outdate", BEFORE),
    "outdate-first-copy": Point(_META_WRITE, AFTER, inside=_VOLUME + "_outdate"),
    "outdate-recorded": Point(_VOLUME + "_outdate", AFTER),
    "parted": Point("mirror.session:Session.part", AFTER),
}

CREATE = {
    "create-directory": Point(_COMMAND + "_make_directory", AFTER),
    "create-marker": Point(_COMMAND + "_sync", BEFORE, call=1),
    "create-marked": Point(_COMMAND + "_sync", AFTER, call=1),
    "create-data": Point(_CREATE + "_make", AFTER, call=1),
    "create-empty-metadata": Point(_CREATE + "_write_first_metadata", BEFORE),
    "create-log": Point(_CREATE + "write_all", AFTER, call=1),
    "create-map": Point(_CREATE + "write_all", BEFORE, call=2),
    "create-superblock-torn": Point(_CREATE + "write_all", TORN, call=2),
    "create-first-copy": Point(_CREATE + "write_all", AFTER, call=2),
    "create-second-copy": Point(_CREATE + "write_all", AFTER, call=3),
    "create-files": Point(_COMMAND + "create_replica_files", AFTER),
    "create-configuration": Point(_COMMAND + "_write_durable", AFTER),
    "create-unmarked": Point(_COMMAND + "_sync", BEFORE, call=2),
    "create-done": Point(_COMMAND + "_sync", AFTER, call=3),
}

_RESIZE = "mirror.resize:"
RESIZE = {
    "resize-begins": Point(_RESIZE + "make_room", BEFORE),
    "resize-room": Point(_RESIZE + "make_room", AFTER),
    "resize-first-copy": Point(_META_WRITE, AFTER, inside=_RESIZE + "record_next"),
    "resize-torn": Point(_META_WRITE, TORN, inside=_RESIZE + "record_next"),
    "resize-recorded": Point(_RESIZE + "record_next", AFTER),
    "resize-peer-has-room": Point(_RESIZE + "Resize._ask_for_room", AFTER),
    "resize-commits": Point(_RESIZE + "commit", BEFORE),
    "resize-commit-first-copy": Point(_META_WRITE, AFTER, inside=_RESIZE + "commit"),
    "resize-committed": Point(_RESIZE + "commit", AFTER),
}

# The secondary's part of it.
RESIZE_PEER = {
    "resize-peer-room": Point(_RESIZE + "make_room", AFTER),
    "resize-peer-first-copy": Point(_META_WRITE, AFTER, inside=_RESIZE + "record_next"),
    "resize-peer-recorded": Point(_RESIZE + "record_next", AFTER),
    "resize-peer-commits": Point(_RESIZE + "Resize._commit_for_peer", BEFORE),
    "resize-peer-commit-torn": Point(_META_WRITE, TORN, inside=_RESIZE + "commit"),
    "resize-peer-committed": Point(_RESIZE + "Resize._commit_for_peer", AFTER),
}

_LOG_SIZE = "mirror.log_sizer:"
LOG_SIZE = {
    "log-size-begins": Point(_LOG_SIZE + "leave_nothing_behind", BEFORE),
    "log-size-held": Point(_LOG_SIZE + "LogSizer._change_held", BEFORE),
    "log-size-map": Point(_LOG_SIZE + "leave_nothing_behind", AFTER, inside=_LOG_SIZE + "LogSizer._change_held"),
    "log-size-first-copy": Point(_META_WRITE, AFTER, inside=_LOG_SIZE + "begin_epoch"),
    "log-size-torn": Point(_META_WRITE, TORN, inside=_LOG_SIZE + "begin_epoch"),
    "log-size-second-copy-torn": Point(_META_WRITE, TORN, inside=_LOG_SIZE + "begin_epoch", call=2),
    "log-size-recorded": Point(_REPLICA + "update", AFTER, inside=_LOG_SIZE + "begin_epoch"),
    "log-size-begun": Point(_LOG_SIZE + "begin_epoch", AFTER),
    "log-size-changed": Point(_LOG_SIZE + "LogSizer.change", AFTER),
}

_MAP_FILE = "mirror.store.map_file:"
SUSPECTS = {
    "suspect-found": Point(_PRIMARY + "suspect_locked", AFTER),
    "suspect-page-torn": Point(_MAP_FILE + "write_all", TORN, inside="mirror.suspects:Suspects.persist"),
    "suspect-page-written": Point(_MAP_FILE + "write_all", AFTER, inside="mirror.suspects:Suspects.persist"),
    "suspect-kept": Point("mirror.suspects:Suspects.persist", AFTER, inside="mirror.verify:Verifier._keep"),
    "suspect-told": Point("mirror.verify:Verifier._tell", AFTER, inside="mirror.verify:Verifier._keep"),
}

INVALIDATE = {
    "void-begins": Point(_META + "write_superblock", BEFORE),
    "void-torn": Point(_META_WRITE, TORN, inside=_META + "write_superblock", call=1),
    "void-first-copy": Point(_META_WRITE, AFTER, inside=_META + "write_superblock", call=1),
    "void-second-copy-torn": Point(_META_WRITE, TORN, inside=_META + "write_superblock", call=2),
    "void-written": Point(_META + "write_superblock", AFTER),
}

GROUPS = {
    "write": WRITE,
    "deferred": DEFERRED,
    "apply": APPLY,
    "log": LOG,
    "parked": PARKED,
    "alone": ALONE,
    "source": SYNC_SOURCE,
    "target": SYNC_TARGET,
    "handshake": HANDSHAKE,
    "promote-alone": PROMOTE_ALONE,
    "promote-connected": PROMOTE_CONNECTED,
    "demote": DEMOTE,
    "switch": SWITCH_PRIMARY,
    "take-over": SWITCH_SECONDARY,
    "stop": STOP,
    "start": START,
    "disconnect": DISCONNECT,
    "resize": RESIZE,
    "resize-peer": RESIZE_PEER,
    "log-size": LOG_SIZE,
    "suspects": SUSPECTS,
    "invalidate": INVALIDATE,
    "create": CREATE,
}

POINTS: dict[str, Point] = {name: point for group in GROUPS.values() for name, point in group.items()}
assert len(POINTS) == sum(map(len, GROUPS.values())), "a crash point's name stands twice"
