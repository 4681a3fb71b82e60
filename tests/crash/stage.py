"""One pair, one crash point, one death: how each is provoked, what comes back, and what must hold then.

A scenario is a method: it arms the point, does what leads there, sees the process die, brings back what died, and
ends in `settle`: both copies are equal bit for bit, in step, and every block is what the clients were told. The log has
the fewest slots that it may have; on a `wide` stage the writer wanders over more extents than that, so that records are
written all the time.
"""

import random
from collections.abc import Callable
from pathlib import Path

import nbd

from tests.crash.deaths import Deaths, command_and_die
from tests.integration.clients import Writer, new_history
from tests.integration.cluster import CLIENT_GONE, PEER_LOST, UNANSWERED, Cluster, Replica, assert_equal_copies
from tests.integration.processes import wait_for

EXPECTED = PEER_LOST + "|crash|promot|must not|nbdkit was killed|not clean|superblock|map|torn|primary|could not"
EXPECTED += "|differ|suspect|can't be read"
SIZE = "320M"
# The last block is for the check that a volume still takes writes.
BLOCKS = 320 * 256 - 1
# Where nothing turns on the number of extents: few blocks, so that each is soon read back.
FEW_BLOCKS = 4000
EXTENTS_IN_LOG = 64
# The target was durably Inconsistent before.
INCONSISTENT_POINTS = ("target-inconsistent", "target-attached", "target-applies", "target-has-all")
# Not whole extents: the last one is grown, too.
GROWTH_BYTES = 3 << 20


