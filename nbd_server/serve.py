"""The parent of nbdkit: holds what must outlive it, starts it, starts it again when it dies, and stops it in order.

Held here and inherited by every nbdkit: the locks (hold.py), a descriptor of the data, which proves after a crash that
the page cache lost nothing (page_cache.py), and the listening NBD socket, so that clients which connect
while nbdkit is being started again wait in its queue instead of being refused, and a port in use is found before
anything is started.

nbdkit runs in a session of its own: Ctrl-C reaches only this process, which asks the plugin over a socket pair to stop.
The plugin takes the end of that channel as the same request, so nothing is left behind when this process is killed.
This process has one thread that waits for signals, the channel and the end of the child, all at once.

systemd alone as the parent lost: it can hold a socket, but not prove the page cache.
"""

import contextlib
import fcntl
import json
import logging
import os
import selectors
import shutil
import signal
import site
import socket
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mirror.core.errors import OperatorError
from mirror.core.states import Role
from mirror.runtime import Runtime
from nbd_server import config as configuration
from nbd_server import hold, listening
from nbd_server.compiled import SOURCES, import_root
from nbd_server.config import Config, Endpoint, TcpEndpoint, is_loopback
from nbd_server.page_cache import check_no_write_lost

NBDKIT_VARIABLE = "NBDMIRROR_NBDKIT"
NBDKIT_MINIMUM = (1, 42)
PARENT_FD_VARIABLE = "NBDMIRROR_PARENT_FD"
# Worker threads a connection: clients rarely have more than 16 requests in flight (fio, qemu, the kernel's queue).
WORKER_THREADS = 16

# A stop ends within 5 s: the plugin's part, what it may overrun, and what is left for the end of two processes.
STOP_PLUGIN_S = 3.8
STOP_KILL_S = 4.6
# A child whose channel has ended has nothing left to say; the plugin ends itself within 2.5 s.
ORPHAN_KILL_S = 3.0
# After a death before it was ready, nbdkit is started again with a pause that doubles.
RESTART_PAUSE_FIRST_S = 0.1
RESTART_PAUSE_MAX_S = 5.0
# A first start that somebody kills is tried again, but a plugin that crashes at once is not tried for ever.
FIRST_STARTS_MAX = 3
# How long the end of a child that was killed may take; only a disk that does not answer makes it long.
KILLED_S = 0.2

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Descriptors of the child. 3 is where socket activation puts the first listening socket.
CHILD_LISTEN, CHILD_CHANNEL, CHILD_LOCK, CHILD_DATA = 3, 4, 5, 6
# Ours stay above those, so that no dup2 for the child overwrites one that is still to be duplicated.
FIRST_OWN_DESCRIPTOR = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says; `nbd` overrides volume.toml."""

    primary: bool = False
    nbd: Endpoint | None = None
    insecure: bool = False
    shared: bool = False


@dataclass
class Child:
    """One nbdkit and what it has told us."""

    pid: int
    ended: int  # a descriptor that is readable when the process has ended
    channel: socket.socket
    received: bytearray = field(default_factory=bytearray)
    ready: bool = False
    refusal: OperatorError | None = None
    clean: bool | None = None
    killed: bool = False
    ended_by_others: bool = False

    def ask_to_stop(self, timeout_s: float) -> None:
        with contextlib.suppress(OSError):  # it is ending already
            self.channel.sendall(json.dumps({"command": "stop", "timeout_s": timeout_s}).encode() + b"\n")

    def kill(self) -> None:
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.ended, signal.SIGKILL)


def serve(directory: Path, options: ServeOptions, runtime: Runtime) -> int:
    """Serve the replica of DIR until a signal ends it; the exit status. Raises MirrorError when it can't begin."""
    directory = directory.absolute()
    config = configuration.load(directory)
    config = replace(config, shared=config.shared or options.shared, nbd=options.nbd or config.nbd)
    endpoint = config.endpoint(directory)
    listening.check_socket_path(endpoint)
    _check_addresses(config, endpoint, options.insecure)
    nbdkit = find_nbdkit()
    with _Supervisor(config, options.primary, runtime) as supervisor, contextlib.ExitStack() as held:
        lock = _keep(held, hold.hold_directory(directory, runtime))
        held.callback(os.ftruncate, lock, 0)
        data = _keep(held, hold.hold_data(config.data_path(directory), runtime))
        listener = held.enter_context(listening.listen(endpoint))
        listen = _keep(held, os.dup(listener.fileno()))
        command = [
            *(nbdkit, "-f", "-t", str(WORKER_THREADS), "python", str(SOURCES / "nbd_server" / "plugin.py")),
            *(f"dir={directory}", f"insecure={options.insecure:d}", f"shared={config.shared:d}"),
        ]
        descriptors = {CHILD_LISTEN: listen, CHILD_LOCK: lock, CHILD_DATA: data}
        return supervisor.run(endpoint.uri(config.name), command, descriptors)


