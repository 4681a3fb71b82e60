"""A real kernel attaches with nbd-client, makes ext4, writes; after a promotion the other replica has the files."""

from pathlib import Path

import pytest

from tests.integration.cluster import PEER_LOST, Cluster, Replica, assert_equal_copies
from tests.integration.processes import free_port, run
from tests.kernel.guest import Guest, GuestNetwork

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(180)]

MIB = 1 << 20
SOURCE = "/usr/lib/python3.11/json /usr/lib/python3.11/email"


class KernelClient:
    """The guest's nbd0 and a filesystem on it."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def attach(self, replica: Replica, port: int) -> None:
        self.guest.run(f"nbd-client {GuestNetwork.host_address} {port} /dev/nbd0 -N {replica.name}")
        assert self.guest.run("blockdev --getsize64 /dev/nbd0") == str(replica.status()["size"])

    def make(self) -> None:
        self.guest.run("mkfs.ext4 -q /dev/nbd0")

    def mount(self) -> None:
        self.guest.run("mkdir -p /mnt/volume && mount /dev/nbd0 /mnt/volume")

    def check(self) -> None:
        """fsck finds nothing, and the kernel has seen no error on the device."""
        self.guest.run("e2fsck -f -n /dev/nbd0")
        complaints = self.guest.run(
            "dmesg | grep -iE 'I/O error|EXT4-fs error|nbd0: Connection timed out'", check=False
        )
        assert complaints == ""

    def unmount(self) -> None:
        self.guest.run("umount /mnt/volume")

    def detach(self) -> None:
        self.guest.run("nbd-client -d /dev/nbd0")


@pytest.fixture
def guest(cluster: Cluster, network: GuestNetwork, tmp_path: Path) -> Guest:
    guest = Guest(network, tmp_path)
    cluster.at_end(guest.close)
    return guest


def serve_pair_on(cluster: Cluster, network: GuestNetwork) -> tuple[Replica, int, Replica, int]:
    """Both replicas in the guest's namespace: the mirror on its loopback, NBD on the tap."""
    ports = [free_port() for _ in range(4)]
    replicas = []
    for name, nbd_port, own, other in (("a", ports[0], ports[2], ports[3]), ("b", ports[1], ports[3], ports[2])):
        replica = cluster.replica(name, prefix=tuple(network.enter()))
        replica.create("128M", "--listen", f"tcp://127.0.0.1:{own}", "--peer", f"tcp://127.0.0.1:{other}")
        replica.serve_options = ("--insecure", "--nbd", f"tcp:{network.host_address}:{nbd_port}")
        replica.allow(PEER_LOST, "insecure|loopback|promot|must not")
        replicas.append(replica)
    a, b = replicas
    b.serve()
    a.serve("--primary")
    a.wait_in_step()
    return a, ports[0], b, ports[1]


def test_a_kernel_uses_the_volume_and_finds_its_files_after_a_promotion(
    cluster: Cluster, network: GuestNetwork, guest: Guest
) -> None:
    a, port_a, b, port_b = serve_pair_on(cluster, network)
    client = KernelClient(guest)

    client.attach(a, port_a)
    client.make()
    client.mount()
    guest.run(f"cp -r {SOURCE} /mnt/volume/")
    guest.run("dd if=/dev/urandom of=/mnt/volume/random bs=1M count=8 conv=fsync")
    guest.run("rm -r /mnt/volume/email/mime && fstrim /mnt/volume")
    guest.run("cd /mnt/volume && find . -type f -exec sha256sum {} + > /run/sums && cp /run/sums . && cd / && sync")
    client.unmount()
    client.check()
    client.detach()
    assert_equal_copies(a, b)

    a.kill()
    b.promote()
    client.attach(b, port_b)
    client.check()
    client.mount()
    assert "FAILED" not in guest.run("cd /mnt/volume && sha256sum --check --quiet /run/sums && cd /")
    guest.run("cmp /run/sums /mnt/volume/sums")
    guest.run("echo after > /mnt/volume/after && sync")
    client.unmount()
    client.detach()

    a.serve()
    a.wait_in_step(30)
    assert_equal_copies(a, b)
    run(["e2fsck", "-f", "-n", a.data_path])
