"""Verify and proofs, driven by the primary: one thread a session compares, keeps what differs, and repairs by order.

    a session is in step and this side is primary
      → both sides tell each other their suspects and the extents that they have not proven
      → what an operator asked for (`nbdmirror verify`), before
      → the proof of what the activity logs held, before
      → the rest of the volume, slowly

What is found is durably suspect here and at the peer before the next piece is compared. The peer keeps the same: it may
be the primary tomorrow. A suspect is cleared at the peer first, then here; whatever is cut in the middle stays suspect.
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mirror.compare import Comparer
from mirror.core.dirty_map import DirtyMap
from mirror.core.errors import ConnectionCut, LinkLost, MirrorError, NotPrimary, OperatorError, ProtocolError
from mirror.core.limits import RESYNC_STABLE_BYTES, VERIFY_NOTE_INTERVAL_S
from mirror.core.map_message import add_map
from mirror.core.states import ConnectionState, Role
from mirror.core.wire import words
from mirror.driven import OPERATIONS as DRIVEN_OPERATIONS
from mirror.driven import REQUEST_TIMEOUT_S, Driven, say_extents
from mirror.primary import Gate, Primary
from mirror.proof import Proof
from mirror.session import Session
from mirror.unproven import decode_runs, encode_runs
from mirror.verify_run import Run, State, Wish

if TYPE_CHECKING:
    from mirror.peer import Peer

log = logging.getLogger(__name__)

# How often suspects that a client has written again are looked for, while there are any.
SUSPECTS_INTERVAL_S = 0.5
# A role that is being left is left by then.
RETIRED_S = 0.5
REQUEST_KEYS = ("act", "repair", "rate", "suspects_only", "restart")
OPERATIONS = (*DRIVEN_OPERATIONS, "verify")


class Verifier:
    """Of one replica and its peer; lives as long as they do. `peer.changed` guards what others look at."""

    def __init__(self, primary: Primary, peer: "Peer") -> None:
        self.run: Run | None = None
        # One that was stopped in this session, while this side stayed primary.
        self._stopped: Run | None = None
        self.proof = Proof(primary.replica)
        self._primary = primary
        self._replica = primary.replica
        self._driven = Driven(primary.replica)
        self._runtime = primary.replica.runtime
        self._peer = peer
        self._changed = peer.changed
        # The peer's suspects and unproven extents are known in this session and reign.
        self._introduced = False
        self._proof_told = ""
        self._noted_s = 0.0
        self._runs = 0
        self._found_times = 0
        # Why nothing can be compared in this session any more.
        self._broken = ""

    # The session's thread

    def serve(self, session: Session) -> None:
        """Body of the thread: compare while this session lasts and this side is primary in step."""
        comparer = Comparer(self._primary, session)
        delay_s = 0.0
        self._broken = "" if session.peer_compares else "the peer's release of nbdmirror can't compare yet"
        if self._broken:
            return
        try:
            while self._wait_for_work(session, delay_s):
                try:
                    delay_s = self._work(session, comparer)
                except (NotPrimary, ConnectionCut) as error:
                    self._retire(error.message, session)
                    delay_s = RETIRED_S
        except (LinkLost, ProtocolError) as error:
            session.end(error.message)
        except MirrorError as error:
            self._broken = error.message
            log.error("nothing is compared any more in this session: %s", error)
        finally:
            self._retire(f"the session with the peer ended: {session.reason}" if session.ended else "it ended early")
            self._driven.proof = None
            if self._broken and not session.ended:
                self.proof.fail(self._broken)

    def _may_compare(self) -> bool:
        return (
            self._peer.state is ConnectionState.CONNECTED
            and self._replica.role is Role.PRIMARY
            and self._primary.gate in (Gate.OPEN, Gate.HELD)
            and not self._primary.peer_only
        )

    def _has_work(self) -> bool:
        return (
            not self._introduced
            or (self.run is not None and self.run.active)
            or self.proof.due
            or self._replica.suspects.rewritten.dirty_blocks > 0
        )

    def _wait_for_work(self, session: Session, delay_s: float) -> bool:
        """False when the session has ended."""
        with self._changed:
            if delay_s:
                self._changed.wait_for(lambda: session.ended or self._stop_wanted(), delay_s)
            while not session.ended:
                if self._may_compare():
                    if self._has_work():
                        return True
                    self._changed.wait(SUSPECTS_INTERVAL_S if self._replica.suspects.any else None)
                elif self._introduced or (self.run is not None and self.run.active):
                    return True
                else:
                    self._changed.wait()
            return False

    def _stop_wanted(self) -> bool:
        return self.run is not None and self.run.active and self.run.stop_wanted

    def wake(self) -> None:
        """The role has changed."""
        with self._changed:
            self._stopped = None
            self._changed.notify_all()

    def _retire(self, why: str, session: Session | None = None) -> None:
        """This side does not drive any more."""
        self._introduced = False
        self._proof_told = ""
        self.proof.end()
        self._stop_run(why, session)
        with self._changed:
            self._stopped = None

    def _work(self, session: Session, comparer: Comparer) -> float:
        """Do one piece of work; returns the seconds to rest before the next."""
        if not self._may_compare():
            raise NotPrimary("this replica is not the primary any more")
        if not self._introduced:
            self._introduce(session)
        run = self.run
        repairing = run is not None and run.active and run.wish.repair
        # A repair flushes both sides now and then, not for each piece.
        if self._replica.suspects.rewritten.dirty_bytes > (RESYNC_STABLE_BYTES if repairing else 0):
            self._settle_suspects(session)
        if run is not None and run.active:
            return self._run_step(run, session, comparer)
        if not self.proof.due:
            return 0.0
        rate = self.proof.bytes_per_s
        try:
            done_bytes = self.proof.step(lambda offset, length: self._compare(session, comparer, offset, length))
        except (LinkLost, ProtocolError, NotPrimary, ConnectionCut):
            raise
        except MirrorError as error:
            log.error("the proof that both copies are equal stopped: %s", error)
            self.proof.fail(error.message)
            done_bytes = 0
        self._note_proof(session)
        return done_bytes / rate

    def _compare(self, session: Session, comparer: Comparer, offset: int, length: int) -> list[tuple[int, int]]:
        differing = comparer.compare(offset, length)
        if differing:
            self._keep(session, differing)
        return differing

    # Suspects

    def _introduce(self, session: Session) -> None:
        """Either side learns the other one's suspects, and this one what the peer has not proven."""
        replica = self._replica
        with replica.books:
            ours = replica.suspects.found.copy()
        say_extents(session, "suspects_add", ours)
        theirs = DirtyMap(replica.size_bytes)
        extent: int | None = 0
        while extent is not None:
            answer = session.request("suspects_get", REQUEST_TIMEOUT_S, from_extent=extent)
            add_map(theirs, answer.get("extents"), "suspects", "no list of blocks where suspects were due")
            extent = _next_extent(answer.get("next"), extent)
        theirs.remove(ours)
        for run in theirs.runs():
            self._primary.suspect(session, *run)
        replica.suspects.persist()
        unproven = session.request("unproven_get", REQUEST_TIMEOUT_S).get("runs")
        self.proof.begin(decode_runs(unproven, replica.unproven.extent_count))
        self._introduced = True
        self._note_proof(session)

    def _keep(self, session: Session, differing: list[tuple[int, int]]) -> None:
        """Suspects become durable, here first: this side knows of them already."""
        self._replica.suspects.persist()
        self._tell(session, "suspects_add", differing)
        self._found_times += 1
        if self._found_times & (self._found_times - 1) == 0:  # rarer and rarer: all of a volume may differ
            count_bytes = sum(length for _, length in differing)
            log.error("the copies differ in %d bytes at %d and behind: suspects now", count_bytes, differing[0][0])

    def _settle_suspects(self, session: Session) -> None:
        """What was written whole on both goes, once it is stable there."""
        replica, suspects = self._replica, self._replica.suspects
        with replica.books:
            runs = list(suspects.rewritten.runs())
        if not runs:
            return
        self._primary.flushes.flush()
        with replica.books:
            if self._primary.session is not session:
                raise LinkLost(session.reason)
        self._tell(session, "suspects_clear", runs)
        with replica.books:
            suspects.clear(runs)
        suspects.persist()
        log.info("%d bytes are no suspects any more", sum(length for _, length in runs))

    def _tell(self, session: Session, operation: str, runs: Iterable[tuple[int, int]]) -> None:
        blocks = DirtyMap(self._replica.size_bytes)
        for run in runs:
            blocks.mark(*run)
        say_extents(session, operation, blocks)

    # The proof

    def _note_proof(self, session: Session) -> None:
        """Tell the peer what is proven and how it goes, and make it durable, at times and at the end of a part."""
        proof, now_s = self.proof, self._runtime.now_s()
        state = f"{proof.state.value}{'' if proof.due else ', all'}"
        turned = state != self._proof_told
        if not turned and now_s - self._noted_s < VERIFY_NOTE_INTERVAL_S:
            return
        self._noted_s, self._proof_told = now_s, state
        finished, proof.finished = proof.finished, []
        if finished:
            session.request("proven", REQUEST_TIMEOUT_S, runs=encode_runs(sorted(finished)))
            with self._replica.books:
                self._replica.unproven.proven(finished)
        self._replica.unproven.persist()
        session.notify("proof_state", **proof.status())
        if turned:
            log.info("proof that both copies are equal: %s", state)

    # A verify

    def _run_step(self, run: Run, session: Session, comparer: Comparer) -> float:
        replica = self._replica
        if run.stop_wanted:
            self._stop_run("by the operator's word", session, may_go_on=True)
            return 0.0
        with replica.books:
            chunk = run.next_chunk(replica.suspects)
        try:
            if chunk is None and run.found.size_bytes < replica.size_bytes and not run.wish.suspects_only:
                self._stop_run("the volume has grown since it began", session)
                return 0.0
            if chunk is None:
                self._finish(run, session)
                return 0.0
            differing = self._compare(session, comparer, *chunk)
            if run.wish.repair:
                self._repair(run, comparer, *chunk, differing)
        except (LinkLost, ProtocolError, NotPrimary, ConnectionCut):
            raise
        except MirrorError as error:
            self._stop_run(error.message, session, may_go_on=True)
            return 0.0
        now_s = self._runtime.now_s()
        with self._changed:
            for part in differing:
                run.found.mark(*part)
            if run.wish.repair:
                run.repaired_bytes += sum(length for _, length in differing)
            run.advance(*chunk, now_s)
            due = now_s - self._noted_s >= VERIFY_NOTE_INTERVAL_S
        if due:
            self._noted_s = now_s
            self._note(run, State.RUNNING)
            self._send_note(run, State.RUNNING, session)
        return chunk[1] / run.wish.rate if run.wish.rate else 0.0

    def _repair(self, run: Run, comparer: Comparer, offset: int, length: int, differing: list[tuple[int, int]]) -> None:
        for part in differing:
            comparer.repair(*part, from_primary=run.wish.repair == "primary")
        with self._replica.books:
            # Suspects that are equal by now: the operator's word counts for them too.
            equal = DirtyMap(self._replica.size_bytes)
            equal.mark_where(self._replica.suspects.found, offset, length)
        for part in equal.runs():
            comparer.same(*part)

    def _finish(self, run: Run, session: Session) -> None:
        if run.wish.repair:
            self._settle_suspects(session)
        run.ended = self._runtime.wall_time_s()
        # Whoever waits for the end finds its result in the status of both sides.
        self._note(run, State.DONE)
        try:
            self._send_note(run, State.DONE, session)
        finally:
            self._end_run(run, State.DONE, "", may_go_on=False)
        log.info("verify done: %s (%d bytes differ)", run.result(State.DONE), run.differing_bytes)

    def _stop_run(self, why: str, session: Session | None = None, may_go_on: bool = False) -> None:
        """Cut it short, and tell a peer that is there. `may_go_on`: the next one counts what this one has done."""
        run = self.run
        if run is None or not run.active:
            return
        run.ended = self._runtime.wall_time_s()
        try:
            self._note(run, State.STOPPED)
            if session is not None:
                self._send_note(run, State.STOPPED, session)
        except MirrorError as error:
            log.error("could not note how far the verify is: %s", error)
        self._end_run(run, State.STOPPED, why, may_go_on)
        log.warning("verify stopped at %d: %s", run.cursor, why)

    def _end_run(self, run: Run, state: State, reason: str, may_go_on: bool) -> None:
        with self._changed:
            run.state, run.reason = state, reason
            if not run.wish.suspects_only:
                self._stopped = run if may_go_on else None
            self._changed.notify_all()

    def _note(self, run: Run, state: State) -> None:
        """How far it is, durably; one that looks at suspects alone says nothing of the volume."""
        if not run.wish.suspects_only:
            self._replica.update(last_verify=run.note(state))

    def _send_note(self, run: Run, state: State, session: Session) -> None:
        if not run.wish.suspects_only:
            session.request("verify_note", REQUEST_TIMEOUT_S, note=dict(run.note(state)))

    # Commands of operators, here or passed on by the peer

    def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start, stop or tell of a verify. Raises OperatorError."""
        session = self._peer.session
        if self._replica.role is Role.PRIMARY:
            return self._act(request, session)
        if session is None or session.ended or session.peer.role is not Role.PRIMARY:
            raise OperatorError(
                "this replica is not primary and no primary is connected, so there is nothing to compare with",
                remedy="connect the replicas and `nbdmirror promote` one of them",
            )
        asked = {key: request[key] for key in REQUEST_KEYS if key in request}
        answer = session.request("verify", REQUEST_TIMEOUT_S, **asked)
        return {key: value for key, value in answer.items() if key != "answer"}

    def _act(self, request: dict[str, Any], session: Session | None) -> dict[str, Any]:
        act = request.get("act")
        if act == "start":
            self._start(Wish.of(request), session)
        elif act == "stop":
            self._ask_to_stop()
        elif act != "progress":
            raise OperatorError(f"{act!r} is nothing that a verify can do", remedy="run the same release on both nodes")
        with self._replica.books:
            # One that finds all equal clears none that was found before.
            suspects = self._replica.suspects.status()
        with self._changed:
            return {"run": {**self.run.status(), "suspects": suspects} if self.run is not None else None}

    def _start(self, wish: Wish, session: Session | None) -> None:
        replica = self._replica
        if session is None or session.ended:
            raise OperatorError(f"the peer is not connected: {self._peer.reason}", remedy="verify when it is back")
        if self._peer.state is not ConnectionState.CONNECTED:
            raise OperatorError("a resync is running", remedy="wait for its end: `nbdmirror status DIR --watch`")
        if self._broken:
            raise OperatorError(self._broken, remedy="`nbdmirror disconnect`, then `connect`, begins anew")
        if self._primary.peer_only or replica.failed:
            raise OperatorError(
                "this replica's disk is Failed", remedy="replace it first: docs/operations.md, The disk fails"
            )
        with self._changed:
            if self.run is not None and self.run.active:
                raise OperatorError(
                    "a verify is running already", remedy="wait for it, or `nbdmirror verify DIR --stop`"
                )
            self._runs += 1
            last, former = replica.superblock.last_verify, self._stopped
            wall_time_s, now_s = self._runtime.wall_time_s(), self._runtime.now_s()
            with replica.books:
                self.run = Run(self._runs, wish, replica.suspects, last, former, wall_time_s, now_s)
            self._changed.notify_all()

    def _ask_to_stop(self) -> None:
        with self._changed:
            if self.run is None or not self.run.active:
                raise OperatorError("no verify is running", remedy="`nbdmirror status DIR` shows the last one")
            self.run.stop_wanted = True
            self._changed.notify_all()

    # The peer's requests

    def answer(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """What the driving side asks or tells, or an operator there. Raises MirrorError."""
        if message.get("op") != "verify":
            return self._driven.answer(message)
        if self._replica.role is not Role.PRIMARY:
            raise OperatorError("the peer is not primary any more", remedy="try again")
        return self._act(message, self._peer.session)

    def status(self) -> dict[str, Any]:
        """The keys of `nbdmirror status` that are about comparing."""
        session = self._peer.session
        connected = session is not None and not session.ended
        driving = self._replica.role is Role.PRIMARY
        proof = None
        if connected:
            proof = self.proof.status() if driving else self._driven.proof or {"state": "waiting", "reason": None}
        run = self.run
        with self._changed:
            verify = run.status() if run is not None and run.active and driving else None
        return {"proof": proof, "verify": verify}


def _next_extent(value: object, after: int) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value <= after:
        raise ProtocolError(f"{words(value)} where a further extent was due")
    return value
