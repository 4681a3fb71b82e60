"""An answered flush or FUA write has reached the device as a flush: shown by the log of a device, not by a power cut.

The guest's data device is logged by device-mapper's log-writes target. After each answer that promises something
durable the test sends a mark; what is played back up to it must hold all that was promised by then.
"""

import copy
import random
from pathlib import Path

import pytest

from tests.crash.deaths import nbdkit_with_loader
from tests.integration.clients import Writer, new_history
from tests.integration.cluster import PEER_LOST, Cluster
from tests.integration.history import History
from tests.integration.processes import free_port, wait_for
from tests.kernel.guest import GuestNetwork
from tests.kernel.node import Node
from tests.kernel.write_log import marks, played_back

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(180)]

SIZE_BYTES = 16 << 20
BLOCKS = SIZE_BYTES // 4096
LOG_BYTES = 256 << 20
MODULES = "/usr/lib/uml/modules/$(uname -r)/kernel/drivers/md"


class LoggedNode(Node):
    """A node whose data device is logged; `mark` remembers what was promised by then."""

    def __init__(self, network: GuestNetwork, directory: Path, history: History) -> None:
        super().__init__(network, directory, 0, SIZE_BYTES)
        self.history = history
        self.promised: dict[str, History] = {}
        self.write_log = self.directory / "log.img"
        with self.write_log.open("wb") as image:
            image.truncate(LOG_BYTES)
        self.backing = "/dev/mapper/logged"
        self.boot(self.write_log)
        self.run(f"insmod {MODULES}/dm-mod.ko && insmod {MODULES}/dm-log-writes.ko")
        table = f"0 {SIZE_BYTES // 512} log-writes /dev/ubda /dev/ubdc"
        self.run(f"dmsetup create logged --noudevsync --noudevrules --table '{table}'")
        self.run("dmsetup mknodes && test -b /dev/mapper/logged")

    def mark(self, name: str) -> None:
        self.run(f"dmsetup message logged 0 mark {name}")
        wait_for(lambda: name in marks(self.write_log), 10, f"the mark {name}")
        self.promised[name] = copy.deepcopy(self.history)
        self.promised[name].forget_unflushed()

    def wrong_blocks(self) -> dict[str, list[str]]:
        """For each mark, the blocks that lack what had been promised."""
        found = {}
        for name, image in played_back(self.write_log, SIZE_BYTES):
            promised = self.promised[name]

            def read(block: int, image: bytearray = image) -> bytes:
                return bytes(image[block * 4096 : (block + 1) * 4096])

            found[name] = promised.wrong_blocks(read, promised.touched_blocks())
        return found


@pytest.fixture
def node(cluster: Cluster, network: GuestNetwork, rng: random.Random, tmp_path: Path) -> LoggedNode:
    node = LoggedNode(network, tmp_path, new_history(rng))
    cluster.at_end(node.close)
    return node


def test_a_server_that_does_not_flush_is_found(cluster: Cluster, node: LoggedNode, tmp_path: Path) -> None:
    """The proof of the method: the same volume without flushes, and then with them."""
    node.create()
    sound = node.environment
    node.environment = f"{sound} NBDMIRROR_NBDKIT={nbdkit_with_loader(tmp_path)} NBDMIRROR_CRASH_FLUSHES=no"
    for run, name in enumerate(("without", "with"), 1):
        node.launch()
        node.wait(role="primary")
        writer = Writer(node, node.history, run, depth=8, blocks=BLOCKS, count=60, fua=0.2)
        cluster.at_end(writer.close)
        writer.finish(0)
        node.mark(name)
        node.stop()
        node.environment = sound
    wrong = node.wrong_blocks()
    assert wrong["without"], "the log does not tell what was flushed"
    assert wrong["with"] == []


def test_a_promise_is_on_both_devices(
    cluster: Cluster, network: GuestNetwork, node: LoggedNode, rng: random.Random
) -> None:
    """The logged node as secondary, then as primary: plain writes and a flush, then FUA writes and no flush."""
    peer = cluster.replica("peer", prefix=tuple(network.enter()))
    peer.allow(PEER_LOST, "insecure|not loopback|must not", "error: (read|write) ")
    port = free_port()
    address = f"tcp://{network.host_address}:{port}"
    own = f"tcp://{node.address}:{node.mirror_port}"
    backing = peer.directory.with_name("peer.img")
    backing.write_bytes(bytes(SIZE_BYTES))
    peer.create(str(SIZE_BYTES), "--listen", address, "--peer", own, "--backing", backing)
    node.create(address)
    peer.serve_options = ("--insecure",)
    node.launch()
    peer.serve("--primary")
    peer.wait_in_step(60)
    run = 0
    for role in ("secondary", "primary"):
        target = peer if role == "secondary" else node
        for kind, share in (("flush", 0.0), ("fua", 1.0)):
            run += 1
            count = 60 if kind == "flush" else 0
            writer = Writer(target, node.history, run, depth=8, blocks=BLOCKS, blocks_max=4, count=count, fua=share)
            cluster.at_end(writer.close)
            if kind == "flush":
                writer.finish(0)
            else:
                writer.wait_answers(60, 40)
                writer.kill()
            node.mark(f"{kind}-as-{role}")
        if role == "secondary":
            peer.command("switch")
            node.wait(role="primary")
    assert node.wrong_blocks() == {name: [] for name in node.promised}
    assert not node.history.errors
