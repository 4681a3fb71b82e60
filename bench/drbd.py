"""Beside DRBD: `python -m bench --drbd`. Two guests with the same kernel, which has both DRBD and an NBD client.

In the first guest one fio job writes to four block devices in turn:

- a disk of the guest, and DRBD (protocol C) on another one, its peer in the second guest;
- nbdkit's file plugin and nbdmirror (protocol C, both replicas), all three on the host, attached by nbd-client.

DRBD is set beside the guest's disk, nbdmirror beside nbdkit's file plugin: to each its own unmirrored copy. What is
missing: in such guests a system call and an interrupt are slow, and DRBD's peer is reached through two taps, ours
through the host's loopback; so this tells how many times one's own disk a mirrored write takes, and no more.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from bench.figures import Record, Round
from bench.fio import figures_of
from bench.guest import Guest, GuestNetwork
from bench.processes import Unavailable, command, wait_for
from bench.scale import Scale
from bench.servers import NbdkitFile, NbdMirror, free_port

MODULES = "/usr/lib/uml/modules/$(uname -r)/kernel"
DRBD_PORT = 7788

GUEST_DISK = "the guest's disk"
DRBD = "DRBD, C"
GUEST_FILE = "nbdkit file, nbd-client"
GUEST_MIRROR = "nbdmirror, C, nbd-client"
DEVICES = {GUEST_DISK: "/dev/ubda", DRBD: "/dev/drbd0", GUEST_FILE: "/dev/nbd0", GUEST_MIRROR: "/dev/nbd1"}
# The key under which a round has the throughput of its second job; the first one's are as elsewhere.
DEEP = "depth_16_operations_per_s"


def steps(scale: Scale) -> int:
    return 4 + len(DEVICES) * scale.rounds


def measure(work: str, directory: Path, scale: Scale, record: Record, say: Callable[[str], None]) -> None:
    directory.mkdir()
    with contextlib.ExitStack() as cleanup:
        tools = drbd_tools(directory)
        network = GuestNetwork()
        cleanup.callback(network.close)
        guests = []
        for number in range(len(network.guest_addresses)):
            say(f"booting guest {number}")
            guests.append(boot(network, directory / f"guest{number}", number, scale))
            cleanup.callback(guests[-1].close)
        say("connecting DRBD")
        connect_drbd(tools, guests)
        say("attaching NBD devices")
        attach(network, directory, scale, guests[0], cleanup)
        rounds: dict[str, list[Round]] = {name: [] for name in DEVICES}
        names = list(DEVICES)
        for number in range(scale.rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                say(f"{work}: {name}")
                one = write(guests[0], "--ioengine=psync", DEVICES[name], scale)
                deep = write(guests[0], "--ioengine=libaio --iodepth=16", DEVICES[name], scale)
                values = {**one.values, DEEP: deep.values["operations_per_s"]}
                rounds[name].append(Round(values, one.percentiles_us))
    for name, found in rounds.items():
        record.add(work, name, found)


def drbd_tools(directory: Path) -> Path:
    """Where drbdmeta and drbdsetup for this module are: Debian's package, unpacked here and not installed."""
    place = directory / "drbd-utils"
    place.mkdir()
    if not shutil.which("linux.uml"):
        raise Unavailable("user-mode-linux is not installed: `make setup-test`")
    command(["sh", "-c", 'cd "$1" && apt-get download -q drbd-utils && dpkg -x drbd-utils_*.deb .', "sh", place], 120)
    return place


def boot(network: GuestNetwork, directory: Path, number: int, scale: Scale) -> Guest:
    directory.mkdir()
    disks = [directory / "disk", directory / "drbd"]
    for disk in disks:
        # All of it, so that no device pays for the first write to a hole, and a little more for DRBD's metadata.
        command(["dd", "if=/dev/urandom", f"of={disk}", "bs=1M", f"count={(scale.volume_bytes >> 20) + 4}"])
    guest = Guest(network, directory, disks, number)
    for module in ("lib/lru_cache.ko", "drivers/block/drbd/drbd.ko"):
        guest.run(f"insmod {MODULES}/{module}")
    return guest


def connect_drbd(tools: Path, guests: list[Guest]) -> None:
    """Both disks count as equal: their contents are nobody's."""
    setup, meta = tools / "lib/drbd/drbdsetup-84", tools / "sbin/drbdmeta"
    for guest, other in (guests, guests[::-1]):
        guest.run("mkdir -p /run/lock /run/drbd && mount -t tmpfs tmpfs /var/lib/drbd 2>/dev/null; true")
        guest.run(f"{meta} --force 0 v08 /dev/ubdb internal create-md")
        guest.run(f"{setup} new-resource r0 && {setup} new-minor r0 0 0")
        guest.run(f"{setup} attach 0 /dev/ubdb /dev/ubdb internal")
        ends = f"ipv4:{guest.address}:{DRBD_PORT} ipv4:{other.address}:{DRBD_PORT}"
        guest.run(f"{setup} connect r0 {ends} --protocol=C")
    wait_for(lambda: "cs:Connected" in guests[0].run("cat /proc/drbd"), "DRBD to connect", 60, every_s=0.5)
    guests[0].run(f"{setup} new-current-uuid --clear-bitmap 0")
    guests[0].run(f"{setup} primary 0")
    wait_for(lambda: "ds:UpToDate/UpToDate" in guests[0].run("cat /proc/drbd"), "DRBD to be in step", 60, every_s=0.5)


def attach(network: GuestNetwork, directory: Path, scale: Scale, guest: Guest, cleanup: contextlib.ExitStack) -> None:
    """nbdkit's file plugin is /dev/nbd0 in the guest, our volume /dev/nbd1."""
    size_bytes = scale.volume_bytes
    for number, name in enumerate((GUEST_FILE, GUEST_MIRROR)):
        place, port = directory / f"nbd{number}", free_port()
        place.mkdir()
        target: NbdkitFile | NbdMirror
        if name == GUEST_FILE:
            target = NbdkitFile(name, place, size_bytes, 0)
            target.listen = ["-i", network.host_address, "-p", str(port)]
        else:
            target = NbdMirror(name, place, size_bytes, 0, "C")
            target.options[0] += ["--insecure", "--nbd", f"tcp:{network.host_address}:{port}"]
        target.prefixes = [network.enter(), network.enter()]
        cleanup.callback(target.stop)
        target.start()
        export = "bench" if name == GUEST_MIRROR else "''"
        guest.run(f"nbd-client {network.host_address} {port} /dev/nbd{number} -N {export}")
        guest.run(f"dd if=/dev/urandom of=/dev/nbd{number} bs=1M count={size_bytes >> 20} conv=fsync")


def write(guest: Guest, engine: str, device: str, scale: Scale) -> Round:
    guest.run("sync")
    said = guest.run(
        f"cd /run && fio --name=job --thread --filename={device} --rw=randwrite --bs=4k --direct=1 {engine} "
        f"--size={scale.volume_bytes} --time_based --runtime={round(scale.seconds * 1000)}ms --norandommap "
        "--refill_buffers --lat_percentiles=1 --clat_percentiles=0 --output-format=json"
    )
    return figures_of(json.loads(said[said.index("{") : said.rindex("}") + 1])["jobs"][0]["write"])
