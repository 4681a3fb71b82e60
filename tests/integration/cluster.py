"""Replicas as a test sees them: a directory, a `nbdmirror serve` process with its nbdkit, a log, and the commands.

    def test_something(cluster):
        a, b = cluster.pair(size="64M")          # created, serving, connected; a is primary
        with a.client() as nbd: nbd.pwrite(b"x" * 4096, 0)
        b.kill()                                  # kill -9 of parent and nbdkit
        a.allow("peer")                           # log lines at WARNING or above that match are expected

The `cluster` fixture ends and reaps everything in time and fails the test when a replica's log holds a line at
WARNING or above that was not allowed, or when a process did not end by itself after SIGTERM within 5 s.
"""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd

from tests.integration.network import Network
from tests.integration.processes import (
    children_of,
    command_name,
    free_port,
    run,
    signal_quietly,
    stands_still,
    wait_for,
    wait_gone,
)

# What a replica may say when a test takes its peer away: put it into `allow`.
PEER_LOST = r"peer|link|session|redundan"
# What nbdkit says of each request that a replica which stops, or stops being primary, leaves unanswered.
UNANSWERED = "stays unanswered"
# What nbdkit says when a client hung up before its answers.
CLIENT_GONE = r"^nbdkit: .*error: (write|read) (reply|data|request).*(pipe|descriptor|reset|message)"
NBDMIRROR = Path(sys.executable).parent / "nbdmirror"
STOP_LIMIT_S = 5.0
START_LIMIT_S = 10.0
COMMAND_LIMIT_S = 20.0

_SUSPICIOUS = re.compile(r"\b(WARNING|ERROR|CRITICAL|FATAL)\b|Traceback|[Aa]ssertion|Fatal Python|^nbdkit: .*error:")


def nbdmirror(
    *words: object, check: bool = True, timeout_s: float = COMMAND_LIMIT_S
) -> subprocess.CompletedProcess[str]:
    """Run one `nbdmirror` command to its end."""
    return run([str(word) for word in (NBDMIRROR, *words)], timeout_s, check)


