"""Two network namespaces joined by veth: the nearest to two machines that one machine has.

Each replica runs in one of them, and the machine's own network is left as it is. NBD goes through a unix socket, which
no namespace divides. It costs the way through two network stacks and a virtual card, and no wire: what two machines
share is still shared, the cores and the disk.
"""

import itertools
import os
from pathlib import Path

from bench.processes import BenchError, Unavailable, command

_numbers = itertools.count()


class Apart:
    """Node i has the address 10.77.0.(i+1). Raises Unavailable where namespaces can't be made."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self.namespaces = [f"nbdmirror-bench-{os.getpid()}-{next(_numbers)}" for _ in self.addresses]
        self._made: list[str] = []
        try:
            self._build()
        except (BenchError, FileNotFoundError) as error:
            self.close()
            raise Unavailable(f"no network namespaces (they need root): {error}") from None

    def _build(self) -> None:
        for namespace in self.namespaces:
            command(["ip", "netns", "add", namespace])
            self._made.append(namespace)
            command(["ip", "-n", namespace, "link", "set", "lo", "up"])
        one, other = self.namespaces
        card = ["name", "eth0", "netns"]
        command(["ip", "-n", one, "link", "add", "eth0", "type", "veth", "peer", *card, other])
        for namespace, address in zip(self.namespaces, self.addresses, strict=True):
            command(["ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0"])
            command(["ip", "-n", namespace, "link", "set", "eth0", "up"])

    def enter(self, node: int) -> list[str | Path]:
        """The words before a command that make it run on that node."""
        return ["nsenter", f"--net=/run/netns/{self.namespaces[node]}", "--"]

    def close(self) -> None:
        for namespace in self._made:
            command(["ip", "netns", "del", namespace])
        self._made.clear()
