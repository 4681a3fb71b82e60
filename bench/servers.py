"""What is measured: each target serves one volume of the same size over NBD on a unix socket.

All targets stay up during the whole run, so that rounds can be interleaved: a machine that is slow for a minute is slow
for everybody. The mirrored ones and qemu's quorum keep both copies on this machine's disk, TCP on loopback between.
Every cache is the page cache, as each server has it by default.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NBDMIRROR = Path(sys.executable).parent / "nbdmirror"
START_LIMIT_S = 20.0
STOP_LIMIT_S = 10.0
_pause = threading.Event()


class BenchError(Exception):
    """A server or fio did not do what the benchmark needs; the message says which and why."""


def find_nbdkit() -> Path:
    """The nbdkit that nbdmirror uses too: the one that `make setup` built, else the system's."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbdmirror"
    built = sorted(cache.glob("nbdkit-*/sbin/nbdkit"), key=lambda path: path.stat().st_mtime)
    given = os.environ.get("NBDMIRROR_NBDKIT")
    found = given or (str(built[-1]) if built else shutil.which("nbdkit"))
    if not found:
        raise BenchError("no nbdkit found: run `make setup`")
    return Path(found)


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = START_LIMIT_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise BenchError(f"not within {timeout_s} s: {what}")
        _pause.wait(0.02)
    return value


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


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
    return found


@dataclass
class Target:
    """A volume under test. `start` leaves it serving at `uri`."""

    name: str
    directory: Path
    size_bytes: int
    uri: str = ""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> None:
        raise NotImplementedError

    def run(self, role: str, words: list[str | Path]) -> subprocess.Popen[bytes]:
        """Start a server process that logs into the directory."""
        with (self.directory / f"{role}.log").open("ab") as log:
            process = subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes[role] = process
        return process

    def alive(self) -> bool:
        """True; BenchError with what it said when a process has ended."""
        for role, process in self.processes.items():
            if process.poll() is not None:
                said = (self.directory / f"{role}.log").read_text(errors="replace")[-2000:]
                raise BenchError(f"{self.name}: {role} ended with {process.returncode}:\n{said}")
        return True

    def data_file(self, name: str) -> Path:
        path = self.directory / name
        with path.open("wb") as file:
            file.truncate(self.size_bytes)
        return path

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory now, of each process that serves."""
        return {}

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_LIMIT_S)


class NbdkitFile(Target):
    """The measure of all: nbdkit's own file plugin, in C."""

    def start(self) -> None:
        path = self.directory / "nbd.sock"
        self.run("nbdkit", [find_nbdkit(), "-f", "-U", path, "file", self.data_file("data")])
        self.uri = f"nbd+unix:///?socket={path}"
        wait_for(lambda: self.alive() and accepts(path), f"{self.name} to listen")


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
    """Our volume: alone, or with a peer under protocol A, B or C."""

    def __init__(self, name: str, directory: Path, size_bytes: int, protocol: str = "") -> None:
        super().__init__(name, directory, size_bytes)
        self.protocol = protocol
        self.replicas = [directory / "a", directory / "b"] if protocol else [directory / "a"]

    def start(self) -> None:
        listens = [f"tcp://127.0.0.1:{free_port()}" for _ in self.replicas]
        for replica, listen in zip(self.replicas, listens, strict=True):
            words: list[str | Path] = ["create", replica, "--name", "bench", "--size", str(self.size_bytes)]
            for peer in listens:
                if peer != listen:
                    words += ["--listen", listen, "--peer", peer, "--protocol", self.protocol]
            self.command(words)
        for replica in reversed(self.replicas):
            self.serve(replica)
        self.uri = f"nbd+unix:///bench?socket={self.replicas[0] / 'nbd.sock'}"
        self.wait_in_step()

    def serve(self, replica: Path) -> None:
        primary = ["--primary"] if self.protocol and replica == self.replicas[0] and "b" in self.processes else []
        self.run(replica.name, [NBDMIRROR, "serve", replica, *primary])
        wait_for(lambda: self.alive() and self.status(replica).get("role"), f"{replica} to serve")

    def command(self, words: list[str | Path]) -> str:
        done = subprocess.run(
            [str(NBDMIRROR), *map(str, words)], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise BenchError(f"nbdmirror {' '.join(map(str, words))}: {done.stderr}")
        return done.stdout

    def status(self, replica: Path | None = None) -> dict[str, Any]:
        status = json.loads(self.command(["status", replica or self.replicas[0], "--json"]))
        assert isinstance(status, dict)
        return status

    def peek(self) -> dict[str, Any]:
        """The status of the first replica, without the price of starting Python."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(STOP_LIMIT_S)
            control.connect(str(self.replicas[0] / "control.sock"))
            control.sendall(b'{"command": "status"}\n')
            status = json.loads(control.makefile("rb").readline())["result"]
        assert isinstance(status, dict)
        return status

    def wait_in_step(self, timeout_s: float = START_LIMIT_S) -> dict[str, Any]:
        def in_step() -> dict[str, Any] | None:
            self.alive()
            status = self.status()
            connected = status["connection"] == "Connected" and status["peer"]["disk"] == "UpToDate"
            return status if not self.protocol or (connected and not status["dirty_bytes"]) else None

        found = wait_for(in_step, f"{self.name} to be in step", timeout_s)
        assert isinstance(found, dict)
        return found

    def memory_bytes(self) -> dict[str, int]:
        found = {}
        for replica in self.replicas:
            parent = self.processes[replica.name].pid
            for role, pid in [("serve", parent), *[("nbdkit", child) for child in children_of(parent)]]:
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmRSS:"):
                        found[f"{replica.name} {role}"] = int(line.split()[1]) * 1024
        return found