class Replica:
    """One replica directory and, while it runs, its `serve` process."""

    def __init__(self, directory: Path, name: str = "vol", prefix: tuple[str, ...] = ()) -> None:
        self.directory = directory
        self.name = name
        self.data_path = directory / "data"
        self.log_path = directory.parent / f"{directory.name}.log"
        self.listen = ""
        self.serve_options: tuple[str, ...] = ()
        # The words before a client's command that make it run where the replica can be reached.
        self.client_prefix: tuple[str, ...] = ()
        self.process: subprocess.Popen[bytes] | None = None
        self._prefix = list(prefix)
        self._wanted_role = ""
        self._allowed: list[re.Pattern[str]] = []
        self._frozen: list[int] = []
        self._orphans: list[int] = []

    def runs_under(self, *words: str) -> None:
        """From its next start on `serve` is run by this command: `env`, or one that enters a namespace."""
        self._prefix += words

    # -- life ---------------------------------------------------------------------------------------------------

    def create(self, size: str = "64M", *options: object) -> subprocess.CompletedProcess[str]:
        if "--backing" in options:
            self.data_path = Path(str(options[options.index("--backing") + 1]))
        return nbdmirror("create", self.directory, "--name", self.name, "--size", size, *options)

    def launch(self, *options: str) -> None:
        """Start `serve` without waiting for anything."""
        assert self.process is None or self.process.poll() is not None, "already serving"
        command = [*self._prefix, str(NBDMIRROR), "serve", str(self.directory), *self.serve_options, *options]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._wanted_role = "primary" if "--primary" in command else ""

    def serve(self, *options: str) -> "Replica":
        """Start `serve` and wait until it answers with a role (with --primary: until it has that one)."""
        self.launch(*options)
        self.wait_ready()
        return self

    def wait_ready(self, timeout_s: float = START_LIMIT_S) -> None:
        def ready() -> bool:
            assert self.process is not None
            code = self.process.poll()
            assert code is None, f"serve {self.directory.name} ended with {code}:\n{self.log()}"
            status = self.peek()
            role = status.get("role") if status else None
            return role == self._wanted_role if self._wanted_role else role is not None

        wait_for(ready, timeout_s, f"{self.directory.name} to serve")

    def serve_fails(self, *options: str, timeout_s: float = START_LIMIT_S) -> subprocess.CompletedProcess[str]:
        """Run a `serve` that is expected to refuse: exit status 1 and a reason on stderr, which is returned."""
        command: list[str | Path] = [*self._prefix, NBDMIRROR, "serve", self.directory, *self.serve_options, *options]
        done = run(command, timeout_s, check=False)
        assert done.returncode == 1, f"serve ended with {done.returncode}: {done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    @property
    def pid(self) -> int:
        """The process id of `serve`, the parent of nbdkit."""
        assert self.process is not None
        return self.process.pid

    def nbdkit_pids(self) -> list[int]:
        return [pid for pid in children_of(self.pid) if command_name(pid).startswith(("nbdkit", "lt-nbdkit"))]

    @property
    def nbdkit_pid(self) -> int:
        return wait_for(self.nbdkit_pids, 5.0, f"{self.directory.name} to have an nbdkit")[0]

    def kill(self) -> None:
        """kill -9 of the parent and its nbdkit, as a power switch would (but the page cache stays)."""
        assert self.process is not None
        # The parent first stands still, or it could start another nbdkit between the two signals.
        signal_quietly(self.pid, signal.SIGSTOP)
        nbdkits = self.nbdkit_pids()
        for pid in (*nbdkits, self.pid):
            signal_quietly(pid, signal.SIGKILL)
        self.process.wait(STOP_LIMIT_S)
        for pid in nbdkits:
            wait_gone(pid)
        self._frozen.clear()

    def kill_nbdkit(self) -> int:
        """kill -9 of nbdkit alone; returns the process id that is gone."""
        pid = self.nbdkit_pid
        signal_quietly(pid, signal.SIGKILL)
        return pid

    def freeze(self) -> None:
        """SIGSTOP to parent and nbdkit: the host has stopped answering, its connections stay open."""
        self._frozen = [self.pid, *self.nbdkit_pids()]
        for pid in self._frozen:
            signal_quietly(pid, signal.SIGSTOP)
        for pid in self._frozen:
            wait_for(functools.partial(stands_still, pid), 5.0, f"{pid} to stop")

    def thaw(self) -> None:
        for pid in reversed(self._frozen):
            signal_quietly(pid, signal.SIGCONT)
        self._frozen.clear()

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        signal_quietly(self.pid, signal.SIGTERM)

    def stop(self, timeout_s: float = STOP_LIMIT_S) -> float:
        """SIGTERM; asserts exit status 0 and no nbdkit left within the limit; returns the seconds that it took."""
        assert self.process is not None
        nbdkits = self.nbdkit_pids()
        begin = time.monotonic()
        self.terminate()
        try:
            code = self.process.wait(timeout_s + 0.5)
        except subprocess.TimeoutExpired as late:
            raise AssertionError(
                f"{self.directory.name} did not end {timeout_s} s after SIGTERM\n{self.log()}"
            ) from late
        seconds = time.monotonic() - begin
        assert code == 0, f"serve {self.directory.name} ended with {code} after SIGTERM\n{self.log()}"
        for pid in nbdkits:
            wait_gone(pid, 1.0)
        return seconds

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    # -- commands -----------------------------------------------------------------------------------------------

    def command(
        self, verb: str, *options: object, check: bool = True, timeout_s: float = COMMAND_LIMIT_S
    ) -> subprocess.CompletedProcess[str]:
        """`nbdmirror VERB DIR OPTIONS...`"""
        return nbdmirror(verb, self.directory, *options, check=check, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """What `nbdmirror status DIR --json` prints."""
        status = json.loads(self.command("status", "--json").stdout)
        assert isinstance(status, dict)
        return status

    def peek(self) -> dict[str, Any] | None:
        """The same from the control socket, without the price of starting Python: for polling. None: no answer."""
        reply = self.ask({"command": "status"})
        return reply["result"] if reply is not None and reply.get("ok") else None

    def ask(self, request: dict[str, object]) -> dict[str, Any] | None:
        """What the control socket replies. None: no answer."""
        try:
            with socket.socket(socket.AF_UNIX) as control:
                control.settimeout(2.0)
                control.connect(str(self.directory / "control.sock"))
                control.sendall(json.dumps(request).encode() + b"\n")
                answer = control.makefile("rb").readline()
        except OSError:
            return None
        if not answer:
            return None
        reply = json.loads(answer)
        assert isinstance(reply, dict)
        return reply

    def wait_status(self, timeout_s: float = 10.0, **wanted: object) -> dict[str, Any]:
        """Wait until every key of the status has the wanted value (a callable is asked); `peer__role` is peer.role."""
        seen: dict[str, Any] = {}

        def matches() -> dict[str, Any] | None:
            status = self.peek()
            if status is None:
                return None
            seen.clear()
            seen.update(status)
            for path, value in wanted.items():
                found: Any = status
                for key in path.split("__"):
                    found = found[key] if found is not None else None
                if not (value(found) if callable(value) else found == value):
                    return None
            return status

        try:
            return wait_for(matches, timeout_s)
        except AssertionError:
            keys = ("role", "disk", "connection", "peer", "dirty_bytes", "resync", "warnings")
            summary = {key: seen.get(key) for key in keys}
            message = f"{self.directory.name}: not within {timeout_s} s: {wanted}; status {summary}"
            raise AssertionError(f"{message}\n{self.log()[-3000:]}") from None

    def wait_in_step(self, timeout_s: float = 20.0) -> dict[str, Any]:
        """Connected, both UpToDate, nothing dirty."""
        return self.wait_status(
            timeout_s, connection="Connected", disk="UpToDate", peer__disk="UpToDate", dirty_bytes=0
        )

    def promote(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.command("promote", *options, check=check)

    def demote(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.command("demote", *options, check=check)

    def configure(self, **values: object) -> None:
        """Set keys of volume.toml (the replica must not be serving, or must be restarted)."""
        path = self.directory / "volume.toml"
        text = path.read_text()
        for key, value in values.items():
            line = f"{key} = {json.dumps(value)}"
            line = line.replace("\\", r"\\")
            text, count = re.subn(rf"^#?\s*{key}\s*=.*$", line, text, count=1, flags=re.MULTILINE)
            if not count:
                text = f"{text.rstrip()}\n{line}\n"
        path.write_text(text)

    # -- the client's side --------------------------------------------------------------------------------------

    @property
    def socket_path(self) -> Path:
        return self.directory / "nbd.sock"

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.name}?socket={self.socket_path}"

    @contextlib.contextmanager
    def client(self, timeout_s: float = 0.0) -> Iterator[Any]:
        """A connected libnbd handle; with a timeout, refusals are retried until then."""
        handle = (
            self.connect_client() if not timeout_s else wait_for(self._try_client, timeout_s, f"a client of {self.uri}")
        )
        try:
            yield handle
        finally:
            with contextlib.suppress(nbd.Error):  # the test may have killed the server
                handle.shutdown()

    def connect_client(self) -> Any:
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_uri(self.uri)
        return handle

    def _try_client(self) -> Any:
        try:
            return self.connect_client()
        except nbd.Error:
            return None

    # -- the log ------------------------------------------------------------------------------------------------

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def allow(self, *patterns: str) -> None:
        """Lines at WARNING or above that match one of these (case does not matter) are expected in this test."""
        self._allowed += [re.compile(pattern, re.IGNORECASE) for pattern in patterns]

    def wait_log(self, pattern: str, timeout_s: float = 10.0) -> re.Match[str]:
        expression = re.compile(pattern, re.IGNORECASE)
        what = f"log of {self.directory.name} to say {pattern!r}"
        try:
            return wait_for(lambda: expression.search(self.log()), timeout_s, what)
        except AssertionError:
            raise AssertionError(f"{what}: not within {timeout_s} s\n{self.log()[-3000:]}") from None

    def unexpected_lines(self) -> list[str]:
        lines = [line for line in self.log().splitlines() if _SUSPICIOUS.search(line)]
        return [line for line in lines if not any(allowed.search(line) for allowed in self._allowed)]

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self) -> list[str]:
        """End the process, whatever it is doing; returns what was wrong about it."""
        if self.process is None:
            return []
        self.thaw()
        problems = []
        if self.process.poll() is None:
            try:
                self.stop()
            except AssertionError as problem:
                problems.append(str(problem))
        if self.process.poll() is None:
            self.kill()
        return problems


class Cluster:
    """The replicas of one test; `close` ends them all and returns what went wrong."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.replicas: list[Replica] = []
        self._cleanups: list[Callable[[], None]] = []

    def replica(self, directory_name: str, name: str = "vol", prefix: tuple[str, ...] = ()) -> Replica:
        """A replica object; nothing is created on disk yet."""
        replica = Replica(self.directory / directory_name, name, prefix)
        replica.log_path = self.directory / f"{replica.directory.name}.log"
        self.replicas.append(replica)
        return replica

    def standalone(self, size: str = "64M", *options: object, name: str = "vol", directory_name: str = "a") -> Replica:
        """A created volume without a peer; call `.serve()`."""
        replica = self.replica(directory_name, name)
        replica.create(size, *options)
        return replica

    def created_pair(
        self,
        size: str = "64M",
        protocol: str = "C",
        network: Network | None = None,
        options_a: tuple[object, ...] = (),
        options_b: tuple[object, ...] = (),
        **configuration: object,
    ) -> tuple[Replica, Replica]:
        """Two created replicas that name each other as peer, not serving yet. With a network, one on each node."""
        prefixes = [tuple(network.enter(node)) if network else () for node in (0, 1)]
        a, b = (self.replica(directory, prefix=prefix) for directory, prefix in zip("ab", prefixes, strict=True))
        addresses = network.addresses if network else ["127.0.0.1", "127.0.0.1"]
        a.listen, b.listen = (f"tcp://{address}:{free_port()}" for address in addresses)
        for replica, peer, options in ((a, b, options_a), (b, a, options_b)):
            replica.create(size, "--listen", replica.listen, "--peer", peer.listen, "--protocol", protocol, *options)
            if configuration:
                replica.configure(**configuration)
            if network:
                replica.serve_options = ("--insecure",)
                replica.allow("insecure|not loopback|unencrypted|without (keys|encryption)")
        return a, b

    def pair(self, size: str = "64M", protocol: str = "C", **more: Any) -> tuple[Replica, Replica]:
        """Two replicas, serving, connected, UpToDate; the first one is primary."""
        a, b = self.created_pair(size, protocol, **more)
        b.launch()
        a.launch("--primary")
        for replica in (b, a):
            replica.wait_ready()
        a.wait_in_step()
        b.wait_in_step()
        b.wait_status(peer__role="primary")
        return a, b

    def kill_together(self, *replicas: Replica) -> None:
        """kill -9 of several replicas as close together as it gets: all stand still before the first one dies."""
        for replica in replicas:
            signal_quietly(replica.pid, signal.SIGSTOP)
        victims = [pid for replica in replicas for pid in (*replica.nbdkit_pids(), replica.pid)]
        for pid in victims:
            signal_quietly(pid, signal.SIGKILL)
        for replica in replicas:
            assert replica.process is not None
            replica.process.wait(STOP_LIMIT_S)
        for pid in victims:
            wait_gone(pid)

    def network(self) -> Network:
        """Two nodes joined by a wire that can be cut; taken down after the test."""
        network = Network()
        self._cleanups.append(network.close)
        return network

    def at_end(self, cleanup: Callable[[], None]) -> None:
        """Run `cleanup` after every replica has ended (unmount, detach a loop device), last one first."""
        self._cleanups.append(cleanup)

    def close(self) -> list[str]:
        problems: list[str] = []
        for replica in self.replicas:
            problems += replica.close()
        for cleanup in reversed(self._cleanups):
            cleanup()
        for replica in self.replicas:
            problems += [f"log of {replica.directory.name}: {line}" for line in replica.unexpected_lines()]
        return problems


def _next_data(descriptor: int, offset: int) -> int:
    """Where the next data of a file begins; its end, or the offset itself where it has ended, when there is none."""
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError:
        return max(offset, os.fstat(descriptor).st_size)


def different_blocks(a: Path, b: Path, size_bytes: int | None = None) -> list[int]:
    """Offsets of the 4 KiB blocks in which two files differ (at most the first 20)."""
    found: list[int] = []
    chunk = 1 << 20
    with a.open("rb") as left, b.open("rb") as right:
        end = size_bytes or max(os.fstat(left.fileno()).st_size, os.fstat(right.fileno()).st_size)
        offset = 0
        while offset < end:
            # Where both are holes there is nothing to compare.
            offset = min(max(offset, _next_data(file.fileno(), offset) // chunk * chunk) for file in (left, right))
            if offset >= end:
                break
            left.seek(offset)
            right.seek(offset)
            one, two = left.read(chunk), right.read(chunk)
            for at in range(0, max(len(one), len(two)), 4096) if one != two else ():
                if one[at : at + 4096] != two[at : at + 4096] and len(found) < 20:
                    found.append(offset + at)
            offset += chunk
    return found


def write(replica: "Replica", data: bytes, offset: int = 0) -> None:
    """As a client of its own: written and flushed, or an error within two seconds."""
    with replica.client(timeout_s=2) as client:
        client.pwrite(data, offset)
        client.flush()


def assert_equal_copies(a: Replica, b: Replica) -> None:
    """Both data files hold the same bytes. Call it after a flush or a stop, or compare moving targets."""
    blocks = different_blocks(a.data_path, b.data_path)
    assert not blocks, f"copies differ in blocks at {blocks}"
