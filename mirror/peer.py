"""All that belongs to one peer: reaching it, the handshake, the live session, the resync, and why there is none.

Both replicas listen, and both dial while they have no session. One handshake runs at a time on each side; when two
cross, both are told to wait and try again a random moment later. A handshake ends in a session, a wait (tried again),
or a refusal (this side stops dialling and stays Standalone, but still answers, so that what was mended on the other
side is found). Whoever dials this side and can't be of this volume, or speaks no version of ours, is told why and
changes nothing here: only the configured address, or the volume's other half, may stop this side's dialling.

A new session begins only after every thread of the former one has ended (invariant drain-before-next).
"""

import contextlib
import dataclasses
import errno
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from mirror import handshake
from mirror.core import generation
from mirror.core.errors import DeviceError, LinkLost, MirrorError, OperatorError, PeerError, ProtocolError
from mirror.core.forecast import Forecast, forecast, rough_speed_of
from mirror.core.generation import Action, Outcome, Standing
from mirror.core.limits import DATA_STREAMS, SYNC_STREAMS
from mirror.core.policy import REFUSE_ALWAYS, Policies
from mirror.core.states import ConnectionState, DiskState, Role
from mirror.core.throttle import AUTO, Rate
from mirror.core.wire import Header, MessageType, words
from mirror.handshake import Conversation, Hello, Plan, Refusal, Wait
from mirror.link import Listener, Stream, dial
from mirror.parking import Parking
from mirror.primary import Primary
from mirror.questions import Questions, Said
from mirror.replica import Replica
from mirror.retry import Retry
from mirror.runtime import Runtime, Thread
from mirror.secondary import Receiver
from mirror.session import SILENCES_KEPT, Session
from mirror.strangers import Strangers
from mirror.sync import SyncSource
from mirror.verify import OPERATIONS as VERIFY_OPERATIONS
from mirror.verify import Verifier

log = logging.getLogger(__name__)

# How soon an unreachable peer is dialled again: at once for the first time, then rarer.
REDIAL_FIRST_S = 0.1
REDIAL_MAX_S = 1.0
# A host that is there answers a connection within a round trip, one retransmission (1 s) included.
DIAL_TIMEOUT_S = 2.0
# A stop waits so long at least for the threads of the session that it ended.
STOP_PATIENCE_S = 0.5
# A step of the handshake: a durable superblock and map page or two, on a busy disk.
HANDSHAKE_STEP_TIMEOUT_S = 5.0
# A primary's requests wait for this long at most while the new session is put in place; and so long a handshake waits
# for those of the former session, which holds nobody up.
ATTACH_TIMEOUT_S = 1.0
STILL_RUNNING = "the running requests did not end in time; trying again"
STREAMS = DATA_STREAMS + SYNC_STREAMS


@dataclasses.dataclass(frozen=True)
class Settings:
    listen: tuple[str, int]
    peer: tuple[str, int]
    protocol: str
    peer_timeout_s: float
    disk_timeout_s: float
    policies: Policies = REFUSE_ALWAYS
    resync_rate: Rate = AUTO