class _Supervisor:
    """The loop around one nbdkit after another."""

    def __init__(self, config: Config, primary: bool, runtime: Runtime) -> None:
        self._config = config
        # To be, or what nbdkit was when it last said so: a role that was given up does not come back by a death.
        self._primary = primary
        self._runtime = runtime
        self._uri = ""
        self._command: list[str] = []
        self._descriptors: dict[int, int] = {}
        self._cleanup = contextlib.ExitStack()
        self._selector = self._cleanup.enter_context(selectors.DefaultSelector())
        self._stops_asked = 0
        self._memory_lost = False

    def __enter__(self) -> "_Supervisor":
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
            self._cleanup.enter_context(end)
        self._signals = reader
        self._selector.register(reader, selectors.EVENT_READ)
        self._cleanup.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno()))
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the end of the terminal means nothing
            self._cleanup.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()
        # The process ends now: a second SIGTERM must not turn an orderly end into a death by signal.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def run(self, uri: str, command: list[str], descriptors: dict[int, int]) -> int:
        """Until a signal ends it; `descriptors`: what each of the child's is here. Raises MirrorError."""
        self._uri, self._command, self._descriptors = uri, command, descriptors
        if self._asked_to_stop_within(0):
            return 0
        child = self._start(resume=False, memory_kept=False)
        was_ready = False
        failed_starts = 0
        pause_s = 0.0
        while True:
            how = self._follow(child)
            was_ready = was_ready or child.ready
            if self._stops_asked:
                return self._stopped(bool(child.clean))
            if child.refusal is not None:
                raise child.refusal
            failed_starts += not child.ready
            # What ends by itself before it is ready says why; what is ended by others deserves another try.
            if not was_ready and (not child.ended_by_others or failed_starts == FIRST_STARTS_MAX):
                raise OperatorError(
                    f"nbdkit {how} before the volume was ready", remedy="what it said is above; mend that first"
                )
            pause_s = 0.0 if child.ready else min(max(2 * pause_s, RESTART_PAUSE_FIRST_S), RESTART_PAUSE_MAX_S)
            log.warning(
                "%s: nbdkit %s; starting it again%s", self._config.name, how, f" in {pause_s:g} s" if pause_s else ""
            )
            # A child that was not ready may not have recorded what the end before this process's beginning cost, and
            # the descriptors held here tell only of what was lost since then.
            memory_kept = was_ready and self._memory_kept()
            if self._asked_to_stop_within(pause_s):
                return self._stopped(clean=False)
            child = self._start(resume=was_ready, memory_kept=memory_kept)

    def _start(self, resume: bool, memory_kept: bool) -> Child:
        ours, theirs = socket.socketpair()
        channel = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, FIRST_OWN_DESCRIPTOR)
        theirs.close()
        # Socket activation wants the child's process id in its environment: only a shell can tell it before the exec.
        shell = ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh"]
        parameters = [f"primary={self._primary:d}", f"resume={resume:d}", f"memory_kept={memory_kept:d}"]
        duplicates = {**self._descriptors, CHILD_CHANNEL: channel, 1: 2}
        pid = os.posix_spawn(
            "/bin/sh",
            [*shell, *self._command, *parameters],
            _environment(),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                *((os.POSIX_SPAWN_DUP2, source, target) for target, source in duplicates.items()),
            ],
            setsid=True,
        )
        os.close(channel)
        ours.setblocking(False)
        return Child(pid, os.pidfd_open(pid), ours)

    def _follow(self, child: Child) -> str:
        """Listen to the child until it has ended, passing a stop on to it; says how it ended."""
        self._selector.register(child.channel, selectors.EVENT_READ)
        self._selector.register(child.ended, selectors.EVENT_READ)
        kill_at: float | None = None
        try:
            while True:
                left_s = None if kill_at is None else max(0.0, kill_at - self._runtime.now_s())
                ready = {key.fileobj for key, _ in self._selector.select(left_s)}
                if child.channel in ready and not self._listen_to(child):
                    self._selector.unregister(child.channel)
                    kill_at = _earlier(kill_at, self._runtime.now_s() + ORPHAN_KILL_S)
                if child.ended in ready:
                    return self._reap(child)
                if self._signals in ready and self._count_stops():
                    child.ask_to_stop(STOP_PLUGIN_S)
                    again = self._stops_asked > 1
                    kill_at = _earlier(kill_at, self._runtime.now_s() + (0 if again else STOP_KILL_S))
                if kill_at is not None and self._runtime.now_s() >= kill_at:
                    if child.killed and self._stops_asked:
                        return "does not end"  # its disk does not answer; the locks stay held until it does
                    child.kill()
                    kill_at = self._runtime.now_s() + KILLED_S
        finally:
            for file in (child.channel, child.ended):
                with contextlib.suppress(KeyError):
                    self._selector.unregister(file)
            child.channel.close()
            os.close(child.ended)

    def _listen_to(self, child: Child) -> bool:
        """Take in what the child has said; False when it will say no more."""
        while True:
            try:
                part = child.channel.recv(64 * 1024)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not part:
                return False
            child.received += part
            *lines, rest = bytes(child.received).split(b"\n")
            child.received = bytearray(rest)
            for line in lines:
                self._hear(child, json.loads(line))

    def _hear(self, child: Child, event: dict[str, Any]) -> None:
        match event["event"]:
            case "role":
                self._primary = event["role"] == Role.PRIMARY.value
            case "ready":
                child.ready = True
                self._say_ready(event["role"])
            case "refused":
                child.refusal = OperatorError(event["message"], remedy=event.get("remedy", ""))
            case "stopped":
                child.clean = bool(event["clean"])

    def _say_ready(self, role: str) -> None:
        name = self._config.name
        if role == "primary":
            log.info("%s: primary, serving NBD clients at %s", name, self._uri)
        else:
            log.info("%s: %s, ready; NBD clients are refused at %s until it is promoted", name, role, self._uri)

    def _reap(self, child: Child) -> str:
        self._listen_to(child)
        _, status = os.waitpid(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        child.ended_by_others = code <= 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def _stopped(self, clean: bool) -> int:
        if clean:
            log.info("%s: stopped, clean", self._config.name)
        else:
            log.warning("%s: stopped, not clean: the next start compares what was being written", self._config.name)
        return 0

    def _memory_kept(self) -> bool:
        """Whether the page cache is known to hold every write. In a thread, because a dead disk may never answer."""
        reader, writer = socket.socketpair()

        def prove() -> None:
            try:
                check_no_write_lost(self._descriptors[CHILD_DATA])
                writer.send(b"y")
            except OSError as error:
                log.error("%s: the disk lost writes: %s", self._config.name, error.strerror)
                writer.send(b"n")

        self._runtime.spawn("prove-memory", prove)
        if not self._asked_to_stop_within(self._config.disk_timeout_s, reader) and self._readable(reader):
            # The kernel tells of lost writes once; what was lost stays lost for as long as this process lives.
            self._memory_lost = self._memory_lost or reader.recv(1) != b"y"
            reader.close()
            writer.close()
            return not self._memory_lost
        self._memory_lost = True  # not proven, and a later check could miss an error that this one will get
        return False

    @staticmethod
    def _readable(end: socket.socket) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(end, selectors.EVENT_READ)
            return bool(selector.select(0))

    def _asked_to_stop_within(self, timeout_s: float, until: socket.socket | None = None) -> bool:
        """Wait for a stop signal, at most so long and only until `until` is readable."""
        deadline = self._runtime.now_s() + timeout_s
        if until is not None:
            self._selector.register(until, selectors.EVENT_READ)
        try:
            while True:
                left_s = max(0.0, deadline - self._runtime.now_s())
                ready = {key.fileobj for key, _ in self._selector.select(left_s)}
                if self._signals in ready:
                    self._count_stops()
                if self._stops_asked or until in ready or not left_s:
                    return bool(self._stops_asked)
        finally:
            if until is not None:
                self._selector.unregister(until)

    def _count_stops(self) -> int:
        """Take the signals in; returns how many of them ask to stop."""
        with contextlib.suppress(BlockingIOError):
            new = sum(number in STOP_SIGNALS for number in self._signals.recv(4096))
            self._stops_asked += new
            return new
        return 0


def _earlier(one: float | None, other: float) -> float:
    return other if one is None else min(one, other)


def _keep(held: contextlib.ExitStack, descriptor: int) -> int:
    """The same file under a number that no descriptor of the child has; closed with `held`."""
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, FIRST_OWN_DESCRIPTOR)
    os.close(descriptor)
    held.callback(os.close, high)
    return high


