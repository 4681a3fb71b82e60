"""A User-Mode Linux guest: a real kernel as a plain process, with a shell that a test talks to.

    network = GuestNetwork()            # a namespace; what runs in it listens on network.host_address
    guest = Guest(network, tmp_path)
    guest.run("nbd-client 10.78.0.1 20001 /dev/nbd0 -N vol")

The guest's root is the host's, read-only (hostfs); /run and /mnt are memory. A system call in it costs about 160 µs: it
is here for behaviour, not for speed.
"""

import contextlib
import itertools
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.integration.processes import run, wait_for

INIT = Path(__file__).with_name("guest-init.sh")
LINUX = Path(__file__).with_name("linux-uml.sh")
BOOT_LIMIT_S = 40.0
COMMAND_LIMIT_S = 60.0
_ANSWER = re.compile(rb"^@@@ (\d+)\r?\n", re.MULTILINE)
_numbers = itertools.count()


class GuestNetwork:
    """A network namespace of the host with a bridge, and a tap on it for each guest's network card."""

    host_address = "10.78.0.1"

    def __init__(self, guests: int = 1) -> None:
        self.guest_addresses = [f"10.78.0.{2 + number}" for number in range(guests)]
        self.namespace = f"nbdm{os.getpid()}-guest{next(_numbers)}"
        run(["ip", "netns", "add", self.namespace])
        try:
            self._build()
        except AssertionError:
            self.close()
            raise

    def _build(self) -> None:
        inside = ["ip", "-n", self.namespace]
        run([*inside, "link", "set", "lo", "up"])
        run([*inside, "link", "add", "br0", "type", "bridge"])
        run([*inside, "addr", "add", f"{self.host_address}/24", "dev", "br0"])
        run([*inside, "link", "set", "br0", "up"])
        for number, _ in enumerate(self.guest_addresses):
            run([*inside, "tuntap", "add", "mode", "tap", "name", f"tap{number}"])
            run([*inside, "link", "set", f"tap{number}", "master", "br0", "up"])

    def enter(self) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--"]

    def close(self) -> None:
        run(["ip", "netns", "del", self.namespace], check=False)


class Guest:
    """Boots at once; `run` gives commands to its shell. Files of `disks` are its /dev/ubda, /dev/ubdb ..."""

    def __init__(
        self,
        network: GuestNetwork,
        directory: Path,
        disks: Sequence[Path] = (),
        number: int = 0,
        memory: str = "192M",
    ) -> None:
        self.console = b""
        words = [
            *network.enter(),
            *(str(LINUX), f"mem={memory}", "rootfstype=hostfs", "rootflags=/", "ro", "root=/dev/root", f"init={INIT}"),
            *("con=null", "con0=fd:0,fd:1", "quiet", f"uml_dir={directory}/"),
            f"vec0:transport=tap,ifname=tap{number},depth=128,gro=1",
            f"guest_address={network.guest_addresses[number]}/24",
            *(f"ubd{letter}={disk}" for letter, disk in zip("abcdefgh", disks, strict=False)),
        ]
        # A session of its own: the guest's processes are processes of the host too, they are ended together.
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self._answer("boot", BOOT_LIMIT_S)
        except AssertionError:
            self.close()
            raise

    def run(self, command: str, check: bool = True, timeout_s: float = COMMAND_LIMIT_S) -> str:
        """One line of shell in the guest; returns what it printed. A failure is an error, unless not `check`."""
        assert "\n" not in command
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        status, text = self._answer(command, timeout_s)
        assert status == 0 or not check, f"in the guest: {command}: exit {status}\n{text}"
        return text

    def _answer(self, command: str, timeout_s: float) -> tuple[int, str]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        seen = b""
        while not (match := _ANSWER.search(seen)):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert piece, f"in the guest: {command}: no answer within {timeout_s} s\n{(self.console + seen).decode()}"
            seen += piece
        self.console += seen
        return int(match[1]), seen[: match.start()].decode(errors="replace").replace("\r\n", "\n").strip()

    def cut_power(self) -> None:
        """kill -9: what only its page cache held is gone, what its disk had finished is in the file."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=10)
        wait_for(self._helpers_gone, 10.0, "the guest's processes to end")

    def close(self) -> None:
        """Power off; what does not end is killed, all of it is waited for."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(b"sync; echo o > /proc/sysrq-trigger\n")
            self.process.stdin.flush()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=10)
        self.cut_power()

    def _helpers_gone(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-self.process.pid, os.WNOHANG)  # orphans come to the test run, which is a subreaper
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False
