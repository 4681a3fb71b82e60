"""A node whose power can be cut: a guest with a replica on disks of its own, which stay when it is killed.

`data.img` is the guest's raw device /dev/ubda and the replica's backing, so that what stands in it after a cut is what
the guest's disk had finished; `files.img` is an ext4 on /dev/ubdb with the replica's directory.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.integration.cluster import NBDMIRROR
from tests.integration.processes import free_port, run, wait_for
from tests.kernel.guest import Guest, GuestNetwork

ASK = Path(__file__).with_name("ask.py")
FILES_BYTES = 32 << 20
DIRECTORY = "/mnt/files/replica"
LOG = "/run/serve.log"
BACKING = "/dev/ubda"


class Node:
    """What a writer needs of a replica, and the life of its machine."""

    def __init__(self, network: GuestNetwork, directory: Path, number: int, size_bytes: int) -> None:
        self.network, self.directory, self.number = network, directory / f"node{number}", number
        self.address = network.guest_addresses[number]
        self.mirror_port, self.nbd_port = free_port(), free_port()
        self.log_path = directory / f"node{number}.log"
        self.uri = f"nbd://{self.address}:{self.nbd_port}/vol"
        self.client_prefix = tuple(network.enter())
        self.data_path, self.files_path = self.directory / "data.img", self.directory / "files.img"
        self.backing = BACKING
        # Where nbdkit is found, because the guest's HOME is another one.
        cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        self.environment = f"XDG_CACHE_HOME={cache} NBDMIRROR_NBDKIT={os.environ.get('NBDMIRROR_NBDKIT', '')}"
        self.guest: Guest | None = None
        self.directory.mkdir()
        for path, length in ((self.data_path, size_bytes), (self.files_path, FILES_BYTES)):
            with path.open("wb") as image:
                image.truncate(length)
        run(["mke2fs", "-q", "-t", "ext4", self.files_path])

    def boot(self, *more_disks: Path) -> None:
        disks = (self.data_path, self.files_path, *more_disks)
        self.guest = Guest(self.network, self.directory, disks, self.number, memory="224M")
        self.run("mkdir -p /mnt/files && mount /dev/ubdb /mnt/files")

    def run(self, command: str, check: bool = True) -> str:
        assert self.guest is not None
        return self.guest.run(command, check)

    def create(self, peer_address: str = "", protocol: str = "C") -> None:
        """`peer_address`: tcp://HOST:PORT of the other replica; without it the volume stands alone."""
        peer = f"--listen tcp://{self.address}:{self.mirror_port} --peer {peer_address} --protocol {protocol}"
        options = f"--name vol --backing {self.backing} {peer if peer_address else ''}"
        self.run(f"{NBDMIRROR} create {DIRECTORY} {options}")

    def launch(self, *options: str) -> None:
        words = [str(NBDMIRROR), "serve", DIRECTORY, "--insecure", "--nbd", f"tcp:{self.address}:{self.nbd_port}"]
        command = " ".join([*words, *options])
        self.run(f"{self.environment} setsid {command} </dev/null >>{LOG} 2>&1 & echo $! >/run/serve.pid")

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        self.run("kill $(cat /run/serve.pid)")
        wait_for(lambda: not self.run("kill -0 $(cat /run/serve.pid) 2>/dev/null && echo runs", check=False), 20)

    def peek(self) -> dict[str, Any] | None:
        return self._ask("status")

    def promote(self) -> None:
        self._ask("promote", must=True)

    def _ask(self, command: str, must: bool = False) -> dict[str, Any] | None:
        said = self.run(f"{os.path.realpath(sys.executable)} -S -I {ASK} {DIRECTORY} {command} 2>&1", check=False)
        try:
            answer = json.loads(said)
        except ValueError:
            answer = {"ok": False, "error": said}
        assert answer["ok"] or not must, f"{command} of node {self.number}: {answer}\n{self.log()}"
        return answer["result"] if answer["ok"] else None

    def wait(self, timeout_s: float = 60.0, **wanted: object) -> dict[str, Any]:
        """Wait for these values of the status; `peer__role` is peer.role."""
        seen: dict[str, Any] = {}

        def value(path: str) -> object:
            found: Any = seen
            for key in path.split("__"):
                found = found[key] if found is not None else None
            return found

        def matches() -> bool:
            status = self.peek()
            seen.clear()
            seen.update(status or {})
            return status is not None and all(value(path) == one for path, one in wanted.items())

        try:
            wait_for(matches, timeout_s, every_s=0.1)
        except AssertionError:
            raise AssertionError(f"node {self.number}: not {wanted}: {seen}\n{self.log()}") from None
        return seen

    def wait_in_step(self) -> dict[str, Any]:
        return self.wait(connection="Connected", disk="UpToDate", peer__disk="UpToDate", dirty_bytes=0)

    def log(self) -> str:
        return self.run(f"cat {LOG}", check=False)

    def cut_power(self) -> None:
        assert self.guest is not None
        self.guest.cut_power()
        self.guest = None

    def close(self) -> None:
        if self.guest is not None:
            self.guest.close()
            self.guest = None