class Stage:
    """A pair in step, on which one scenario after the other may be played."""

    def __init__(self, cluster: Cluster, rng: random.Random, protocol: str, wide: bool) -> None:
        self.cluster, self.rng, self.protocol = cluster, rng, protocol
        self.blocks = BLOCKS if wide else FEW_BLOCKS
        self.size_bytes = (BLOCKS + 1) * 4096
        self.point, self.whom = "", ""
        pair = cluster.created_pair(SIZE, protocol, activity_log_extents=EXTENTS_IN_LOG)
        self.primary, self.secondary = pair
        self.deaths = {replica: Deaths(replica) for replica in pair}
        for replica in pair:
            replica.allow(EXPECTED, CLIENT_GONE, UNANSWERED)
        self.history = new_history(rng)
        self.run = 0
        # Another replica than the one that was asked has to answer for what was written (protocols A and B).
        self.may_lack_unflushed = False
        self.secondary.launch()
        self.primary.launch("--primary")
        self.primary.wait_ready()
        self.secondary.wait_ready()
        self.in_step()

    def perform(self, scenario: "Scenario", point: str, whom: str) -> None:
        """`whom`: `self` kills nbdkit alone, which its parent starts again; `both` the parent too."""
        self.point, self.whom, self.may_lack_unflushed = point, whom, False
        try:
            scenario(self)
        except Exception as error:
            error.add_note(f"crash point {point}, killed: {whom}, protocol {self.protocol}")
            raise

    # -- pieces -------------------------------------------------------------------------------------------------

    def writer(self, **shape: object) -> Writer:
        self.run += 1
        options = {"depth": 8, "blocks": self.blocks, "blocks_max": 4, "fua": 0.1, "zeroes": 0.1, "flush_every": 40}
        writer = Writer(self.primary, self.history, self.run, **(options | shape))
        self.cluster.at_end(writer.close)
        writer.wait_answers(40)
        return writer

    def arm(self, replica: Replica) -> None:
        self.deaths[replica].arm(self.point, self.whom)

    def wait_death(self, replica: Replica) -> None:
        self.deaths[replica].wait()

    def bring_back(self, replica: Replica, *options: str) -> None:
        """After its death at the point: nbdkit alone comes back by itself."""
        if self.whom == "both":
            replica.launch(*options)
        wait_for(lambda: (replica.peek() or {}).get("role"), 20, f"{replica.directory.name} to be back")

    def in_step(self) -> None:
        for replica in (self.primary, self.secondary):
            replica.wait_in_step(30)

    def primaries(self) -> list[Replica]:
        return [
            replica for replica in (self.primary, self.secondary) if (replica.peek() or {}).get("role") == "primary"
        ]

    def accepts(self, replica: Replica) -> bool:
        try:
            replica.connect_client().shutdown()
        except nbd.Error:
            return False
        return True

    def choose_primary(self) -> None:
        """Whoever is primary after all that; where nobody is, one of them is promoted."""
        assert sum(map(self.accepts, (self.primary, self.secondary))) <= 1, "two replicas accept clients"
        self.in_step()
        primaries = self.primaries()
        assert len(primaries) <= 1, "two primaries"
        chosen = primaries[0] if primaries else self.rng.choice([self.primary, self.secondary])
        if chosen is self.secondary:
            self.primary, self.secondary = self.secondary, self.primary
            self.may_lack_unflushed = True
        if not primaries:
            self.primary.promote()

    def settle(self) -> None:
        """What must hold at the end, whatever the point was."""
        self.in_step()
        if self.may_lack_unflushed and self.protocol != "C":
            self.history.forget_unflushed()
        assert not self.history.errors, f"requests failed: {self.history.errors[:3]}"
        assert self.primaries() == [self.primary]
        with self.primary.client(timeout_s=5) as client:
            self.history.assert_on(client)
            client.pwrite(b"x" * 4096, BLOCKS * 4096)  # it still takes writes
            client.flush()
        assert_equal_copies(self.primary, self.secondary)
        for replica in (self.primary, self.secondary):
            status = replica.peek()
            assert status is not None
            assert status["dirty_bytes"] == 0

    def end(self) -> None:
        """Both stopped in order: their metadata must say that nothing is left to be done."""
        self.primary.stop()
        self.secondary.stop()
        assert_equal_copies(self.primary, self.secondary)
        self.history.assert_in_file(self.primary.data_path)
        for replica in (self.primary, self.secondary):
            status = replica.status()
            assert (status["dirty_bytes"], status["warnings"]) == (0, []), status

    # -- scenarios ----------------------------------------------------------------------------------------------

    def primary_while_writing(self, lead_there: Callable[[], object] = lambda: None, **shape: object) -> None:
        """Its peer takes over when the whole replica is gone; nbdkit alone takes up its role again."""
        writer = self.writer(**shape)
        self.arm(self.primary)
        lead_there()
        self.wait_death(self.primary)
        writer.ended_by_loss()
        if self.whom == "both":
            self.secondary.promote()
            self.primary, self.secondary = self.secondary, self.primary
            self.may_lack_unflushed = True
            self.bring_back(self.secondary)
        else:
            self.primary.wait_status(20, role="primary")
        self.settle()

    def primary_while_its_log_is_full(self) -> None:
        """No flush frees slots of the log: it must make room itself."""
        self.primary_while_writing(flush_every=0, zeroes=0)

    def log_size_changed(self) -> None:
        """The log grows under writes; whichever of the two counts after the death names all that may differ."""

        def ask() -> None:
            # Refused while writes do not end soon enough: asked again until nobody answers.
            wait_for(lambda: self.primary.ask({"command": "log_extents", "extents": 2 * EXTENTS_IN_LOG}) is None, 15)

        self.primary_while_writing(ask)

    def primary_while_zeroing(self) -> None:
        """One zero of several pieces; without an answer any of it may have been done."""
        self.writer().stop()
        writer = self.writer(zeroes=1.0, blocks=18000, blocks_max=18000, depth=1)
        self.arm(self.primary)
        self.wait_death(self.primary)
        writer.ended_by_loss()
        self.bring_back(self.primary)
        self.choose_primary()
        self.settle()

    def secondary_while_writing(self) -> None:
        """The writer notices nothing."""
        writer = self.writer()
        self.arm(self.secondary)
        self.wait_death(self.secondary)
        writer.wait_answers(20)
        self.bring_back(self.secondary)
        writer.wait_answers(20)
        writer.stop()
        self.settle()

    def primary_left_alone(self) -> None:
        """The peer dies first; the primary dies at the point on its way alone. Whoever is back first."""
        writer = self.writer()
        self.arm(self.primary)
        self.secondary.kill()
        self.wait_death(self.primary)
        writer.ended_by_loss()
        if self.rng.random() < 0.5:
            self.secondary.serve()
            self.bring_back(self.primary)
        else:
            self.bring_back(self.primary)
            self.secondary.serve()
        self.choose_primary()
        self.settle()

    def peer_behind(self) -> None:
        """The secondary is away while much is written: the next handshake plans a resync."""
        self.secondary.kill()
        writer = self.writer(zeroes=0.02)
        writer.wait_answers(150)
        writer.stop()

    def source_in_resync(self) -> None:
        self.peer_behind()
        self.arm(self.primary)
        self.secondary.serve()
        self.wait_death(self.primary)
        disk = (self.secondary.peek() or {}).get("disk")
        if disk == "Inconsistent":
            refusal = self.secondary.promote(check=False)
            assert refusal.returncode == 1, "an Inconsistent replica was promoted"
        self.bring_back(self.primary)
        self.choose_primary()
        self.settle()

    def target_in_resync(self) -> None:
        self.peer_behind()
        self.arm(self.secondary)
        self.secondary.launch()
        self.wait_death(self.secondary)
        if self.whom == "both" and self.point in INCONSISTENT_POINTS:
            assert self.secondary.status()["disk"] == "Inconsistent", "a block may have landed on it"
        self.bring_back(self.secondary)
        self.settle()

    def compared(self) -> None:
        """A byte of the secondary is flipped behind its back; the primary dies while it keeps what it found.

        Whoever comes back and whatever is resynced: the flipped byte and its good twin are both still there, and the
        operator's word mends it.
        """
        self.writer().stop()
        # In an extent of the log, which is dirty after the crash, once both know; else nobody may have heard of it.
        block = self.blocks if self.point == "suspect-told" else BLOCKS // 2
        paths = [replica.data_path for replica in (self.primary, self.secondary)]
        with paths[1].open("r+b") as file:
            file.seek(block * 4096)
            old = file.read(1)
            file.seek(block * 4096)
            file.write(bytes([old[0] ^ 1]))
        versions = self.versions(paths, block)
        self.arm(self.primary)
        self.primary.command("verify", "--restart", check=False, timeout_s=40)
        self.wait_death(self.primary)
        self.bring_back(self.primary)
        self.choose_primary()
        assert self.versions(paths, block) == versions, "nobody has said which side is right"
        found = self.primary.command("verify", "--restart", check=False, timeout_s=40)
        assert found.returncode == 1, found
        good = "primary" if self.primary.data_path == paths[0] else "secondary"
        self.primary.command("verify", "--suspects", "--repair", "--from", good, timeout_s=40)
        assert self.versions(paths, block) == versions[:1] * 2
        self.settle()

    @staticmethod
    def versions(paths: list[Path], block: int) -> list[bytes]:
        found = []
        for path in paths:
            with path.open("rb") as file:
                file.seek(block * 4096)
                found.append(file.read(4096))
        return found

    def meeting(self, victim: Replica) -> None:
        """A handshake that finds nothing to copy: both are secondary, and one is stopped in order."""
        self.writer().stop()
        self.primary.demote("--force")
        self.secondary.wait_status(peer__role="secondary")
        self.secondary.stop()
        self.arm(victim)
        self.secondary.launch()
        self.wait_death(victim)
        self.bring_back(victim)
        self.choose_primary()
        self.settle()

    def meeting_of_primary(self) -> None:
        self.meeting(self.primary)

    def meeting_of_secondary(self) -> None:
        self.meeting(self.secondary)

    def promoted_alone(self) -> None:
        writer = self.writer()
        self.primary.kill()
        writer.ended_by_loss()
        self.primary, self.secondary = self.secondary, self.primary
        self.may_lack_unflushed = True
        self.arm(self.primary)
        self.primary.promote(check=False)
        self.wait_death(self.primary)
        self.bring_back(self.primary)
        if self.primaries() != [self.primary]:
            self.primary.promote()
        self.secondary.serve()
        self.settle()

    def promoted_beside_its_peer(self) -> None:
        """Both are secondary; one dies while it becomes primary, the other is promoted in its place."""
        self.writer().stop()
        self.primary.demote("--force")
        self.primary.wait_status(peer__role="secondary", role="secondary")
        self.arm(self.secondary)
        self.secondary.promote(check=False)
        self.wait_death(self.secondary)
        if self.whom == "both":
            self.primary.wait_status(connection=lambda state: state != "Connected")
            self.primary.promote()
        self.bring_back(self.secondary)
        self.choose_primary()
        self.settle()

    def demoted(self) -> None:
        writer = self.writer()
        self.arm(self.primary)
        self.primary.demote("--force", check=False)
        self.wait_death(self.primary)
        writer.ended_by_loss()
        self.bring_back(self.primary)
        self.choose_primary()
        self.settle()

    def switched(self, victim: Replica) -> None:
        writer = self.writer()
        self.arm(victim)
        self.primary.command("switch", check=False, timeout_s=40)
        self.wait_death(victim)
        if self.primaries() != [self.primary]:
            writer.ended_by_loss()
        self.bring_back(victim)
        self.in_step()
        if writer.process.poll() is None:
            writer.stop()
        elif self.primaries() == [self.primary] and writer.process.returncode is None:
            writer.ended_by_loss()
        self.choose_primary()
        self.settle()

    def switched_primary_dies(self) -> None:
        self.switched(self.primary)

    def switched_secondary_dies(self) -> None:
        self.switched(self.secondary)

    def stopped(self) -> None:
        """The primary dies on its way out."""
        writer = self.writer()
        self.arm(self.primary)
        self.primary.terminate()
        self.wait_death(self.primary)
        writer.ended_by_loss()
        assert self.primary.process is not None
        wait_for(lambda: not self.primary.running, 5, "the parent to end")
        self.primary.launch()
        self.primary.wait_ready()
        self.choose_primary()
        self.settle()

    def started(self) -> None:
        """Both crashed in the middle of writes; the old primary dies once more while it reads what the crash left."""
        writer = self.writer()
        self.cluster.kill_together(self.primary, self.secondary)
        writer.ended_by_loss()
        self.arm(self.primary)
        self.primary.launch()
        self.wait_death(self.primary)
        self.bring_back(self.primary)
        self.secondary.serve()
        self.choose_primary()
        self.settle()

    def disconnected(self) -> None:
        """The secondary dies while it takes its leave."""
        writer = self.writer()
        self.arm(self.secondary)
        self.secondary.command("disconnect", check=False)
        self.wait_death(self.secondary)
        writer.wait_answers(20)
        writer.stop()
        self.bring_back(self.secondary)
        if (self.secondary.peek() or {}).get("connection") == "Standalone":
            self.secondary.command("connect")
        self.settle()

    def resized(self, victim: Replica) -> None:
        """Both have the old size or both have the new one; the old one can be grown again, and the data is there."""
        old = self.size_bytes
        self.size_bytes += GROWTH_BYTES
        writer = self.writer()
        self.arm(victim)
        self.primary.command("resize", str(self.size_bytes), check=False, timeout_s=40)
        self.wait_death(victim)
        if victim is self.primary:
            writer.ended_by_loss()
        else:
            writer.wait_answers(20)
            writer.stop()
        self.bring_back(victim)
        self.choose_primary()
        found = [(replica.peek() or {}).get("size") for replica in (self.primary, self.secondary)]
        assert found in ([old, old], [self.size_bytes, self.size_bytes]), f"sizes {found} after {old}"
        if found[0] == old:
            self.primary.command("resize", str(self.size_bytes))
        with self.primary.client(timeout_s=5) as client:
            assert client.get_size() == self.size_bytes
            client.pwrite(b"y" * 4096, self.size_bytes - 4096)
        self.settle()

    def resized_primary_dies(self) -> None:
        self.resized(self.primary)

    def resized_secondary_dies(self) -> None:
        self.resized(self.secondary)

    def invalidated(self) -> None:
        """The command dies while it declares the secondary void; void or not, it comes back in step."""
        self.writer().stop()
        self.secondary.stop()
        command_and_die("invalidate", self.secondary.directory, self.point)
        writer = self.writer()
        self.secondary.serve()
        writer.wait_answers(20)
        writer.stop()
        self.settle()


Scenario = Callable[[Stage], None]
