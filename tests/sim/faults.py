"""Planted faults: each breaks one thing that an invariant rests on, and the simulator must find it.

A fault replaces a piece of a production function's source by another one and puts the result in its place, for tests
only. When the text is not there any more the fault fails loudly, so that it is never silently without effect.
"""

import __future__

import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.sim import small  # isort: skip  the limits come before the product

assert small.SMALL


@dataclass(frozen=True)
class Edit:
    """`old` becomes `new` in the source of `function` ("module:Class.method")."""

    function: str
    old: str
    new: str


@dataclass(frozen=True)
class Fault:
    name: str
    edits: tuple[Edit, ...]
    # Events without which it can't show: lives with them are drawn for it.
    events: tuple[str, ...] = ()
    protocols: str = "CCCBA"
    # It needs operations of one moment on one place.
    narrow: bool = False


def _fault(
    name: str,
    *edits: tuple[str, str, str],
    events: tuple[str, ...] = (),
    protocols: str = "CCCBA",
    narrow: bool = False,
) -> Fault:
    return Fault(name, tuple(Edit(*edit) for edit in edits), events, protocols, narrow)


_PEER_ONLY_ROUND = """
def _peer_flush(primary):
    from mirror.core.wire import MessageType
    replica, session = primary.replica, primary.session
    with replica.books:
        number = replica.round
        replica.round += 1
        replica.flushing.merge(replica.unstable)
        replica.unstable.clear_all()
    if session is not None:
        stream = session.borrow()
        stream.send(MessageType.FLUSH)
        stream.receive()
        session.give_back(stream)
    with replica.books:
        replica.flushing.clear_all()
        replica.log.stable_through(number)
"""

