"""What is measured: each target serves one volume over NBD on a unix socket.

All targets stay up during the whole run, so that rounds can be interleaved: a machine that is slow for a minute is slow
for everybody. The mirrored ones and qemu's quorum keep both copies on this machine's disk, TCP between. Every cache is
the page cache, as each server has it by default.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import processes
from bench.apart import Apart
from bench.processes import BenchError, Unavailable, wait_for

NBDMIRROR = Path(sys.executable).parent / "nbdmirror"
BARE_PLUGIN = Path(__file__).with_name("bare_plugin.py")
PORT = 7000
PROOF_LIMIT_S = 120.0


def find_nbdkit() -> Path:
    """The nbdkit that nbdmirror uses too: the one that `make setup` built, else the system's."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbdmirror"
    built = sorted(cache.glob("nbdkit-*/sbin/nbdkit"), key=lambda path: path.stat().st_mtime)
    given = os.environ.get("NBDMIRROR_NBDKIT")
    found = given or (str(built[-1]) if built else shutil.which("nbdkit"))
    if not found:
        raise BenchError("no nbdkit found: run `make setup`")
    return Path(found)


def free_port() -> int:
    """A free TCP port below the range of outgoing connections."""
    for _ in range(1000):
        port = random.SystemRandom().randint(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise BenchError("no free port found")


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        return True
    return False


def ask(replica: Path, command: str = "status") -> dict[str, Any] | None:
    """The status, or another command's answer, from the control socket: starting Python each time would cost."""
    with socket.socket(socket.AF_UNIX) as control, contextlib.suppress(OSError, ValueError):
        control.settimeout(5)
        control.connect(str(replica / "control.sock"))
        control.sendall(json.dumps({"command": command}).encode() + b"\n")
        with control.makefile() as answers:
            answer = json.loads(answers.readline())
        if answer["ok"]:
            found = answer["result"]
            assert isinstance(found, dict)
            return found
    return None


@dataclass
class Target:
    """A volume under test. `start` leaves it serving at `uri`; of `size_bytes` the first `filled_bytes` get written."""

    name: str
    directory: Path
    size_bytes: int
    filled_bytes: int
    uri: str = ""
    # Of another volume on the same disk, used meanwhile in the same way.
    second_uri: str = ""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    # The words before a server's command that make it run elsewhere, by replica.
    prefixes: list[list[str | Path]] = field(default_factory=lambda: [[], []])

    def start(self) -> None:
        raise NotImplementedError

    def run(self, role: str, words: list[str | Path]) -> None:
        """Start a server process that logs into the directory."""
        self.processes[role] = processes.start(words, self.directory / f"{role}.log")

    def alive(self) -> bool:
        """True; BenchError with what it said when a process has ended."""
        for role, process in self.processes.items():
            if process.poll() is not None:
                raise BenchError(f"{self.name}: {role} ended with {process.returncode}:\n{self.said(role)}")
        return True

    def said(self, role: str) -> str:
        return (self.directory / f"{role}.log").read_text(errors="replace")[-2000:].strip()

    def data_file(self, name: str) -> Path:
        path = self.directory / name
        with path.open("wb") as file:
            file.truncate(self.size_bytes)
        return path

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            processes.end(process)
        self.processes.clear()


class NbdkitFile(Target):
    """The measure of all: nbdkit's own file plugin, in C. `listen`: where, instead of a unix socket."""

    listen: Sequence[str | Path] = ()

    def start(self) -> None:
        self.serve(self.data_file("data"))

    def serve(self, path: Path, *options: str) -> None:
        socket_path, ready = self.directory / "nbd.sock", self.directory / "pid"
        listen = self.listen or ["-U", socket_path]
        words = [find_nbdkit(), "-f", "-P", ready, *options, *listen, *self.plugin(path)]
        self.run("nbdkit", [*self.prefixes[0], *words])
        self.uri = f"nbd+unix:///?socket={socket_path}"
        # nbdkit writes its process id when it accepts connections.
        wait_for(lambda: self.alive() and ready.exists(), f"{self.name} to listen")

    def plugin(self, path: Path) -> list[str | Path]:
        return ["file", path]


class BarePlugin(NbdkitFile):
    """What nbdkit's calling Python costs by itself (bench/bare_plugin.py)."""

    def plugin(self, path: Path) -> list[str | Path]:
        return ["python", BARE_PLUGIN, f"file={path}"]


class TwoFiles(NbdkitFile):
    """Two of nbdkit's file plugin: what one takes while another client does the same with another file of this disk."""

    def start(self) -> None:
        super().start()
        (self.directory / "second").mkdir()
        second = NbdkitFile(f"{self.name}, the second", self.directory / "second", self.size_bytes, 0)
        second.start()
        self.processes["second"] = second.processes["nbdkit"]
        self.second_uri = second.uri


class QemuQuorum(Target):
    """qemu-storage-daemon: quorum of a local raw file and a remote one that a second daemon serves over TCP."""

    def start(self) -> None:
        path, port = self.directory / "nbd.sock", free_port()
        remote = self._file("remote", self.data_file("remote"))
        server = json.dumps({"addr": {"type": "inet", "host": "127.0.0.1", "port": str(port)}})
        self.run("remote", self._daemon([remote], server, "remote"))
        wait_for(lambda: self.alive() and self._listens(port), f"{self.name}'s remote to listen")
        over_tcp = {
            "driver": "nbd",
            "node-name": "over-tcp",
            "export": "remote",
            "server": {"type": "inet", "host": "127.0.0.1", "port": str(port)},
        }
        quorum = {
            "driver": "quorum",
            "node-name": "both",
            "vote-threshold": 1,
            "read-pattern": "fifo",
            "children": ["local", "over-tcp"],
        }
        server = json.dumps({"addr": {"type": "unix", "path": str(path)}})
        local = self._file("local", self.data_file("local"))
        self.run("local", self._daemon([local, over_tcp, quorum], server, "both"))
        self.uri = f"nbd+unix:///both?socket={path}"
        wait_for(lambda: self.alive() and accepts(path), f"{self.name} to listen")

    @staticmethod
    def _file(node: str, path: Path) -> dict[str, Any]:
        return {"driver": "file", "node-name": node, "filename": str(path), "discard": "unmap"}

    @staticmethod
    def _listens(port: int) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    @staticmethod
    def _daemon(nodes: list[dict[str, Any]], server: str, export: str) -> list[str | Path]:
        words: list[str | Path] = ["qemu-storage-daemon"]
        for node in nodes:
            words += ["--blockdev", json.dumps(node)]
        exported = {"type": "nbd", "id": "export", "node-name": export, "name": export, "writable": True}
        return [*words, "--nbd-server", server, "--export", json.dumps(exported)]


class NbdMirror(Target):
    """Our volume: alone, or with a peer under protocol A, B or C. `settings` are added to both volume.toml."""

    def __init__(
        self,
        name: str,
        directory: Path,
        size_bytes: int,
        filled_bytes: int,
        protocol: str = "",
        settings: str = "",
        apart: bool = False,
    ) -> None:
        super().__init__(name, directory, size_bytes, filled_bytes)
        self.protocol, self.settings, self.wants_apart = protocol, settings, apart
        self.replicas = [directory / "a", directory / "b"] if protocol else [directory / "a"]
        self.apart: Apart | None = None
        # Of `serve`, by replica.
        self.options: list[list[str | Path]] = [["--primary"] if protocol else [], []]

    def start(self) -> None:
        hosts = ("127.0.0.1", "127.0.0.1")
        ports = [free_port(), free_port()]
        if self.wants_apart:
            self.apart = Apart()
            hosts, ports = self.apart.addresses, [PORT, PORT]
            self.prefixes = [self.apart.enter(number) for number in (0, 1)]
            self.options = [[*options, "--insecure"] for options in self.options]
        listens = [f"tcp://{host}:{port}" for host, port in zip(hosts, ports, strict=True)]
        for number, replica in enumerate(self.replicas):
            words: list[str | Path] = [NBDMIRROR, "create", replica, "--name", "bench", "--size", str(self.size_bytes)]
            if self.protocol:
                own, other = listens[number], listens[1 - number]
                words += ["--listen", own, "--peer", other, "--protocol", self.protocol]
            processes.command(words)
            with (replica / "volume.toml").open("a") as file:
                file.write(f"{self.settings}\n")
        for replica in reversed(self.replicas):
            self.serve(replica)
        self.uri = f"nbd+unix:///bench?socket={self.replicas[0] / 'nbd.sock'}"
        self.wait_in_step()

    def serve(self, replica: Path) -> None:
        number = self.replicas.index(replica)
        self.run(replica.name, [*self.prefixes[number], NBDMIRROR, "serve", replica, *self.options[number]])
        try:
            wait_for(lambda: self.alive() and (ask(replica) or {}).get("role"), f"{replica} to serve")
        except BenchError:
            # A key that comes with a later version, or that left with it: the rest can be measured all the same.
            if self.settings and "unknown key" in self.said(replica.name):
                raise Unavailable(f"this version does not know `{self.settings}`") from None
            raise

    def status(self) -> dict[str, Any]:
        """Of the primary."""
        found = wait_for(lambda: self.alive() and ask(self.replicas[0]), f"{self.name} to answer")
        assert isinstance(found, dict)
        return found

    def wait_in_step(self, timeout_s: float = processes.START_LIMIT_S) -> dict[str, Any]:
        def in_step() -> dict[str, Any] | None:
            status = self.status()
            connected = status["connection"] == "Connected" and status["peer"]["disk"] == "UpToDate"
            return status if not self.protocol or (connected and not status["dirty_bytes"]) else None

        found = wait_for(in_step, f"{self.name} to be in step", timeout_s, every_s=0.1)
        assert isinstance(found, dict)
        return found

    def wait_until_proven(self) -> None:
        """What a new pair compares until then takes processor and disk."""
        wait_for(lambda: self.status()["proof"]["state"] == "proven", "the proof to end", PROOF_LIMIT_S)

    def peer_leaves(self) -> None:
        processes.end(self.processes.pop("b"))

    def peer_returns(self) -> None:
        self.serve(self.replicas[1])

    def stop(self) -> None:
        super().stop()
        if self.apart is not None:
            self.apart.close()
            self.apart = None