def _check_addresses(config: Config, endpoint: Endpoint, insecure: bool) -> None:
    wide = [(what, address) for what, address in (("listen", config.listen), ("peer", config.peer)) if address]
    if isinstance(endpoint, TcpEndpoint):
        wide.append(("NBD", endpoint.address))
    for what, address in wide:
        if is_loopback(address):
            continue
        if not insecure:
            raise OperatorError(
                f"the {what} address {address} is not loopback, and nothing on the wire is encrypted or authenticated",
                remedy="use a loopback address, or accept that with --insecure on a network that you trust",
            )
        log.warning(
            "%s: --insecure: the %s address %s is not loopback, and nothing there is encrypted or authenticated",
            *(config.name, what, address),
        )


# ---- nbdkit


def find_nbdkit() -> str:
    """The path of an nbdkit that is new enough. Raises OperatorError."""
    chosen = os.environ.get(NBDKIT_VARIABLE)
    if chosen:
        if not os.access(chosen, os.X_OK) or Path(chosen).is_dir():
            raise OperatorError(f"{NBDKIT_VARIABLE}={chosen} is not a program", remedy="unset it or mend it")
        return chosen
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    built = sorted(cache.glob("nbdmirror/nbdkit-*/sbin/nbdkit"), key=lambda path: _numbers(path.parent.parent.name))
    if built:
        return str(built[-1])
    found = shutil.which("nbdkit", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise OperatorError("there is no nbdkit", remedy="run `make setup` in the project's directory")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    if _numbers(version) < NBDKIT_MINIMUM:
        raise OperatorError(
            f"{found} is {version or 'broken'}, but {'.'.join(map(str, NBDKIT_MINIMUM))} or newer is needed: "
            "older ones abort when a client hangs up",
            remedy="run `make setup` in the project's directory",
        )
    return found


def _numbers(text: str) -> tuple[int, ...]:
    """The first dotted number in a text: nbdkit-1.42.3-python3.11 -> (1, 42, 3)."""
    for word in text.replace("-", " ").split():
        parts = word.split(".")
        if all(part.isdigit() for part in parts):
            return tuple(int(part) for part in parts)
    return ()


def _environment() -> dict[str, str]:
    """nbdkit embeds the same Python as ours; it must see the same packages, and no others."""
    root = import_root()
    if root == SOURCES:
        log.info("runs the sources as they are, which takes longer; `make setup` compiles them")
    paths = dict.fromkeys([str(root), *site.getsitepackages()])
    own = {
        "LISTEN_FDS": "1",
        PARENT_FD_VARIABLE: str(CHILD_CHANNEL),
        "PYTHONPATH": os.pathsep.join(paths),
        # A virtual environment ignores what stands in the user's home; nbdkit's Python would run it.
        "PYTHONNOUSERSITE": "1",
        # Each of many threads would otherwise get a heap of its own, which is never given back.
        "MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "2"),
    }
    unwanted = ("PYTHONHOME", "PYTHONSTARTUP", "LISTEN_PID", "LISTEN_FDNAMES")
    return {key: value for key, value in os.environ.items() if key not in unwanted} | own
