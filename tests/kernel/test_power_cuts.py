"""Real power cuts: both replicas in guests of their own; kill -9 of a guest loses what only its page cache held.

A guest's file keeps what its disk had finished, so a device flush that is missing is not seen here: test_flushes.py
shows that.
"""

import random
from pathlib import Path

import pytest

from tests.crash.deaths import nbdkit_with_loader
from tests.integration.clients import Writer, new_history
from tests.integration.cluster import Cluster, different_blocks
from tests.kernel.guest import GuestNetwork
from tests.kernel.node import Node

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]

SIZE_BYTES = 48 << 20
BLOCKS = SIZE_BYTES // 4096


class PowerCuts:
    """Two nodes, one volume under protocol C, and one method a victim."""

    def __init__(self, cluster: Cluster, rng: random.Random, directory: Path, environment: str = "") -> None:
        self.cluster, self.rng = cluster, rng
        network = GuestNetwork(guests=2)
        cluster.at_end(network.close)
        self.primary, self.secondary = (Node(network, directory, number, SIZE_BYTES) for number in (0, 1))
        self.history = new_history(rng)
        self.run = 0
        for node, peer in ((self.primary, self.secondary), (self.secondary, self.primary)):
            cluster.at_end(node.close)
            node.environment += f" {environment}"
            node.boot()
            node.create(f"tcp://{peer.address}:{peer.mirror_port}")
        self.secondary.launch()
        self.primary.launch("--primary")
        self.primary.wait_in_step()

    def writer(self) -> Writer:
        """FUA, flushed and plain writes, some of them zeroes."""
        self.run += 1
        shape = {"depth": 8, "blocks": BLOCKS, "blocks_max": 2, "fua": 0.1, "zeroes": 0.1}
        writer = Writer(self.primary, self.history, self.run, flush_every=self.rng.choice([15, 60]), **shape)
        self.cluster.at_end(writer.close)
        writer.wait_answers(self.rng.randint(50, 400), 40)
        return writer

    def back(self, *nodes: Node) -> None:
        for node in nodes:
            node.boot()
            node.launch()

    def swap(self) -> None:
        self.primary, self.secondary = self.secondary, self.primary

    def secondary_loses_power(self) -> None:
        """The primary goes on alone; what the peer had answered and not flushed must be sent again."""
        writer = self.writer()
        self.secondary.cut_power()
        writer.wait_answers(self.rng.randint(20, 100), 40)
        self.back(self.secondary)
        self.primary.wait_in_step()
        writer.stop()

    def primary_loses_power(self) -> None:
        """Its peer is promoted, with all that was acknowledged."""
        writer = self.writer()
        self.primary.cut_power()
        writer.kill()  # nobody tells it that the server's machine is gone
        self.secondary.wait(connection="Connecting")
        self.secondary.promote()
        self.swap()
        self.back(self.secondary)
        self.primary.wait_in_step()

    def both_lose_power(self) -> None:
        """What a flush or FUA had acknowledged is on whichever is promoted."""
        writer = self.writer()
        for node in self.rng.sample([self.primary, self.secondary], 2):
            node.cut_power()
        writer.kill()
        self.history.forget_unflushed()
        for node in (self.primary, self.secondary):
            self.history.assert_in_file(node.data_path)
        self.back(self.primary, self.secondary)
        if self.rng.random() < 0.5:
            self.swap()
        self.primary.wait_in_step()
        self.primary.promote()

    def check(self) -> None:
        """Both disks, bit for bit, and block by block what the writers were told."""
        self.primary.wait_in_step()
        self.run += 1
        last = Writer(self.primary, self.history, self.run, blocks=BLOCKS, count=1)
        self.cluster.at_end(last.close)
        last.finish(0)
        assert not self.history.errors
        assert different_blocks(self.primary.data_path, self.secondary.data_path) == []
        self.history.assert_in_file(self.primary.data_path)

    def cut(self) -> None:
        victim = self.rng.choice([self.secondary_loses_power, self.primary_loses_power, self.both_lose_power])
        try:
            victim()
            self.check()
        except AssertionError as error:
            error.add_note(f"{victim.__name__} in run {self.run}")
            for node in (self.primary, self.secondary):
                error.add_note(f"node {node.number}: {node.log()[-3000:] if node.guest else 'off'}")
                error.add_note(f"status: {node.peek() if node.guest else 'off'}")
            raise


def test_power_is_cut_once(cluster: Cluster, rng: random.Random, tmp_path: Path) -> None:
    PowerCuts(cluster, rng, tmp_path).cut()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_power_is_cut_twenty_times(cluster: Cluster, rng: random.Random, tmp_path: Path) -> None:
    cuts = PowerCuts(cluster, rng, tmp_path)
    for _ in range(20):
        cuts.cut()


@pytest.mark.long
def test_a_cut_shows_what_was_not_flushed(cluster: Cluster, rng: random.Random, tmp_path: Path) -> None:
    """The proof of the method: servers that never flush lose what they had promised."""
    nbdkit = nbdkit_with_loader(tmp_path)
    cuts = PowerCuts(cluster, rng, tmp_path, f"NBDMIRROR_NBDKIT={nbdkit} NBDMIRROR_CRASH_FLUSHES=no")
    with pytest.raises(AssertionError, match="blocks wrong"):
        cuts.both_lose_power()