FAULTS = (
    _fault(
        "no log record before a write",
        (
            "mirror.log_writer:LogWriter._write_one",
            "replica.store.write_log_record(transaction.position, record)",
            "pass",
        ),
    ),
    _fault(
        "extent dropped before it is stable",
        ("mirror.core.activity_log:ActivityLog._candidates", "entry.flush_round <= stable", "True"),
    ),
    _fault(
        "log slot reused early",
        ("mirror.core.activity_log:ActivityLog._candidates", "not entry.count and entry.flush_round <= stable", "True"),
        ("mirror.core.activity_log:ActivityLog.release", "hot[extent]", "(hot.get(extent) or _Hot(0, 0))"),
        ("mirror.core.activity_log:ActivityLog.release", "assert entry.count > 0", "assert True"),
    ),
    _fault(
        "extent gives way in a long flush, its dirty bits not durable",
        ("mirror.log_writer:LogWriter._leave_dirty", "replica.persist_extents(extents)", "pass"),
        events=("slow-disk", "power", "power-both", "stall-disk", "cut"),
    ),
    _fault(
        "extent gives way in a long flush, with writes since its bits were made durable",
        (
            "mirror.log_writer:LogWriter._leave_dirty",
            "replica.log.left_dirty(extents, number)",
            "replica.log.left_dirty(extents, 1 << 60)",
        ),
        events=("strike-flush",),
        narrow=True,
    ),
    _fault(
        "what a write-back says when it is awaited is ignored",
        ("mirror.store.data_file:DataFile._await_write_back", "if number != codes.ENOSYS:", "if False:"),
        events=("fail-flush", "power", "power-both", "kill"),
    ),
    _fault(
        "a log that begins anew forgets what is not stable",
        ("mirror.log_sizer:leave_nothing_behind", "replica.persist_map()", "pass"),
        ("mirror.log_sizer:LogSizer.change", "primary.session is not None", "False"),
        events=("log-size", "power", "cut"),
    ),
    _fault(
        "a log that begins anew under running writes",
        ("mirror.log_sizer:LogSizer.change", "primary.pause(PAUSE_S) and", ""),
        ("mirror.log_sizer:LogSizer._change_held", "if not replica.changed", "if False and not replica.changed"),
        ("mirror.core.activity_log:ActivityLog.begin_epoch", "assert self.quiet", "assert True"),
        ("mirror.core.activity_log:ActivityLog.release", "hot[extent]", "(hot.get(extent) or _Hot(0, 0))"),
        ("mirror.core.activity_log:ActivityLog.release", "assert entry.count > 0", "assert True"),
        events=("log-size",),
    ),
    _fault(
        "no new generation before acknowledging alone",
        ("mirror.primary:Primary.record_alone", "self.replica.move_on(DiskState.OUTDATED)", "pass"),
        events=("cut", "power"),
    ),
    _fault(
        "acknowledging before the peer",
        (
            "mirror.primary:Primary.change_both",
            "header = self._await_answer(session, change, spin_us)",
            "self.replica.runtime.spawn('late', self._await_answer, session, change, spin_us);"
            " return self.settle(session, change.offset, change.length, True, error)",
        ),
        protocols="C",
    ),
    _fault(
        "bits cleared before the peer is stable",
        ("mirror.sync:SyncSource._copied", "self._replica.unstable.mark(offset, length)", "pass"),
        events=("power", "cut"),
    ),
    _fault(
        "bits cleared before the source itself is stable",
        ("mirror.sync:SyncSource._finish", "self._primary.flushes.run_round()", "_peer_flush(self._primary)"),
        ("mirror.sync:SyncSource._stabilise_at_times", ".flushes.run_round()", " and _peer_flush(self._primary)"),
        events=("power", "cut"),
    ),
    _fault(
        "gap in the stream ignored",
        ("mirror.link:Stream.receive", "header.sequence != self.received", "False"),
        events=("drop",),
    ),
    _fault(
        "message of an old session applied",
        ("mirror.link:Stream.receive", "header.session != self.session", "False"),
        events=("stray", "cut", "reset"),
    ),
    _fault(
        "damaged data written",
        ("mirror.link:Stream.receive", "wire.crc32c(payload) != header.payload_crc", "False"),
        events=("corrupt",),
    ),
    _fault(
        "overlapping writes unordered",
        ("mirror.core.range_lock:_follow", "later.granted = False", "later.granted = True"),
    ),
    _fault(
        "flush elided wrongly",
        ("mirror.flush:FlushRounds.flush", "if not self.needed:", "if True:"),
        ("mirror.flush:FlushRounds.flush", "not self.needed and", "True and"),
        events=("power-both",),
    ),
    _fault(
        "a flush ahead that stands for what was written since",
        ("mirror.session:Session.take_ahead", "self._last_lent is stream", "True"),
        events=("power", "power-both", "slow-disk"),
        protocols="C",
    ),
    _fault(
        "a flush ahead beside others under way",
        ("mirror.session:Session.only_one_lent", "lent == 1", "True"),
        events=("power", "slow-link", "slow-disk", "cut"),
        protocols="C",
        narrow=True,
    ),
    _fault(
        "a flush ahead that does not wait for news of parked writes",
        ("mirror.session:Session.only_one_lent", "self.parked.all_said", "True"),
        events=("power", "power-both", "slow-disk"),
        protocols="C",
    ),
    _fault(
        "a flush that joined a round already begun",
        (
            "mirror.flush:FlushRounds.run_round",
            "mine = self._begun + 1",
            "mine = self._begun + (self._begun == self._finished)",
        ),
        ("mirror.flush:FlushRounds.run_round", "if self._begun == self._finished:", "if self._begun < mine:"),
        events=("slow-disk",),
    ),
    _fault(
        "resync racing a write",
        ("mirror.sync:SyncSource._copy_next", "lock_range(*first)", "lock_range(1 << 40, 1)"),
        ("mirror.sync:SyncSource._lock_more", "try_range(*run)", "try_range((1 << 40) + run[0], 1)"),
        events=("kill-nbdkit", "reset", "slow-link"),
        narrow=True,
    ),
    _fault(
        "torn record taken as good",
        ("mirror.core.layout:_check", "crc32c.crc32c(body) != _CHECKSUM.unpack_from(raw, _BODY_BYTES)[0]", "False"),
        events=("power", "power-both", "slow-disk", "kill-nbdkit", "reset"),
    ),
    _fault(
        "unstable writes not marked after a lost link",
        ("mirror.replica:Replica.take_unstable_as_dirty", "self.dirty.merge(self.unstable)", "pass"),
        ("mirror.replica:Replica.take_unstable_as_dirty", "self.dirty.merge(self.flushing)", "pass"),
        events=("power",),
    ),
    _fault(
        "handshake decided differently by the two sides",
        (
            "mirror.peer:Peer._note_outcome",
            "handshake.learn(self._replica, outcome)",
            "handshake.learn(self._replica, outcome); outcome.action is Action.TARGET_BITMAP"
            " and object.__setattr__(outcome, 'action', Action.NONE)",
        ),
        events=("power", "cut"),
    ),
    _fault(
        "a forced promote that keeps its generation",
        ("nbd_server.volume:Volume._take_role_alone", "**moved._asdict(),", ""),
        events=("cut", "force-promote", "promote", "power"),
    ),
    _fault(
        "the last message of a stream dropped",
        ("mirror.session:Session.watch", "now_s - oldest_s > disk_timeout_s", "False"),
        events=("drop",),
    ),
    _fault(
        "an old session's write landing late",
        ("mirror.peer:Peer._clean_up", "receiver.join()", "pass"),
        events=("strike-late",),
        protocols="CCB",
    ),
    _fault(
        "fdatasync failing once",
        ("mirror.store.data_file:DataFile.flush", 'self._lost = ("flush", error)', "os.fdatasync(self.data_fd)"),
        ("mirror.store.data_file:DataFile.flush", "except OSError as error:", "except OSError:"),
        events=("fail-flush", "power-both", "power"),
    ),
    _fault(
        "a forgotten memory counted as present",
        ("mirror.opening:open_replica", "kept = known_boot and", "kept = True or"),
        events=("power-both", "power", "kill"),
    ),
    _fault(
        "a read that returned an unanswered write which then vanishes",
        ("mirror.primary:Primary.read_into", "if overtaken:", "if False:"),
        events=("stall", "slow-link", "power"),
        protocols="C",
        narrow=True,
    ),
    _fault(
        "blocks written alone not dirty",
        ("mirror.primary:Primary._change_alone", "self.replica.dirty.mark(change.offset, change.length)", "pass"),
        events=("cut", "power"),
    ),
    _fault(
        "answered and not sent, not dirty at a lost link",
        (
            "mirror.deferred:Deferred.detach",
            "self.primary.replica.dirty.mark(pending.offset, pending.length)",
            "pass",
        ),
        events=("cut", "reset", "stall"),
        protocols="AB",
    ),
    _fault(
        "target not Inconsistent first",
        ("mirror.handshake:prepare", 'changes["disk"] = DiskState.INCONSISTENT', "pass"),
        events=("power", "cut"),
    ),
    _fault(
        "a source not stable before its target is Inconsistent",
        ("mirror.handshake:make_source_stable", "replica.flush()", "pass"),
        events=("kill-nbdkit", "power", "stall-disk"),
    ),
    _fault(
        "a source stable before the former session's requests have ended",
        (
            "mirror.primary:Primary.let_requests_end",
            "changing, asked = self._ranges.tickets(), self._past_the_gate()",
            "changing, asked = set(), set()",
        ),
        events=("strike-source",),
    ),
    _fault(
        "a crashed primary forgets its log",
        ("mirror.opening:_mark", "dirty.mark_extent(extent)", "pass"),
        events=("power", "kill"),
    ),
    _fault(
        "a suspect block consumed by resync",
        ("mirror.core.selection:select_changed", "copied.remove(my_suspects)", "pass"),
        ("mirror.peer:Peer._attach", "replica.dirty.remove(replica.suspects.found)", "pass"),
        events=("strike-suspect",),
    ),
    _fault(
        "a part of a suspect block written alone is not sent",
        ("mirror.sync:SyncSource._finish", "self._send_suspect_parts()", "pass"),
        events=("strike-suspect",),
    ),
    _fault(
        "a suspect block written whole alone is not sent",
        ("mirror.replica:Replica.suspects_written_alone", "self.suspects.clear(whole)", "pass"),
        events=("strike-suspect",),
    ),
    _fault(
        "a write of a suspect block answered before it is stable",
        ("mirror.primary:Primary._on_suspects", "change.flags |= Flag.FUA", "pass"),
        ("mirror.primary:Primary.suspect_locked", "if open_here:", "if False:"),
        events=("strike-suspect",),
    ),
    _fault(
        "a parked write applied before its record",
        ("mirror.secondary:Receiver._apply_beside_parked", "if header.flags & Flag.PARK:", "if False:"),
        protocols="CCB",
    ),
    _fault(
        "a parked write that a later one calls durable",
        ("mirror.core.parked:ParkedNumbers.take", "(number - min(self._open))", "0"),
        protocols="CCB",
    ),
    _fault(
        "a flush that calls all parked writes durable",
        ("mirror.core.parked:ParkedNumbers._news", "tuple(sorted(self._open))", "()"),
        protocols="CCB",
    ),
    _fault(
        "a flush that does not say what is parked",
        ("mirror.core.parked:ParkedNumbers.flush_says", "None if told == self._flushed else self._flushed", "None"),
        events=("power-both", "slow-disk"),
        protocols="CCB",
    ),
    _fault(
        "a write that overlaps a parked one applied before it",
        ("mirror.parking:Parking.make_way", "if self.writes:", "if False:"),
        protocols="CCB",
        narrow=True,
    ),
    _fault(
        "a slot that is used anew before its write is applied",
        ("mirror.parking:Parking.park", "if slot in self.writes:", "if False:"),
        ("mirror.secondary:Receiver._after_write", "self._parking.release(News(lowest_open - 1, ()))", "pass"),
        protocols="CCB",
    ),
    _fault(
        "what is parked is lost with the session",
        ("mirror.peer:Peer._settle_parked", "self._parking.settle()", "pass"),
        events=("strike-parked",),
        protocols="CCB",
    ),
    _fault(
        "what is left parked is applied without being dirty",
        ("mirror.parking:Parking.settle", "replica.persist_extents(", "set("),
        events=("strike-settled", "strike-parked"),
        protocols="CCB",
    ),
    _fault(
        "what is parked is lost with the process",
        ("mirror.opening:_apply_parked", "for slot, write in parked.items():", "for slot, write in ():"),
        events=("strike-parked",),
        protocols="CCB",
    ),
    _fault(
        "what was parked at a kill is applied without being dirty",
        ("mirror.opening:open_replica", "dirty.mark(write.offset, len(write.data))", "pass"),
        events=("strike-parked", "power", "slow-disk"),
        protocols="CCB",
    ),
    _fault(
        "a slot that is not emptied",
        ("mirror.store.parked_file:ParkedFile.drop", "self._write(slot, EMPTY_HEAD)", "pass"),
        events=("kill-nbdkit", "kill-nbdkit", "promote", "power"),
        protocols="CCB",
    ),
    _fault(
        "a slot of a former life",
        ("mirror.core.parked:decode_slot", "or found_epoch != epoch", ""),
        events=("power", "kill-nbdkit", "strike-parked"),
        protocols="CCB",
    ),
    _fault(
        "a slot over newer data that is stable",
        ("mirror.opening:open_replica", "if same_boot and found.crashed and", "if found.crashed and"),
        events=("power", "power-both", "slow-disk"),
        protocols="CCB",
    ),
    _fault(
        "an Outdated copy promoted without force",
        (
            "nbd_server.volume:Volume._may_promote",
            "disk = self._replica.disk_state(connected=session is not None)",
            "disk = self._replica.disk_state(connected=session is not None)\n"
            "    disk = states.DiskState.UP_TO_DATE if disk is states.DiskState.OUTDATED else disk",
        ),
        events=("promote", "cut", "power", "disconnect"),
    ),
    _fault(
        "an Inconsistent copy promoted",
        (
            "nbd_server.volume:Volume._may_promote",
            "disk = self._replica.disk_state(connected=session is not None)",
            "disk = states.DiskState.UP_TO_DATE",
        ),
        events=("power", "cut", "promote", "kill"),
    ),
)  # fmt: skip


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The product with this fault."""
    restore = []
    sources: dict[str, str] = {}
    try:
        for edit in fault.edits:
            function, code = _apply(edit, sources)
            restore.append((function, code))
        yield
    finally:
        for function, code in reversed(restore):
            function.__code__ = code


def _apply(edit: Edit, sources: dict[str, str]) -> tuple[Any, Any]:
    """Give the function other code (so that whoever imported it by name has it, too); returns it with its own code."""
    module_name, _, path = edit.function.partition(":")
    module = importlib.import_module(module_name)
    function: Any = module
    for one in path.split("."):
        function = getattr(function, one)
    source = sources.get(edit.function) or textwrap.dedent(inspect.getsource(function))
    if edit.old not in source:
        raise AssertionError(f"{edit.function} has no {edit.old!r} any more: mend this fault")
    sources[edit.function] = source = source.replace(edit.old, edit.new)
    if "_peer_flush" in edit.new:
        exec(_PEER_ONLY_ROUND, module.__dict__)
    code = compile(source, f"<{edit.function} with a fault>", "exec", flags=__future__.annotations.compiler_flag)
    made: dict[str, Any] = {}
    exec(code, module.__dict__, made)
    replacement = made[path.rsplit(".", maxsplit=1)[-1]]
    original = function.__code__
    function.__code__ = getattr(replacement, "__func__", replacement).__code__
    return function, original
