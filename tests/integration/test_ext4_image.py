"""A real ext4 image full of real files moves in through NBD, the primary dies, the other replica has it, fsck-clean."""

import os
import random
from pathlib import Path

import pytest

from tests.integration.cluster import PEER_LOST, Cluster, assert_equal_copies
from tests.integration.processes import run

MIB = 1 << 20
IMAGE_BYTES = 128 * MIB
SOURCE = Path("/usr/lib/python3.11")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 filesystem with the files of a directory of this system."""
    path = tmp_path_factory.mktemp("ext4") / "image"
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    run(["mke2fs", "-q", "-t", "ext4", "-d", SOURCE, path], 60)
    return path


@pytest.mark.parametrize("mover", ["nbdcopy", "qemu-img"])
def test_moves_in_and_survives_the_primary(
    cluster: Cluster, rng: random.Random, tmp_path: Path, image: Path, mover: str
) -> None:
    a, b = cluster.pair(size=str(IMAGE_BYTES))
    for replica in (a, b):
        replica.allow(PEER_LOST, "promot|must not|crash|log")
    if mover == "nbdcopy":
        run(["nbdcopy", "--flush", image, a.uri], 60)
    else:
        run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, a.uri], 60)
    a.kill()
    b.promote()

    # The other replica, read by two clients and as the file it is.
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, b.uri], 60)
    moved_out = tmp_path / "moved-out"
    run(["nbdcopy", b.uri, moved_out], 60)
    for copy in (moved_out, b.data_path):
        run(["e2fsck", "-f", "-n", copy], 60)
        assert run(["cmp", "--bytes", str(IMAGE_BYTES), image, copy], check=False).returncode == 0

    # And the files in it are those of the system.
    extracted = tmp_path / "extracted"
    extracted.mkdir()
    run(["debugfs", "-R", f"rdump /json /email {extracted}", b.data_path], 60)
    for part in ("json", "email"):
        differences = run(["diff", "-r", SOURCE / part, extracted / part], check=False)
        assert differences.returncode == 0, differences.stdout
    assert len(os.listdir(extracted / "email")) > 10

    a.serve()
    a.wait_in_step()
    assert_equal_copies(a, b)
