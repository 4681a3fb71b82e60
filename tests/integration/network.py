"""Two hosts and the wire between them, out of network namespaces: a node is a namespace, the wire a bridge in a third.

Cutting the wire takes a node's port off the bridge: its own link stays up, so that packets vanish and nobody is told,
as when a switch dies. (A veth set down tells one end; nftables needs a kernel module that not every machine has.)
"""

import itertools
import os

from tests.integration.processes import run

_numbers = itertools.count()


class Network:
    """`nodes` namespaces on one bridge; node i has the address 10.77.0.(i+1)."""

    def __init__(self, nodes: int = 2) -> None:
        prefix = f"nbdm{os.getpid()}-{next(_numbers)}"
        self.bridge = f"{prefix}-br"
        self.nodes = [f"{prefix}-{i}" for i in range(nodes)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(nodes)]
        self._made: list[str] = []
        try:
            self._build()
        except AssertionError:
            self.close()
            raise

    def _build(self) -> None:
        for namespace in (self.bridge, *self.nodes):
            run(["ip", "netns", "add", namespace])
            self._made.append(namespace)
            run(["ip", "-n", namespace, "link", "set", "lo", "up"])
        run(["ip", "-n", self.bridge, "link", "add", "br0", "type", "bridge"])
        run(["ip", "-n", self.bridge, "link", "set", "br0", "up"])
        for number, (node, address) in enumerate(zip(self.nodes, self.addresses, strict=True)):
            port = f"port{number}"
            peer = ["peer", "name", "eth0", "netns", node]
            run(["ip", "-n", self.bridge, "link", "add", port, "type", "veth", *peer])
            run(["ip", "-n", self.bridge, "link", "set", port, "master", "br0", "up"])
            run(["ip", "-n", node, "addr", "add", f"{address}/24", "dev", "eth0"])
            run(["ip", "-n", node, "link", "set", "eth0", "up"])

    def cut(self, node: int = 0) -> None:
        """From now on every packet from and to this node is lost, silently."""
        run(["ip", "-n", self.bridge, "link", "set", f"port{node}", "nomaster"])

    def heal(self, node: int = 0) -> None:
        run(["ip", "-n", self.bridge, "link", "set", f"port{node}", "master", "br0"])

    def swallow(self, node: int, other: int) -> None:
        """From now on what `node` sends to `other` goes nowhere, and no "no route to host" ends the waiting."""
        nowhere = ["lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent"]
        run(["ip", "-n", self.nodes[node], "neigh", "replace", self.addresses[other], *nowhere])

    def enter(self, node: int) -> list[str]:
        """The words before a command that make it run on that node."""
        return ["nsenter", f"--net=/run/netns/{self.nodes[node]}", "--"]

    def close(self) -> None:
        for namespace in self._made:
            run(["ip", "netns", "del", namespace], check=False)
        self._made.clear()
