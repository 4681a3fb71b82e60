"""Rounds of violence: a pair, a writer that keeps requests in flight, a random moment, a victim, and what was promised.

Each round checks block by block, against the log of acknowledged writes. `Rounds` kills processes: what was in the page
cache stays. `PowerRounds` cuts the power of a replica's disk as well: of each block that was written since its last
flush, the old or the new content is left, as chance wants it. (The metadata file is on an ordinary filesystem: all that
was written to it stays.)
"""

import random
from collections.abc import Callable
from pathlib import Path

from tests.integration.clients import Writer, new_history
from tests.integration.cluster import CLIENT_GONE, PEER_LOST, UNANSWERED, Cluster, Replica, assert_equal_copies
from tests.integration.fault_disk import FaultDisk
from tests.integration.history import History

EXPECTED = PEER_LOST + "|crash|promot|must not|nbdkit was killed|not clean"


class Rounds:
    """A pair, the history of what clients wrote to it, and one method a victim."""

    def __init__(self, cluster: Cluster, rng: random.Random, protocol: str, depth: int, size: str = "128M") -> None:
        self.cluster, self.rng, self.protocol, self.depth = cluster, rng, protocol, depth
        self.primary, self.secondary = self.pair(size)
        for replica in (self.primary, self.secondary):
            replica.allow(EXPECTED, CLIENT_GONE, UNANSWERED)
        self.history: History = new_history(rng)
        self.run = 0

    def pair(self, size: str) -> tuple[Replica, Replica]:
        return self.cluster.pair(size=size, protocol=self.protocol)

    def die(self, *replicas: Replica) -> None:
        """kill -9, all at once."""
        self.cluster.kill_together(*replicas)

    def writer(self) -> Writer:
        """A writer of random shape that has got a random number of answers."""
        self.run += 1
        connections = self.rng.choice([1, 1, 4]) if self.depth > 1 else 1
        options = {"depth": self.depth // connections, "connections": connections, "blocks": 2500}
        shape = {"blocks_max": self.rng.choice([1, 4]), "zeroes": 0.1, "fua": 0.05, "reads": 0.1, "flush_every": 60}
        writer = Writer(self.primary, self.history, self.run, **options, **shape)
        self.cluster.at_end(writer.close)
        writer.wait_answers(self.rng.randint(1, 500))
        return writer

    def check(self, replica: Replica) -> None:
        assert not self.history.errors, f"requests failed: {self.history.errors[:3]}"
        with replica.client(timeout_s=5) as client:
            self.history.assert_on(client)

    def taken_over(self) -> None:
        """What another replica than the old primary must have: under C everything that was acknowledged."""
        if self.protocol != "C":
            self.history.forget_unflushed()
        self.check(self.primary)

    def crashed(self) -> None:
        """What a primary that crashed must have itself: the page cache is still there."""
        self.check(self.primary)

    def both_crashed(self) -> None:
        self.taken_over()

    def settle(self) -> None:
        self.primary.wait_in_step(30)
        self.secondary.wait_in_step(30)
        assert_equal_copies(self.primary, self.secondary)

    # -- victims ------------------------------------------------------------------------------------------------

    def client(self) -> None:
        writer = self.writer()
        writer.kill()
        assert self.primary.running
        self.check(self.primary)
        self.settle()

    def peer(self) -> None:
        writer = self.writer()
        self.die(self.secondary)
        writer.wait_answers(self.rng.randint(1, 200))
        self.secondary.serve()
        writer.wait_answers(self.rng.randint(1, 200))
        writer.stop()
        self.check(self.primary)
        self.settle()

    def both(self) -> None:
        writer = self.writer()
        self.die(self.primary, self.secondary)
        writer.ended_by_loss()
        for replica in self.rng.sample([self.primary, self.secondary], 2):
            replica.launch()
        for replica in (self.primary, self.secondary):
            replica.wait_ready()
        self.settle()
        if self.rng.random() < 0.5:
            self.primary, self.secondary = self.secondary, self.primary
        self.primary.promote()
        self.both_crashed()
        self.settle()

    def lead(self) -> None:
        """The primary: its peer takes over, it comes back as secondary."""
        writer = self.writer()
        self.die(self.primary)
        writer.ended_by_loss()
        self.secondary.promote()
        self.primary, self.secondary = self.secondary, self.primary
        self.taken_over()
        self.secondary.serve()
        assert self.secondary.status()["role"] == "secondary"
        self.settle()

    def victims(self) -> list[Callable[[], None]]:
        return [self.client, self.peer, self.both, self.lead]

    # -- more of them, for the long runs ------------------------------------------------------------------------

    def bring_both_back(self) -> None:
        for replica in self.rng.sample([self.primary, self.secondary], 2):
            replica.launch()
        for replica in (self.primary, self.secondary):
            replica.wait_ready()
        self.settle()

    def returns(self) -> None:
        """The primary dies and comes back; its peer lives, and nobody promoted it."""
        writer = self.writer()
        self.die(self.primary)
        writer.ended_by_loss()
        self.primary.serve()
        self.settle()
        if self.rng.random() < 0.5:
            self.primary, self.secondary = self.secondary, self.primary
        self.primary.promote()
        self.taken_over()
        self.settle()

    def nbdkit(self) -> None:
        """The primary's nbdkit alone: its parent starts it again, and it is primary again with all that it answered."""
        writer = self.writer()
        self.primary.kill_nbdkit()
        writer.ended_by_loss()
        self.primary.wait_status(role="primary")
        self.check(self.primary)
        self.settle()

    def nbdkit_of_peer(self) -> None:
        writer = self.writer()
        self.secondary.kill_nbdkit()
        writer.wait_answers(self.rng.randint(1, 200))
        writer.stop()
        self.check(self.primary)
        self.settle()

    def one_after_the_other(self) -> None:
        """The primary goes on alone and is killed too: its changes are the newer ones, whoever returns first."""
        writer = self.writer()
        self.die(self.secondary)
        writer.wait_answers(self.rng.randint(1, 300))
        self.die(self.primary)
        writer.ended_by_loss()
        self.bring_both_back()
        if self.rng.random() < 0.5:
            self.primary, self.secondary = self.secondary, self.primary
        self.primary.promote()
        self.crashed()
        self.settle()

    def in_resync(self) -> None:
        """One or both die at some moment of a resync."""
        writer = self.writer()
        self.die(self.secondary)
        writer.wait_answers(self.rng.randint(100, 600))
        self.secondary.launch()
        self.primary.wait_status(connection=lambda state: state in ("SyncSource", "Connected"))
        victims = self.rng.choice([[self.secondary], [self.primary], [self.primary, self.secondary]])
        writer.wait_answers(self.rng.randint(1, 50))
        self.die(*victims)
        if self.primary in victims:
            writer.ended_by_loss()
        else:
            writer.wait_answers(self.rng.randint(1, 50))
            writer.stop()
        for replica in victims:
            replica.launch()
        for replica in (self.primary, self.secondary):
            replica.wait_ready()
        self.settle()
        if self.primary in victims:
            self.primary.promote()
            self.crashed()
        else:
            self.check(self.primary)
        self.settle()

    def takeover_in_resync(self) -> None:
        """The primary dies at some moment of a resync: its peer takes over if it can, with all that was said."""
        writer = self.writer()
        self.die(self.secondary)
        writer.wait_answers(self.rng.randint(1, 300))
        self.secondary.serve()
        # Before the two have met again it can't know what it lacks, and the operator's word is taken, with a warning.
        self.secondary.wait_status(connection=lambda state: state in ("SyncTarget", "Connected"))
        writer.wait_answers(self.rng.randint(1, 100))
        self.die(self.primary)
        writer.ended_by_loss()
        if self.secondary.promote(check=False).returncode == 0:
            self.primary, self.secondary = self.secondary, self.primary
            self.taken_over()
            self.secondary.serve()
        else:
            self.primary.serve()
            self.settle()
            self.primary.promote()
            self.crashed()
        self.settle()

    def twice(self) -> None:
        """The primary dies, its peer takes over and dies too, then all come back: the newer history wins."""
        writer = self.writer()
        self.die(self.primary)
        writer.ended_by_loss()
        self.secondary.promote()
        self.primary, self.secondary = self.secondary, self.primary
        self.taken_over()
        writer = self.writer()
        self.die(self.primary)
        writer.ended_by_loss()
        self.bring_both_back()
        self.primary.promote()
        self.crashed()
        self.settle()

    def stop(self) -> None:
        """SIGTERM to the primary in the middle of writes; either may go on."""
        writer = self.writer()
        self.primary.stop()
        writer.ended_by_loss()
        if self.rng.random() < 0.5:
            self.secondary.promote()
            self.primary, self.secondary = self.secondary, self.primary
            self.secondary.serve()
        else:
            self.primary.serve()
            self.settle()
            self.primary.promote()
        self.check(self.primary)
        self.settle()

    def switch(self) -> None:
        writer = self.writer()
        self.rng.choice([self.primary, self.secondary]).command("switch")
        writer.ended_by_loss()
        self.primary, self.secondary = self.secondary, self.primary
        self.check(self.primary)
        self.settle()

    def freeze(self) -> None:
        """The peer stands still for longer than its timeout, and wakes up in the middle of writes."""
        writer = self.writer()
        self.secondary.freeze()
        writer.wait_answers(self.depth + self.rng.randint(1, 200))
        self.secondary.thaw()
        writer.wait_answers(self.rng.randint(1, 200))
        writer.stop()
        self.check(self.primary)
        self.settle()

    def more_victims(self) -> list[Callable[[], None]]:
        return [
            *(self.nbdkit, self.nbdkit_of_peer, self.one_after_the_other, self.in_resync, self.takeover_in_resync),
            *(self.twice, self.returns, self.stop, self.switch, self.freeze),
        ]


class PowerRounds(Rounds):
    """Whoever dies loses power."""

    def __init__(self, cluster: Cluster, rng: random.Random, protocol: str, depth: int, directory: Path) -> None:
        self.directory = directory
        self.disks: dict[Replica, FaultDisk] = {}
        super().__init__(cluster, rng, protocol, depth, size="32M")

    def pair(self, size: str) -> tuple[Replica, Replica]:
        disks = []
        for name in ("disk-a", "disk-b"):
            directory = self.directory / name
            directory.mkdir()
            disks.append(FaultDisk(directory, 32 << 20))
            self.cluster.at_end(disks[-1].close)
        backings = [("--backing", disk.path) for disk in disks]
        a, b = self.cluster.pair(size=size, protocol=self.protocol, options_a=backings[0], options_b=backings[1])
        self.disks = {a: disks[0], b: disks[1]}
        return a, b

    def die(self, *replicas: Replica) -> None:
        super().die(*replicas)
        for replica in replicas:
            self.disks[replica].lose_power(self.rng.getrandbits(32))

    def crashed(self) -> None:
        self.history.forget_unflushed()
        self.check(self.primary)

    def both_crashed(self) -> None:
        self.crashed()