class Peer:
    """The peer of a replica. `on_control` answers the peer's requests that are not about this module's own business."""

    def __init__(
        self,
        replica: Replica,
        primary: Primary,
        settings: Settings,
        on_control: Callable[[Session, dict[str, Any]], dict[str, Any] | None],
    ) -> None:
        self.settings = settings
        self.session: Session | None = None
        self.state = ConnectionState.CONNECTING
        self.reason = "the peer was not reached yet"
        self.outcome: Outcome | None = None
        # What the last handshake chose.
        self.plan: Forecast | None = None
        # Of former sessions: from when to when it was silent, the end included where that ended one.
        self._silences: deque[tuple[float, float]] = deque(maxlen=SILENCES_KEPT)
        self.source: SyncSource | None = None
        self.target_progress: dict[str, Any] | None = None
        self.seen: Standing | None = None
        # The last handshake ended by the table's word (a refusal, or nothing to be done yet), not by a lost link.
        self.decided = False
        self.attempts = 0
        self.discard_my_data = False
        # The primary was stopped in order and had nothing more than this side; nobody can know what it did since.
        self.primary_left_in_order = False
        self._replica = replica
        self._primary = primary
        self._runtime: Runtime = replica.runtime
        self._on_control = on_control
        self.changed = self._runtime.condition()
        self.verifier = Verifier(primary, self)
        self._handshake = self._runtime.lock()
        self.retry = Retry(self._runtime, self.changed)
        self.questions = Questions(replica, settings.peer, self.said)
        self._strangers = Strangers(self._runtime)
        self._pending: Session | None = None
        self._wanted = True
        self._refused = False
        self._closing = False
        self._leaving = False
        self._redial_now = False
        # After this time it dials again.
        self._redial_delay_s = 0.0
        # Whose stream a handshake is under way on.
        self._shaking: Stream | None = None
        self._receivers: list[Receiver] = []
        # Of the last session.
        self._parking = Parking(replica)
        self._threads: list[Thread] = []
        self._listener: Listener | None = None
        self._cleaner: Thread | None = None
        self._dialler: Thread | None = None
        self._asked_by_operator = False

    # Life

    def start(self) -> None:
        """Listen and dial. Raises OperatorError when the address can't be listened at, or there is no thread."""
        self._listener = Listener(self._runtime, self.settings.listen, self._on_stream, self._strangers.turned_away)
        # Two: a host that is silent holds up whoever dials it, and a session can come from there and end meanwhile.
        self._cleaner = self._runtime.spawn("clean-up", self._clean_up_after_each)
        self._dialler = self._runtime.spawn("dial", self._dial_while_alone)

    def begin_stop(self) -> None:
        """No session begins any more; the present one goes on, so that goodbye can be said in it."""
        self._leaving = True

    def stop(self, patience_s: float = 0.0) -> bool:
        """End the session and a handshake. False when one of them may still work on the disk after `patience_s`."""
        self.begin_stop()
        with self.changed:
            self._closing = True
            self.changed.notify_all()
        self.end("this replica stops")
        # One that begins from now on sees that this side stops.
        shaking = self._shaking
        if shaking is not None:
            shaking.shutdown()
        if self._listener is not None:
            self._listener.close()
        if self._cleaner is None:
            return True
        self._cleaner.join(max(STOP_PATIENCE_S, patience_s))
        return not self._cleaner.is_alive()

    def end(self, reason: str) -> None:
        session = self.session
        if session is not None:
            session.end(reason, orderly=True)

    def connect(self, discard_my_data: bool) -> None:
        """The operator's word to try again."""
        with self.changed:
            self._wanted = True
            self._refused = False
            self.decided = False
            self._redial_now = True
            self._asked_by_operator = True
            self.retry.begin_anew()
            self.discard_my_data = discard_my_data
            self.state = ConnectionState.CONNECTING if self.session is None else self.state
            self.changed.notify_all()

    def disconnect(self) -> None:
        """The operator's word to stay alone until `connect`."""
        with self.changed:
            self._wanted = False
            self.retry.begin_anew()
            self.changed.notify_all()
        self.end("disconnected by the operator")
        with self.changed:
            self.changed.wait_for(lambda: self.session is None, self.settings.peer_timeout_s)
            self._set(ConnectionState.STANDALONE, "disconnected by the operator")

    def redial(self) -> None:
        """Something changed that the last handshake rested on."""
        with self.changed:
            self._refused = False
            self._redial_now = True
            self.changed.notify_all()

    @contextlib.contextmanager
    def no_handshake(self, timeout_s: float) -> Iterator[None]:
        """Nobody shakes hands inside, so what a handshake rests on may change. Raises OperatorError."""
        if not self._handshake.acquire(timeout=timeout_s):
            raise OperatorError("a handshake with the peer is under way and does not end", remedy="try again")
        try:
            yield
        finally:
            self._handshake.release()

    def wait_drained(self, timeout_s: float) -> bool:
        """Wait until no ended session has work left on this replica. False when it still has."""
        with self.changed:
            return bool(self.changed.wait_for(lambda: not self._ended(), timeout_s))

    def _set(self, state: ConnectionState, reason: str) -> None:
        """Call with `changed` held."""
        self.state = state
        self.reason = reason
        self.changed.notify_all()

    def _clean_up_after_each(self) -> None:
        """Body of the thread that clears away what is left of each session that ended."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._closing or self._ended())
                ended = self._ended()
                if ended:
                    # A word to dial at once was for the time of that session, a delay for the time before it.
                    self._redial_now = False
                    self._redial_delay_s = 0.0
            if ended:
                self._clean_up()
                continue
            # A handshake that was under way may still end in a session: nobody else would end it.
            with self._handshake:
                if self.session is None:
                    return
            self.end("this replica stops")

    def _dial_while_alone(self) -> None:
        """Body of the thread that dials while there is no session."""
        while self._wait_to_dial():
            if self._dial():
                self._redial_delay_s = 0.0
            else:
                later_s = max(REDIAL_FIRST_S, self._redial_delay_s * 2)
                self._redial_delay_s = min(REDIAL_MAX_S, later_s) * self._jitter()

    def _wait_to_dial(self) -> bool:
        """No sooner than the delay says, nor than a plan that failed may be tried again. False when this side stops."""
        now_s = self._runtime.now_s
        began_s = now_s()
        with self.changed:
            while not self._closing:
                if not self._may_dial():
                    self.changed.wait()
                    continue
                wait_s = max(began_s + self._redial_delay_s - now_s(), self.retry.left_s())
                if self._redial_now or wait_s <= 0:
                    self._redial_now = False
                    return True
                self.changed.wait(wait_s)
            return False

    def _jitter(self) -> float:
        return 0.75 + self._runtime.random_number() % 1024 / 2048

    def _ended(self) -> bool:
        return self.session is not None and self.session.ended

    def _stops(self) -> bool:
        """As it is now: another thread may have said so since the last look."""
        return self._leaving

    def _may_dial(self) -> bool:
        return self.session is None and self._wanted and not self._refused and not self._leaving

    def _clean_up(self) -> None:
        """The session ended: wait for whatever still works for it, then forget it."""
        session = self.session
        assert session is not None
        self._primary.detach(session)
        for receiver in self._receivers:
            receiver.join()
        self._settle_parked(session)
        if self.source is not None:
            self.source.join()
        for thread in self._threads:
            thread.join()
        self._primary.join()
        session.close()
        if session.disk_trouble:
            self.retry.failed(session.reason)
        with self.changed:
            self._receivers, self._threads = [], []
            self.session = None
            self.source = None
            self.target_progress = None
            self._set(ConnectionState.CONNECTING if self._wanted else ConnectionState.STANDALONE, session.reason)

    def _settle_parked(self, session: Session) -> None:
        """Nothing of an ended session touches the disk any more but this; the next one begins when it is done."""
        replica = self._replica
        try:
            try:
                self._parking.settle()
            except DeviceError as error:
                session.disk_trouble = True
                replica.drop_out(error)
                self._parking.give_up()
        except DeviceError as error:
            replica.fail(error)
        except Exception as bug:  # outermost: whoever cleans up must go on
            # But not with a copy that may lack what was answered.
            log.exception("could not apply what was parked")
            replica.fail(DeviceError(str(replica.store.parked.path), "apply", errno.EIO, f"a bug of ours: {bug!r}"))

    def _on_end(self, session: Session, reason: str) -> None:
        log.log(logging.INFO if session.orderly else logging.WARNING, "the session with the peer ended: %s", reason)
        self._silences.extend(session.silences)
        if not session.orderly:
            self._silences.append((session.heard_at_s, self._runtime.now_s()))
        self._primary.detach(session)
        with self.changed:
            self.changed.notify_all()

    def silence(self) -> dict[str, Any]:
        """For how long nothing was heard from the peer (null without a session), and the latest silences of before,
        those among them that ended a session: how long ago they began and ended."""
        now_s, session = self._runtime.now_s(), self.session
        known = [*self._silences, *(session.silences if session is not None and not session.ended else ())]
        return {
            "silent_s": None if session is None else round(now_s - session.heard_at_s, 3),
            "before": [
                {"began_ago_s": round(now_s - began_s, 3), "ended_ago_s": round(now_s - ended_s, 3)}
                for began_s, ended_s in known[-SILENCES_KEPT:]
            ],
        }

    # The handshake

    def standing(self, counted: bool = True) -> Standing:
        """What this side says of itself; what it rests on is checked again before the session is attached."""
        return handshake.standing(self._replica, self.discard_my_data, self.settings.policies, counted)

    def _dial(self) -> bool:
        """One attempt as the dialling side; True when it led to a session or a decision."""
        failures = self.retry.backoff.failures
        try:
            stream = dial(self.settings.peer, DIAL_TIMEOUT_S)
            stream.set_timeout(HANDSHAKE_STEP_TIMEOUT_S)
        except MirrorError as error:
            return self._not_connected(error, "{}:{}".format(*self.settings.peer))
        # Only now: reaching a peer that is gone may take seconds, and role changes wait for this lock.
        with self._handshake:
            self.attempts += 1
            self._shaking = stream
            try:
                if not self._may_dial() or self.retry.backoff.failures > failures:
                    # Reaching the peer took its time: since then it came by itself, the operator said disconnect, or
                    # what was agreed on with it failed.
                    stream.close()
                    return True
                self._shake_hands_as_dialler(Conversation(stream, self._runtime.random_number()))
            except MirrorError as error:
                stream.close()
                return self._not_connected(error, stream.peer_address)
            finally:
                self._shaking = None
        return True

    def _shake_hands_as_dialler(self, talk: Conversation) -> None:
        self._note_handshake()
        mine = self.standing()
        talk.hello(mine, self._features())
        theirs, features, rule = talk.hear_hello()
        if rule == handshake.DISCONNECTED:
            self._note_outcome(generation.decide(mine, theirs), mine, theirs)
            with self.changed:
                self.decided = True
            raise Wait("the peer was disconnected by its operator")
        outcome = generation.decide(mine, theirs)
        self._obey(outcome, mine, theirs)
        handshake.check_same(outcome, rule)
        handshake.check_protocols(self._features(), features)
        plan = Plan(outcome, mine, theirs, self._runtime.random_number())
        with self.retry.carrying_out():
            self._begin_as_dialler(talk, plan, features)

    def _begin_as_dialler(self, talk: Conversation, plan: Plan, features: dict[str, Any]) -> None:
        self._settle_former_session(plan)
        talk.say(step="prepare", resync_generation=plan.resync_generation, **handshake.own_maps(self._replica, plan))
        handshake.prepare(self._replica, plan, talk.hear("prepared"))
        session = self._new_session(talk.number, talk.stream, plan, features)
        try:
            for index in range(2 * STREAMS):
                data = dial(self.settings.peer, DIAL_TIMEOUT_S)
                data.send(MessageType.HELLO, offset=session.number, number=index + 1)
                session.attach(index % STREAMS, data, ours=index < STREAMS)
            talk.say(step="go")
            talk.hear("gone")
            session.assemble()
            self._attach(session, plan)
        except BaseException:
            session.ended = True
            for data in session.streams()[1:]:
                data.close()
            raise

    def _settle_former_session(self, plan: Plan) -> None:
        """A change of the former session may be under way on a slow disk here, after the peer has carried it out.

        Answered later than the flush of a source began, it would be stable nowhere once the target has given up its
        copy. And on a disk that hangs each attempt would come as far as holding everybody's requests for nothing.
        """
        if not self._primary.let_requests_end(ATTACH_TIMEOUT_S):
            raise PeerError(STILL_RUNNING)
        handshake.make_source_stable(self._replica, plan)

    def _note_handshake(self) -> None:
        with self.changed:
            # Why the last one was refused stays in sight until this one ends otherwise.
            if not self._refused:
                self._set(ConnectionState.HANDSHAKE, "shaking hands with the peer")

    def _on_stream(self, stream: Stream, header: Header, payload: bytes) -> None:
        """A greeted stream with its first message: a handshake, a data stream of one under way, or a question."""
        if header.type is MessageType.QUESTION:
            self.questions.serve(stream, payload)
        elif header.type is not MessageType.HELLO:
            error = ProtocolError(f"a {header.type.name} message outside a session")
            self._strangers.turned_away(stream.peer_address, error)
            stream.close()
        elif header.number:
            self._on_data_stream(stream, header)
        else:
            self._answer(stream, payload)

    def said(self, discard_my_data: bool | None) -> Said:
        """What this side says in a question or an answer; None: with the word that its operator gave, if any."""
        word = self.discard_my_data if discard_my_data is None else discard_my_data
        mine = handshake.standing(self._replica, word, self.settings.policies)
        return Said(mine, self._features(), self.session is not None, self._wanted)

    def _on_data_stream(self, stream: Stream, header: Header) -> None:
        with self.changed:
            pending = self._pending
            if pending is None or pending.number != header.offset or not 1 <= header.number <= 2 * STREAMS:
                stream.close()
                return
            index = header.number - 1
            # What the dialler calls its own streams carries its requests: for this side they are incoming.
            pending.attach(index % STREAMS, stream, ours=index >= STREAMS)
            self.changed.notify_all()

    def _answer(self, stream: Stream, payload: bytes) -> None:
        """The accepting side of a handshake, in the thread that greeted the stream."""
        talk = Conversation(stream)
        if self._stops():
            talk.refuse("this replica stops")
            return
        stream.set_timeout(HANDSHAKE_STEP_TIMEOUT_S)
        # Who it is comes before whether there is room for it.
        hello = self._hello_of_no_stranger(talk, payload)
        if hello is None:
            return
        if not self._wanted:
            self._answer_apart(talk, hello)
            return
        session = self.session
        if session is not None and hello.theirs.replica_id == session.peer.replica_id:
            # The peer has forgotten the session, so it is over; the next attempt finds it drained.
            session.end("the peer began a new session")
        if not self._handshake.acquire(timeout=0.05):
            talk.refuse("this replica is busy with another handshake")
            return
        try:
            self._shaking = stream
            if self._stops():
                talk.refuse("this replica stops")
                return
            session = self.session
            if session is not None:
                drains = "the former session is not drained yet"
                talk.refuse(drains if session.ended else "this replica is connected to another replica of the volume")
                return
            if self.retry.forbids(hello.features):
                talk.refuse(f"what was agreed on failed ({self.retry.backoff.reason}), and it is too soon to try again")
                return
            self._note_handshake()
            self._shake_hands_as_listener(talk, hello)
        except MirrorError as error:
            talk.refuse(str(error))
            self._not_connected(error, stream.peer_address)
        finally:
            self._shaking = None
            self._handshake.release()

    def _hello_of_no_stranger(self, talk: Conversation, payload: bytes) -> Hello | None:
        """What it says, if it may be the peer. A stranger is told why it is none, and leaves no trace but in the log:
        it must neither stop the dialling, nor pass for the peer's word at a start."""
        why: MirrorError
        # Anybody may come, as often as he likes: the books are not for him.
        mine = self.standing(counted=False)
        try:
            hello = handshake.parse_hello(payload)
            talk.number = hello.number
            handshake.check_no_stranger(mine, hello.theirs)
            return hello
        except Refusal as refusal:
            why = refusal
            # Say who we are, so that it finds the same; also one of a version that this one can't speak with.
            with contextlib.suppress(PeerError):  # it has hung up already
                talk.hello_back(mine, self._features(), refusal.outcome.rule)
        except ProtocolError as error:
            why = error
        talk.refuse(str(why))
        self._strangers.turned_away(talk.stream.peer_address, why)
        return None

    def _answer_apart(self, talk: Conversation, hello: Hello) -> None:
        """Disconnected by the operator: say who we are all the same, and take note of who the other one is."""
        # A peer that starts as primary must know of another one.
        with contextlib.suppress(PeerError):  # it has hung up already
            talk.hello_back(self.standing(), self._features(), handshake.DISCONNECTED)
        talk.refuse("it was disconnected by its operator")
        if not self._handshake.acquire(timeout=0.05):
            return
        try:
            if self._stops():
                return
            mine = self.standing()
            self._note_outcome(generation.decide(mine, hello.theirs), mine, hello.theirs)
        except MirrorError as error:
            log.warning("the peer at %s was turned away: %s", talk.stream.peer_address, error)
        finally:
            self._handshake.release()

    def _shake_hands_as_listener(self, talk: Conversation, hello: Hello) -> None:
        mine, theirs, features = self.standing(), hello.theirs, hello.features
        # The answer goes out whatever the outcome: the other side decides by the same table.
        outcome = generation.decide(mine, theirs)
        talk.hello_back(mine, self._features(), outcome.rule)
        self._obey(outcome, mine, theirs)
        handshake.check_protocols(self._features(), features)
        request = talk.hear("prepare")
        plan = Plan(outcome, mine, theirs, handshake.generation_in(request))
        with self.retry.carrying_out():
            self._begin_as_listener(talk, plan, features, request)

    def _begin_as_listener(
        self, talk: Conversation, plan: Plan, features: dict[str, Any], request: dict[str, Any]
    ) -> None:
        own_maps = handshake.own_maps(self._replica, plan)
        self._settle_former_session(plan)
        handshake.prepare(self._replica, plan, request)
        session = self._new_session(talk.number, talk.stream, plan, features)
        with self.changed:
            self._pending = session
        try:
            talk.say(step="prepared", **own_maps)
            talk.hear("go")
            with self.changed:
                if not self.changed.wait_for(lambda: session.complete, HANDSHAKE_STEP_TIMEOUT_S):
                    raise PeerError("the peer's data streams did not arrive")
            session.assemble()
            self._attach(session, plan, before_threads=lambda: talk.say(step="gone"))
        except BaseException:
            session.ended = True
            for data in session.streams()[1:]:
                data.close()
            raise
        finally:
            with self.changed:
                self._pending = None

    def _features(self) -> dict[str, Any]:
        return {
            "protocol": self.settings.protocol,
            "can_fast_zero": self._replica.store.can_fast_zero,
            "asked_by_operator": self._asked_by_operator,
            "compares": True,
            "answers_first": True,
            "parks": self._replica.store.parked.exists,
        }

    def _new_session(self, number: int, control: Stream, plan: Plan, features: dict[str, Any]) -> Session:
        session = Session(self._runtime, number, control, plan.theirs, plan.outcome, self._on_end)
        session.peer_can_fast_zero = bool(features.get("can_fast_zero"))
        session.peer_compares = features.get("compares") is True
        session.peer_answers_first = features.get("answers_first") is True
        session.peer_parks = features.get("parks") is True
        return session

    def _obey(self, outcome: Outcome, mine: Standing, theirs: Standing) -> None:
        """Remember what the table said; raises when that is no session."""
        self._note_outcome(outcome, mine, theirs)
        with self.changed:
            self.decided = outcome.action in (Action.WAIT, Action.REFUSE, Action.SPLIT_BRAIN)
            self.changed.notify_all()
        if outcome.action is Action.WAIT:
            raise Wait(outcome.reason)
        if outcome.action in (Action.REFUSE, Action.SPLIT_BRAIN):
            raise Refusal(outcome)

    def _note_outcome(self, outcome: Outcome, mine: Standing, theirs: Standing) -> None:
        if outcome.rule.startswith(generation.POLICY_RULES):
            log.warning("%s: %s", outcome.rule, outcome.reason)
        handshake.learn(self._replica, outcome)
        with self.changed:
            self._asked_by_operator = False
            self.outcome = outcome
            self.seen = theirs
            self.plan = self.forecast(outcome, mine, theirs, None)

    def forecast(self, outcome: Outcome, mine: Standing, theirs: Standing, known_bytes: int | None) -> Forecast:
        """What this outcome will cost, by the speed of the last resync."""
        return forecast(outcome, mine, theirs, known_bytes, rough_speed_of(self._replica.superblock.last_resync))

    def _attach(self, session: Session, plan: Plan, before_threads: Callable[[], None] | None = None) -> None:
        """Put the session in place between two requests of the volume, if all that it rests on still holds."""
        primary, replica = self._primary, self._replica
        try:
            if not primary.pause(ATTACH_TIMEOUT_S):
                raise PeerError(STILL_RUNNING)
            if not self._wanted:
                raise Wait("this replica was disconnected by its operator during the handshake")
            if self._stops():
                raise Wait("this replica was stopped during the handshake")
            handshake.check_unchanged(replica, plan)
            if plan.outcome.action in handshake.SOURCE:
                # Parts of suspects that a client wrote since the plan was made: their ranges are kept, see there.
                with replica.books:
                    replica.dirty.remove(replica.suspects.found)
            replica.persist_map()
            if before_threads is not None:
                before_threads()
            session.control.session = session.number
            for stream in session.streams():
                stream.set_timeout(None)
            primary.attach(session)
            if plan.outcome.action is Action.NONE:
                primary.in_step(session, disk=DiskState.UP_TO_DATE, met_peer=True)
            elif plan.outcome.action in handshake.SOURCE:
                replica.define_contents(met_peer=True)
            else:
                replica.update(met_peer=True)
            self._go_live(session, plan)
        except BaseException:
            primary.detach(session)
            primary.join()
            raise
        finally:
            primary.resume()

    def _go_live(self, session: Session, plan: Plan) -> None:
        try:
            self._begin_session(session, plan)
        except MirrorError as error:
            # It is in place, so it ends as every session does: whoever cleans up finds what had begun.
            self.retry.failed(error.message)
            session.end(str(error))

    def _begin_session(self, session: Session, plan: Plan) -> None:
        action = plan.outcome.action
        state = ConnectionState.CONNECTED
        if action in handshake.SOURCE:
            state = ConnectionState.SYNC_SOURCE
        elif action in handshake.TARGET:
            state = ConnectionState.SYNC_TARGET
        # Held throughout: a session that ends at once must find all that there is to clean up.
        with self.changed:
            self.session = session
            self.discard_my_data = False
            self.primary_left_in_order = False
            self._refused = False
            session.heard_at_s = self._runtime.now_s()
            self._set(state, plan.outcome.reason)
            log.info(
                "session %016x with %s: %s (%s)",
                session.number,
                session.control.peer_address,
                plan.outcome.rule,
                plan.outcome.reason,
            )
            if state is not ConnectionState.SYNC_SOURCE:
                # In step with us, or the source of our resync: whatever it could not know alone, it is the newest.
                self._peer_is_up_to_date(session)
            # One by one: what has begun ends with the session, also where the next one can't begin.
            self._primary.start(session)
            spans = self._primary.trace.spans
            self._parking = Parking(self._replica)
            for streams, name in ((session.incoming, "apply"), (session.sync_incoming, "resync-apply")):
                receiver = Receiver(self._replica, session, streams, name, spans, self._parking)
                self._receivers.append(receiver)
                receiver.start()
            spawn, settings = self._runtime.spawn, self.settings
            self._threads.append(spawn("control", session.serve_control, self._control))
            self._threads.append(
                spawn("monitor", session.watch, settings.peer_timeout_s, settings.disk_timeout_s, self._tell_parked)
            )
            self._threads.append(spawn("verify", self.verifier.serve, session))
            if action is Action.NONE:
                self.retry.begin_anew()
            if state is ConnectionState.SYNC_SOURCE:
                assert plan.their_suspects is not None, "a source has selected what it copies"
                self.source = SyncSource(
                    self._primary, session, plan.their_suspects, self._source_done, self.settings.resync_rate
                )
                self.plan = self.forecast(plan.outcome, plan.mine, plan.theirs, self.source.total_bytes)
                # The target knows how many blocks each map names, not how many both.
                with contextlib.suppress(LinkLost):  # seen by whoever reads the stream
                    session.notify("sync_progress", **self.source.status())
                self.source.start()

    def _not_connected(self, error: MirrorError, address: str) -> bool:
        """Remember why there is no session with the peer at this address. True when dialling again is of no use."""
        reason = str(error)
        with self.changed:
            if isinstance(error, Refusal):
                if self.reason != str(error):
                    log.error("the peer at %s: %s", address, error)
                self._refused = True
                self._set(ConnectionState.STANDALONE, str(error))
                return True
            if self.reason != reason and (not isinstance(error, LinkLost) or self.state is ConnectionState.HANDSHAKE):
                log.info("no session yet with the peer at %s: %s", address, reason)
            if self.session is None:
                self._set(ConnectionState.CONNECTING if self._wanted else ConnectionState.STANDALONE, reason)
            return False

    # The peer's requests

    def _tell_parked(self, session: Session) -> None:
        """Else a primary that has nothing more to write would leave its last cold ones parked."""
        with self._replica.books:
            news = session.parked.notice()
        if news is not None:
            session.notify("parked", through=news.through, open=news.open)

    def _control(self, session: Session, message: dict[str, Any]) -> dict[str, Any] | None:
        operation = message.get("op")
        if operation == "state":
            session.peer = dataclasses.replace(session.peer, **handshake.live_state(message))
            with self.changed:
                self.changed.notify_all()
            return None
        if operation == "parked":
            # The first one is that of clients' changes.
            self._receivers[0].tell(handshake.parked_news(message))
            return None
        if operation == "sync_progress":
            self._note_progress(handshake.progress(message))
            return None
        if operation == "sync_finished":
            self._target_done(session, message)
            return None
        if operation == "primary_disk_failed":
            handshake.become_only_copy(self._replica, handshake.new_generation(message))
            session.peer = dataclasses.replace(session.peer, disk=DiskState.FAILED)
            return None
        if operation in VERIFY_OPERATIONS:
            return self.verifier.answer(message)
        if operation == "bye":
            self._goodbye(session, message)
            return None
        answer = self._on_control(session, message)
        with self.changed:
            self.changed.notify_all()
        return answer

    def _note_progress(self, progress: dict[str, int | None]) -> None:
        total_bytes = progress["total_bytes"]
        with self.changed:
            self.target_progress = progress
            if self.plan is not None and total_bytes is not None and self.state is ConnectionState.SYNC_TARGET:
                self.plan = self.plan.with_bytes(total_bytes, rough_speed_of(self._replica.superblock.last_resync))

    def _goodbye(self, session: Session, message: dict[str, Any]) -> None:
        """The peer leaves in order, and says what this side could not know later."""
        replica = self._replica
        session.disk_trouble = session.disk_trouble or message.get("disk_trouble") is True
        try:
            if message.get("outdated") is True and replica.role is Role.PRIMARY:
                # It has recorded that it stays behind, so this is the newest copy, also after a restart.
                replica.update(peer_disk=DiskState.OUTDATED)
            in_step = self.state is ConnectionState.CONNECTED and replica.superblock.disk is DiskState.UP_TO_DATE
            self.primary_left_in_order = in_step and message.get("primary_stopped") is True
        finally:
            session.end(words(message.get("reason", "the peer left")), orderly=True)

    def tell_state(self) -> None:
        """Let the peer know this side's role and disk."""
        self.verifier.wake()
        session = self.session
        if session is not None and not session.ended:
            try:
                session.notify("state", role=self._replica.role.value, disk=self._replica.disk_state(True).value)
            except LinkLost as error:
                session.end(error.message)

    def _source_done(self, session: Session) -> None:
        self._peer_is_up_to_date(session)
        with self.changed:
            self.retry.begin_anew()
            if self.session is session and not session.ended:
                self._set(ConnectionState.CONNECTED, "resynced the peer")

    def _peer_is_up_to_date(self, session: Session) -> None:
        session.peer = dataclasses.replace(session.peer, disk=DiskState.UP_TO_DATE)

    def _target_done(self, session: Session, message: dict[str, Any]) -> None:
        self._primary.in_step(session, **handshake.finished_target(message, self._replica.superblock.last_resync))
        with self._replica.books:
            self._replica.dirty.clear_all()
        self._replica.persist_map()
        with self.changed:
            self.target_progress = None
            self.retry.begin_anew()
            if self.session is session and not session.ended:
                self._set(ConnectionState.CONNECTED, "resynced from the peer")
        self.tell_state()
        log.info("resync done: this replica is UpToDate")
