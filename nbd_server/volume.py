"""One replica's life: open, role changes, close.

Roles change inside the running process. Every change takes `_role_lock`, asks the tables of `mirror.core.states`
whether it may be, makes itself durable, and only then opens or closes the gate through which requests reach the
mirror.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirror.core import generation, states
from mirror.core.errors import LinkLost, MirrorError, NotPrimary, OperatorError
from mirror.core.generation import Action, Kind
from mirror.core.limits import LOG_SLOTS_MAX, LOG_SLOTS_MIN
from mirror.core.spin import Spin
from mirror.core.states import ConnectionState, DiskState, Refused, Role
from mirror.handshake import TARGET, Refusal
from mirror.log_sizer import LogSizer
from mirror.opening import open_replica
from mirror.peer import Peer, Settings
from mirror.primary import Gate, Primary
from mirror.replica import Replica
from mirror.resize import OPERATIONS as RESIZE_OPERATIONS
from mirror.resize import Resize
from mirror.runtime import Runtime
from mirror.session import Session
from mirror.trace import Trace
from nbd_server import control, outlook, slowness, status
from nbd_server.config import Config, load
from nbd_server.lease import Lease

log = logging.getLogger(__name__)

# Running requests get this long to end before a role change gives up; a slow disk needs more than a peer timeout.
DRAIN_TIMEOUT_S = 10.0
# What can be done later waits no longer for a role to change or a handshake to end.
NOTHING_CHANGES_PATIENCE_S = 0.2
# A running handshake is waited for beyond `wait_for_peer_s`, because its outcome decides.
HANDSHAKE_PATIENCE_S = 10.0
# A start as primary after a crash first brings the extents of its log up: at most the log's size, mostly just compared.
CATCH_UP_PATIENCE_S = 120.0
# A link that breaks between the answer and the promotion is tried again so often.
START_ATTEMPTS = 3
# The peer answers role questions at once or is gone.
ROLE_REQUEST_TIMEOUT_S = 5.0
SWITCH_TIMEOUT_S = 25.0
# A dead peer is noticed within milliseconds unless its whole machine is gone.
PROMOTE_PATIENCE_S = 0.5


@dataclass(frozen=True)
class StartOptions:
    """How `serve` was asked to start. `resume`: nbdkit died and its parent starts it again, as `primary` if it was that
    last; `memory_kept`: the parent has proven with a descriptor held since before that nothing written was forgotten.
    """

    primary: bool = False
    insecure: bool = False
    shared: bool = False
    memory_kept: bool = False
    resume: bool = False


class Volume:
    """A served replica; the plugin's requests and the operator's commands end here."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        options: StartOptions,
        runtime: Runtime,
        replica: Replica,
        cut_connections: Callable[[], None],
        tell_role: Callable[[Role], None],
        notes: list[str],
    ) -> None:
        self.name = config.name
        self.cores = config.cores
        self.can_fast_zero = replica.store.can_fast_zero
        self._directory = directory
        self._config = config
        self._options = options
        self._runtime = runtime
        self._replica = replica
        self._cut_connections = cut_connections
        self._tell_role = tell_role
        self._notes = notes
        self._trace = Trace()
        self._primary = Primary(replica, config.protocol, self._trace, Spin(config.spin))
        self._lease = Lease(runtime, options.shared or config.shared)
        self._role_lock = runtime.lock()
        self._peer: Peer | None = None
        self._stopping = False
        self._switch_refusal = ""
        self._resize = Resize(replica)
        self._log_sizer = LogSizer(self._primary, config.resync_after_crash_s, self._nothing_changes)
        self._until_connected: list[str] = []
        self._control = control.ControlServer(directory / control.FILE_NAME, self._command, runtime)
        self.running = self._primary.running
        self.crowded = self._primary.set_crowded
        self.read_into = self._primary.read_into
        self.write = self._primary.write
        self.flush = self._primary.flush
        self.zero = self._primary.zero
        self.trim = self._primary.trim

    @staticmethod
    def open(
        directory: Path,
        options: StartOptions,
        runtime: Runtime,
        cut_connections: Callable[[], None],
        tell_role: Callable[[Role], None] = lambda _: None,
    ) -> "Volume":
        """Read the replica's files and recover them. Raises MirrorError that names what is wrong and the remedy.

        `tell_role` is told of every role that is taken, and of one that is left before that is durable.
        """
        config = load(directory)
        replica, notes = open_replica(
            runtime,
            directory,
            config.data_path(directory),
            name=config.name,
            protocol=config.protocol,
            log_slots=config.log_slots,
            tracked=config.peer is not None,
            memory_kept=options.memory_kept,
        )
        for note in notes:
            log.warning("%s", note)
        return Volume(directory, config, options, runtime, replica, cut_connections, tell_role, notes)

    @property
    def size_bytes(self) -> int:
        """What a client that connects now is told."""
        return self._replica.size_bytes

    # The start

    def start(self) -> None:
        """Decide the role and take it up. Raises OperatorError when this replica must not start so."""
        self._control.start()
        if self._config.listen is None or self._config.peer is None:
            self._start_alone()
            return
        settings = Settings(
            (self._config.listen.host, self._config.listen.port),
            (self._config.peer.host, self._config.peer.port),
            self._config.protocol,
            self._config.peer_timeout_s,
            self._config.disk_timeout_s,
            self._config.policies,
            self._config.rate,
        )
        self._peer = Peer(self._replica, self._primary, settings, self._answer_peer)
        was_primary = self._replica.crashed_primary
        self._peer.start()
        self._log_sizer.start()
        if self._options.resume:
            # That it crashed as primary is remembered beyond a start as secondary and a demotion, so it is not enough.
            if not (self._options.primary and was_primary and self._resume_primary()):
                self._tell_role(Role.SECONDARY)
        elif self._options.primary:
            refusal = self._become_primary_at_start(resume=False)
            if refusal is not None:
                self._peer.stop()
                raise refusal

    def _start_alone(self) -> None:
        if self._replica.failed:
            raise OperatorError(
                "this replica's disk is Failed and the volume stands alone",
                remedy="replace the disk and restore a backup, or `nbdmirror invalidate --force` after a check",
            )
        known = self._replica.superblock
        verdict = self._may_promote(force=False)
        if isinstance(verdict, Refused):
            raise OperatorError(
                f"volume.toml names no peer, and alone it can't serve: {verdict.reason}",
                remedy=f"write `listen` and `peer` again; then: {verdict.remedy}",
            )
        if known.met_peer and known.peer_disk not in states.LEFT_BEHIND and not self._options.primary:
            raise OperatorError(
                "volume.toml names no peer, but this replica has one, which may be newer",
                remedy="write `listen` and `peer` again; or serve it with --primary, if it shall go on alone",
            )
        self._take_role_alone()

    def _resume_primary(self) -> bool:
        refusal = self._become_primary_at_start(resume=True)
        if refusal is not None:
            log.warning("not primary again after nbdkit died: %s", refusal)
            self._until_connected.append(
                f"nbdkit died while this replica was primary, and it did not resume: {refusal.message}"
            )
        return refusal is None

    def _become_primary_at_start(self, resume: bool) -> OperatorError | None:
        """Ask the peer, then become primary, or say why not."""
        peer = self._peer
        assert peer is not None
        for _ in range(START_ATTEMPTS):
            self._wait_for_first_answer(peer)
            with self._role_lock, peer.no_handshake(HANDSHAKE_PATIENCE_S):
                if self._stopping:
                    return OperatorError("the start was cut short by a stop")
                session = self._session()
                refusal = self._forbidden_by_peer(peer, session)
                verdict = self._may_promote(force=False)
                if refusal is None and isinstance(verdict, Refused):
                    refusal = verdict.error()
                if refusal is not None:
                    return refusal
                if session is None:
                    return self._start_without_peer(peer, resume)
                try:
                    self._promote_connected(session)
                    return None
                except LinkLost as error:
                    log.warning("the peer went away during the start: %s", error.message)
            peer.wait_drained(ROLE_REQUEST_TIMEOUT_S)
        return OperatorError("the link to the peer breaks again and again", remedy="mend it, or stop the peer")

    def _forbidden_by_peer(self, peer: Peer, session: Session | None) -> OperatorError | None:
        """Why what the peer said of itself forbids to start as primary, if it does."""
        theirs, outcome = session.peer if session is not None else peer.seen, peer.outcome
        if theirs is not None and theirs.role is Role.PRIMARY:
            return OperatorError("the peer is primary", remedy="start without --primary, or `switch` afterwards")
        if outcome is None:
            return None
        if session is None and outcome.action is Action.SPLIT_BRAIN:
            return Refusal(outcome)
        caught_up = session is not None and peer.state is ConnectionState.CONNECTED and outcome.rule.startswith("equal")
        if outcome.action in TARGET and not caught_up:
            return OperatorError(
                f"the peer is newer ({outcome.rule}: {outcome.reason})",
                remedy="start without --primary and let it catch up; then `nbdmirror switch`",
            )
        return None

    def _start_without_peer(self, peer: Peer, resume: bool) -> OperatorError | None:
        if peer.seen is None:
            if resume and self._replica.superblock.peer_disk not in states.LEFT_BEHIND:
                return OperatorError(
                    "the peer does not answer, so nobody knows whether it moved on",
                    remedy="`nbdmirror promote` if the peer is not primary",
                )
            text = (
                "the peer did not answer at the start; this replica is primary, and can't know whether it is the newest"
            )
            log.warning(text)
            self._until_connected.append(text)
        self._take_role_alone()
        peer.redial()
        return None

    def _wait_for_first_answer(self, peer: Peer) -> None:
        """Wait for the peer's word, and for the resync where it is equal but knows better what came last."""
        deadline_s = self._runtime.now_s() + self._config.wait_for_peer_s

        def answered() -> bool:
            return self._stopping or peer.session is not None or peer.decided

        def catching_up() -> bool:
            equal = peer.outcome is not None and peer.outcome.rule.startswith("equal")
            return equal and peer.state is ConnectionState.SYNC_TARGET and not self._stopping

        with peer.changed:
            peer.changed.wait_for(answered, self._config.wait_for_peer_s)
            patience_s = deadline_s + HANDSHAKE_PATIENCE_S - self._runtime.now_s()
            peer.changed.wait_for(lambda: answered() or peer.state is not ConnectionState.HANDSHAKE, patience_s)
            peer.changed.wait_for(lambda: not catching_up(), CATCH_UP_PATIENCE_S)

    # Taking and leaving the primary's role; call with the role lock held

    def _may_promote(self, force: bool) -> states.Verdict:
        peer = self._peer
        connection = peer.state if peer is not None else ConnectionState.STANDALONE
        session = self._session()
        disk = self._replica.disk_state(connected=session is not None)
        peer_role = session.peer.role if session is not None else None
        left_in_order = peer is not None and peer.primary_left_in_order
        return states.may_promote(disk, connection, peer_role, force, left_in_order)

    def _take_role_alone(self) -> None:
        """Become primary without the peer: a history of its own begins, durably, before the first request."""
        replica = self._replica
        replica.flush()
        known = replica.superblock
        new = self._runtime.random_number()
        # While no peer is configured nothing tracks what changes: a peer that comes later gets everything (duty g7).
        moved = generation.moved_on(known, new) if replica.tracked else generation.untracked(known, new)
        replica.take_role(
            Role.PRIMARY,
            **moved._asdict(),
            kind=Kind.ESTABLISHED,
            volume_id=known.replica_id if known.volume_id == generation.NO_VOLUME else known.volume_id,
            disk=DiskState.UP_TO_DATE,
            peer_disk=DiskState.OUTDATED if known.met_peer else None,
            redundancy_lost_at=known.redundancy_lost_at or self._runtime.wall_time_s(),
            clean=False,
        )
        self._primary.alone_is_recorded()
        self._serve_as_primary()

    def _promote_connected(self, session: Session) -> None:
        session.request("may_promote", ROLE_REQUEST_TIMEOUT_S)
        try:
            self._replica.flush()
            self._replica.take_role(Role.PRIMARY, clean=False)
        except MirrorError:
            # The peer takes this side for the primary since it agreed.
            if self._peer is not None:
                self._peer.tell_state()
            raise
        self._serve_as_primary()

    def _serve_as_primary(self) -> None:
        self._tell_role(Role.PRIMARY)
        self._primary.flushes.needed = True
        self._primary.set_gate(Gate.OPEN)
        if self._peer is not None:
            self._peer.tell_state()
        log.info("this replica is primary")

    def _leave_role(self) -> None:
        """The requests are drained and flushed: stop being primary."""
        self._primary.set_gate(Gate.CUT)
        # Before it is recorded: who is cut off comes back at once, and is to be turned away.
        self._replica.role = Role.SECONDARY
        self._tell_role(Role.SECONDARY)
        self._cut_connections()
        try:
            self._replica.persist_map()
            self._replica.take_role(Role.SECONDARY)
        finally:
            # Also where the disk refused: a peer that believes in this primary refuses to become one.
            if self._peer is not None:
                self._peer.tell_state()
        log.info("this replica is secondary")

    def _drain_and_flush(self) -> None:
        """Hold all requests; raises and goes on serving when they do not end, or can't be made stable."""
        try:
            if not self._primary.hold(DRAIN_TIMEOUT_S):
                raise OperatorError(
                    f"the running requests did not end within {DRAIN_TIMEOUT_S:g} s",
                    remedy="see the oldest request in the log, and try again",
                )
            self._flush_last()
        except BaseException:
            self._primary.set_gate(Gate.OPEN)
            raise

    # The operator's commands

    def _command(self, request: dict[str, Any]) -> dict[str, Any]:
        commands: dict[object, Callable[[], dict[str, Any]]] = {
            "status": self.status,
            "promote": lambda: self.promote(bool(request.get("force"))),
            "demote": lambda: self.demote(bool(request.get("force"))),
            "switch": self.switch,
            "connect": lambda: self.connect(bool(request.get("discard_my_data"))),
            "disconnect": self.disconnect,
            "plan": lambda: outlook.plan(self._with_peer(), self._replica, bool(request.get("discard_my_data"))),
            "diff": lambda: outlook.diff(self._with_peer(), self._replica, request.get("limit")),
            "verify": lambda: self._with_peer().verifier.command(request),
            "resize": lambda: self.resize(request.get("size")),
            "why_slow": lambda: slowness.of_server(self._replica, self._primary, self._peer, self.status()),
            "log_extents": lambda: self.set_log_extents(request.get("extents")),
        }
        command = commands.get(request["command"])
        if command is None:
            raise OperatorError(
                f"unknown command {request['command']!r}", remedy="use the nbdmirror release of the server"
            )
        return command()

    def promote(self, force: bool) -> dict[str, Any]:
        """Make this replica primary."""
        with self._role_lock:
            if self._replica.role is Role.PRIMARY:
                return _said("this replica is primary already")
            self._let_a_dead_peer_be_noticed()
            with self._no_handshake():
                verdict = self._may_promote(force)
                if isinstance(verdict, Refused):
                    raise verdict.error()
                session = self._session()
                if session is not None and not session.ended:
                    self._promote_connected(session)
                else:
                    # Nothing of the former session may land on the disk any more (invariant drain-before-next).
                    if self._peer is not None and not self._peer.wait_drained(ROLE_REQUEST_TIMEOUT_S):
                        raise OperatorError("work of the former session still waits for the disk", remedy="try again")
                    self._take_role_alone()
        if self._peer is not None:
            self._peer.redial()
        return _said("this replica is primary now", verdict.warning)

    def _no_handshake(self) -> contextlib.AbstractContextManager[None]:
        """While a role changes nobody shakes hands: the handshake rests on the roles."""
        return contextlib.nullcontext() if self._peer is None else self._peer.no_handshake(HANDSHAKE_PATIENCE_S)

    def _let_a_dead_peer_be_noticed(self) -> None:
        """The connections of a primary that was just killed break within moments: look before believing in it."""
        peer = self._peer
        if peer is None:
            return
        session = peer.session
        if session is not None and session.peer.role is Role.PRIMARY:
            try:
                session.request("are_you_there", PROMOTE_PATIENCE_S)
            except MirrorError:
                log.info("the peer does not answer: %s", session.reason or "its session goes on")
        if session is not None and session.ended:
            peer.wait_drained(ROLE_REQUEST_TIMEOUT_S)

    def demote(self, force: bool) -> dict[str, Any]:
        """Stop being primary; clients are cut off with `force`."""
        with self._role_lock:
            verdict = states.may_demote(self._replica.role, sum(self._lease.clients().values()), force)
            if isinstance(verdict, Refused):
                raise verdict.error()
            if self._replica.role is Role.SECONDARY:
                return _said("this replica is secondary already")
            with self._no_handshake():
                self._drain_and_flush()
                self._leave_role()
        if self._peer is not None:
            self._peer.redial()
        return _said("this replica is secondary now", verdict.warning)

    def switch(self) -> dict[str, Any]:
        """Swap the roles; on either side."""
        with self._role_lock:
            peer, session = self._peer, self._session()
            verdict = states.may_switch(
                self._replica.role,
                self._replica.disk_state(connected=session is not None),
                peer.state if peer is not None else ConnectionState.STANDALONE,
                session.peer.role if session is not None else None,
                session.peer.disk if session is not None else None,
            )
            if isinstance(verdict, Refused):
                raise verdict.error()
            assert peer is not None
            assert session is not None
            if self._replica.role is Role.PRIMARY:
                self._hand_over(session)
                return _said("the peer is primary now")

        def took_over() -> bool:
            return self._replica.role is Role.PRIMARY

        self._switch_refusal = ""
        session.request("switch", ROLE_REQUEST_TIMEOUT_S)
        with peer.changed:
            peer.changed.wait_for(lambda: took_over() or self._switch_refusal or session.ended, SWITCH_TIMEOUT_S)
        if took_over():
            return _said("this replica is primary now")
        why = self._switch_refusal or session.reason or f"it said nothing for {SWITCH_TIMEOUT_S:g} s"
        raise OperatorError(
            f"the peer did not hand over: {why}", remedy="`nbdmirror status` on both shows their states"
        )

    def _hand_over(self, session: Session) -> None:
        """Drain, flush both, let the peer take over; after its word nothing is served here (silent-not-error)."""
        self._drain_and_flush()
        if self._primary.session is not session:
            self._primary.set_gate(Gate.OPEN)
            raise OperatorError(
                f"the peer went away before it took over ({session.reason}); this replica stays primary",
                remedy="try again when it is back",
            )
        try:
            session.request("take_over", ROLE_REQUEST_TIMEOUT_S)
        except OperatorError:
            self._primary.set_gate(Gate.OPEN)
            raise
        except MirrorError as error:
            # It may have taken over: serving on could make two primaries.
            session.end(f"a hand-over with unknown outcome: {error.message}")
            self._leave_role()
            raise OperatorError(
                f"the peer did not confirm that it took over ({error.message}); nobody is primary here now",
                remedy="look at the peer's status, then `nbdmirror promote` the one that shall be primary",
            ) from error
        session.peer = dataclasses.replace(session.peer, role=Role.PRIMARY)
        self._leave_role()

    def connect(self, discard_my_data: bool) -> dict[str, Any]:
        """Look for the peer again; with `discard_my_data` give up this side's changes in a split brain."""
        peer = self._with_peer()
        verdict = states.may_connect(
            self._replica.role, self._replica.disk_state(peer.session is not None), peer.state, discard_my_data
        )
        if isinstance(verdict, Refused):
            raise verdict.error()
        if self._session() is not None:
            return _said("connected already")
        attempts = peer.attempts
        peer.connect(discard_my_data)
        with peer.changed:
            peer.changed.wait_for(
                lambda: (
                    peer.session is not None
                    or (peer.attempts > attempts and peer.decided and peer.state is not ConnectionState.HANDSHAKE)
                ),
                ROLE_REQUEST_TIMEOUT_S,
            )
            connected, refused, reason = self._session(), peer.state is ConnectionState.STANDALONE, peer.reason
        if connected is not None:
            return _said(f"connected: {reason}", verdict.warning)
        if refused:
            raise OperatorError(reason)
        return _said(f"looking for the peer: {reason}", verdict.warning)

    def disconnect(self) -> dict[str, Any]:
        """Stay apart from the peer until `connect`; the side that is left behind knows it."""
        peer = self._with_peer()
        session = peer.session
        verdict = states.may_disconnect(self._replica.role, self._replica.disk_state(session is not None), peer.state)
        if isinstance(verdict, Refused):
            raise verdict.error()
        with self._role_lock:
            if session is not None:
                self._part(session, "the peer was disconnected by its operator")
            peer.disconnect()
        return _said("disconnected; `nbdmirror connect` ends that", verdict.warning)

    def resize(self, size_bytes: object) -> dict[str, Any]:
        """Let the volume grow, on both replicas."""
        if type(size_bytes) is not int:
            raise OperatorError("a resize needs a size in bytes", remedy="use `nbdmirror resize DIR SIZE`")
        with self._role_lock:
            if self._stopping:
                raise OperatorError("this replica stops", remedy="resize after the next start")
            return _said(*self._resize.grow(self._peer, size_bytes))

    def set_log_extents(self, extents: object) -> dict[str, Any]:
        """Let the activity log have room for so many extents, until the volume chooses another size or starts anew.

        No verb of the command line: for tests, and for who wants to try a size.
        """
        if type(extents) is not int or not LOG_SLOTS_MIN <= extents <= LOG_SLOTS_MAX:
            raise OperatorError(
                "a log needs a number of extents", remedy=f"give one from {LOG_SLOTS_MIN} to {LOG_SLOTS_MAX}"
            )
        if not self._log_sizer.change(extents):
            raise OperatorError("the running requests did not end soon enough", remedy="try again")
        return _said(f"the activity log has room for {extents} extents now")

    @contextlib.contextmanager
    def _nothing_changes(self) -> Iterator[None]:
        """No role changes, nobody shakes hands, the replica stays open. Raises OperatorError when that can't be now."""
        if not self._role_lock.acquire(timeout=NOTHING_CHANGES_PATIENCE_S):
            raise OperatorError("a role is changing", remedy="try again")
        try:
            if self._stopping:
                raise OperatorError("this replica stops")
            with self._with_peer().no_handshake(NOTHING_CHANGES_PATIENCE_S):
                yield
        finally:
            self._role_lock.release()

    def _part(self, session: Session, reason: str) -> None:
        """Leave a session in order: the secondary learns that it will be Outdated, if there is a primary."""
        try:
            if self._replica.role is Role.PRIMARY:
                session.request("outdate", ROLE_REQUEST_TIMEOUT_S)
                self._replica.update(peer_disk=DiskState.OUTDATED)
            elif session.peer.role is Role.PRIMARY:
                self._outdate()
            session.part(reason, outdated=self._is_outdated())
        except MirrorError as error:
            log.warning("could not say goodbye to the peer: %s", error)

    def _outdate(self) -> None:
        if self._replica.superblock.disk is DiskState.UP_TO_DATE:
            self._replica.update(disk=DiskState.OUTDATED)

    def _is_outdated(self) -> bool:
        return self._replica.superblock.disk is DiskState.OUTDATED

    def _session(self) -> Session | None:
        return self._peer.session if self._peer is not None else None

    def _with_peer(self) -> Peer:
        if self._peer is None:
            raise OperatorError(
                "this volume stands alone", remedy="set `listen` and `peer` in volume.toml, and restart"
            )
        return self._peer

    # The peer's requests

    def _answer_peer(self, session: Session, message: dict[str, Any]) -> dict[str, Any] | None:
        operation = message.get("op")
        if operation == "are_you_there":
            return None
        if operation == "processor":
            return {"processor": slowness.PROCESSOR.lately()}
        if operation == "may_promote":
            self._let_peer_promote(session)
        elif operation == "take_over":
            self._take_over(session)
        elif operation == "switch":
            self._runtime.spawn("switch", self._switch_for_peer, session)
        elif operation == "switch_refused":
            self._switch_refusal = str(message.get("reason"))
        elif operation == "outdate":
            self._outdate()
        elif operation in RESIZE_OPERATIONS:
            self._resize.answer(self._with_peer(), session, message)
        else:
            raise OperatorError(f"unknown request {operation!r}", remedy="run the same release on both nodes")
        return None

    @contextlib.contextmanager
    def _roles_at_rest(self) -> Iterator[None]:
        """Nothing here changes a role or leaves the peer meanwhile. Raises OperatorError when something does.

        Asked for by both sides at once, each holds its own lock and both are refused, which is safe.
        """
        if not self._role_lock.acquire(timeout=0.2):
            raise OperatorError("the peer is changing its role itself", remedy="try again")
        try:
            yield
        finally:
            self._role_lock.release()

    def _let_peer_promote(self, session: Session) -> None:
        with self._roles_at_rest():
            if self._replica.role is Role.PRIMARY:
                raise OperatorError("the peer is primary", remedy="`nbdmirror switch` hands over")
            session.peer = dataclasses.replace(session.peer, role=Role.PRIMARY)

    def _take_over(self, session: Session) -> None:
        replica = self._replica
        with self._roles_at_rest():
            if session.ended or replica.failed or replica.superblock.disk is not DiskState.UP_TO_DATE:
                raise OperatorError("the peer's disk is not UpToDate", remedy="wait until it is")
            replica.flush()
            replica.take_role(Role.PRIMARY, clean=False)
            session.peer = dataclasses.replace(session.peer, role=Role.SECONDARY)
            self._serve_as_primary()

    def _switch_for_peer(self, session: Session) -> None:
        try:
            self.switch()
        except MirrorError as error:
            log.error("the hand-over that the peer asked for failed: %s", error)
            with contextlib.suppress(LinkLost):
                session.notify("switch_refused", reason=error.message)

    # Clients

    def admit(self, client: str, connection: object) -> None:
        """Let a client's connection in. Raises NotPrimary, or Refused when another client holds the volume."""
        self._check_primary()
        self._lease.admit(client, connection)
        try:
            self._check_primary()
        except NotPrimary:
            self._lease.leave(client, connection)
            raise

    def leave(self, client: str, connection: object) -> bool:
        """A client's connection is gone, and its requests have ended. True when it was the last of all."""
        return self._lease.leave(client, connection)

    def _check_primary(self) -> None:
        if self._replica.role is Role.PRIMARY and not self._stopping:
            return
        peer = self._peer
        session = self._session()
        who = "nobody that it knows of"
        if peer is not None and session is not None and session.peer.role is Role.PRIMARY:
            who = f"the peer at {peer.settings.peer[0]}:{peer.settings.peer[1]}"
        raise NotPrimary(
            f"this replica of {self.name!r} is secondary; primary is {who}", remedy="attach there, or promote"
        )

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Runs (offset, length, hole) of the range; holes read as zeroes."""
        if self._primary.peer_only:
            return iter([(offset, length, False)])
        return iter(self._replica.store.extents(offset, length))

    # The end

    def stop(self, timeout_s: float) -> bool:
        """End in order within about `timeout_s`: True when everything is stable and marked clean."""
        self._stopping = True
        self._resize.stop(self._peer)
        self._log_sizer.stop()
        primary, replica = self._primary, self._replica
        deadline_s = self._runtime.now_s() + timeout_s
        locked = self._role_lock.acquire(timeout=timeout_s / 4)
        was_primary = replica.role is Role.PRIMARY
        drained = primary.hold(timeout_s / 2)
        if drained and was_primary and not replica.failed:
            drained = self._flush_for_stop()
        primary.set_gate(Gate.CUT)
        self._cut_connections()
        settled = True
        if self._peer is not None:
            # Or a peer that heard goodbye would be back before this side has ended.
            self._peer.begin_stop()
            session = self._peer.session
            if session is not None and not session.ended and drained:
                self._say_goodbye(session, was_primary)
            # What it still applies on a slow disk is waited for, and on one that hangs left to the start after this.
            settled = self._peer.stop((deadline_s - self._runtime.now_s()) / 2)
        if not drained:
            primary.drain(max(0.1, deadline_s - self._runtime.now_s()))
        clean = self._close(drained and locked, settled)
        self._control.stop()
        return clean

    def _flush_last(self) -> None:
        """Make everything stable before the role is left; nothing is answered by it, so it begins no history."""
        if self._primary.session is not None:
            self._primary.flushes.run_round()
        elif not self._replica.failed:
            self._replica.flush()

    def _flush_for_stop(self) -> bool:
        try:
            self._flush_last()
        except MirrorError as error:
            log.error("the last flush failed: %s", error)
            return False
        return True

    def _say_goodbye(self, session: Session, was_primary: bool) -> None:
        try:
            if not was_primary and session.peer.role is Role.PRIMARY:
                self._outdate()
            session.part("the peer was stopped", outdated=self._is_outdated(), primary_stopped=was_primary)
        except MirrorError as error:
            log.warning("could not say goodbye to the peer: %s", error)

    def _close(self, clean: bool, settled: bool) -> bool:
        """`settled`: no thread of a session works on the files any more; else the end of the process closes them."""
        replica = self._replica
        self._resize.join()
        self._log_sizer.join()
        try:
            replica.persist_map()
            if not replica.failed:
                replica.flush()
            # What is still parked, because a disk hangs, is applied by the start that finds it after a crash.
            clean = clean and settled
            if clean and not replica.failed:
                # Secondary from now on, but for a crash as primary that is not resolved yet (duty g9).
                replica.take_role(Role.SECONDARY, clean=True)
            if settled:
                replica.store.close()
        except MirrorError as error:
            log.error("could not close in order: %s", error)
            return False
        return clean and not replica.failed

    def status(self) -> dict[str, Any]:
        """What `nbdmirror status --json` shows."""
        if self._session() is not None:
            self._until_connected.clear()
        notes = [*self._notes, *self._until_connected]
        clients = self._lease.clients()
        return status.of_server(
            self._config,
            self._replica,
            self._primary,
            self._peer,
            clients,
            notes,
            self._resize.stage,
            self._log_sizer.status(),
        )


def _said(message: str, *warnings: str | None) -> dict[str, Any]:
    return {"message": message, "warnings": [warning for warning in warnings if warning]}
