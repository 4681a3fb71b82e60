"""User-Mode Linux guests: a real kernel as a plain process, here for its block devices.

A guest's root is the host's, read-only (hostfs), so what is installed here is there too. A system call in a guest costs
many times what it costs outside, so figures of guests are compared with figures of the same guest only.
"""

import contextlib
import os
import re
import select
import subprocess
import time
from pathlib import Path

from bench import processes
from bench.processes import BenchError, Unavailable, command

# The kernel tests' own: mounts what a shell needs, then answers a line of shell with its output and "@@@ STATUS".
INIT = Path(__file__).resolve().parent.parent / "tests" / "kernel" / "guest-init.sh"
LINUX = INIT.with_name("linux-uml.sh")
BOOT_LIMIT_S = 60.0
COMMAND_LIMIT_S = 120.0
_ANSWER = re.compile(rb"^@@@ (\d+)\r?\n", re.MULTILINE)


class GuestNetwork:
    """A network namespace with a bridge, and a tap on it for each guest. What runs in it listens on `host_address`."""

    host_address = "10.78.0.1"
    guest_addresses = ("10.78.0.2", "10.78.0.3")

    def __init__(self) -> None:
        self.namespace = f"nbdmirror-bench-{os.getpid()}-guests"
        try:
            command(["ip", "netns", "add", self.namespace])
        except (BenchError, FileNotFoundError) as error:
            raise Unavailable(f"no network namespaces (they need root): {error}") from None
        try:
            self._build()
        except BenchError:
            self.close()
            raise

    def _build(self) -> None:
        inside: list[str | Path] = ["ip", "-n", self.namespace]
        command([*inside, "link", "set", "lo", "up"])
        command([*inside, "link", "add", "br0", "type", "bridge"])
        command([*inside, "addr", "add", f"{self.host_address}/24", "dev", "br0"])
        command([*inside, "link", "set", "br0", "up"])
        for number, _ in enumerate(self.guest_addresses):
            command([*inside, "tuntap", "add", "mode", "tap", "name", f"tap{number}"])
            command([*inside, "link", "set", f"tap{number}", "master", "br0", "up"])

    def enter(self) -> list[str | Path]:
        """The words before a command that make it run there."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--"]

    def close(self) -> None:
        command(["ip", "netns", "del", self.namespace])


class Guest:
    """Boots at once; `run` gives lines to its shell. Files of `disks` are its /dev/ubda, /dev/ubdb ..."""

    def __init__(self, network: GuestNetwork, directory: Path, disks: list[Path], number: int) -> None:
        self.address = network.guest_addresses[number]
        words = [
            *network.enter(),
            *(LINUX, "mem=512M", "rootfstype=hostfs", "rootflags=/", "ro", "root=/dev/root", f"init={INIT}"),
            *("con=null", "con0=fd:0,fd:1", "quiet", f"uml_dir={directory}/"),
            f"vec0:transport=tap,ifname=tap{number},depth=128,gro=1",
            f"guest_address={self.address}/24",
            *(f"ubd{letter}={disk}" for letter, disk in zip("abcdefgh", disks, strict=False)),
        ]
        # A session of its own: the guest's processes are processes of the host, and are ended together.
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._answer("boot", BOOT_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def run(self, line: str, timeout_s: float = COMMAND_LIMIT_S) -> str:
        """What it printed. BenchError when it fails."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        status, text = self._answer(line, timeout_s)
        if status:
            raise BenchError(f"in the guest: {line}: exit {status}\n{text[-2000:]}")
        return text

    def _answer(self, line: str, timeout_s: float) -> tuple[int, str]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        seen = b""
        while not (match := _ANSWER.search(seen)):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                raise BenchError(f"in the guest: {line}: no answer within {timeout_s:g} s\n{seen.decode()[-2000:]}")
            seen += piece
        return int(match[1]), seen[: match.start()].decode(errors="replace").replace("\r\n", "\n").strip()

    def close(self) -> None:
        """Its disks are of no use to anybody, so it is killed."""
        self.process.kill()
        processes.end(self.process)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()
