"""Disks that are too small: a tmpfs with a limit, a loop device over a sparse file that its filesystem can't hold."""

from pathlib import Path

from tests.integration.processes import run


class SmallFilesystem:
    """A tmpfs of limited size at `path`: writing beyond it gives ENOSPC, as a full disk does."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        path.mkdir()
        run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", path])

    def close(self) -> None:
        run(["umount", "--lazy", self.path], check=False)


class LoopDisk:
    """A block device of `size_bytes` that can hold only `room_bytes`.

    Writes go to the page cache and succeed; writing them back fails, so fdatasync is the first to hear of it, with EIO
    once: the next fdatasync succeeds, although the data is gone.
    """

    def __init__(self, directory: Path, size_bytes: int, room_bytes: int) -> None:
        self._filesystem = SmallFilesystem(directory / "loopdisk", room_bytes)
        image = self._filesystem.path / "image"
        with image.open("wb") as file:
            file.truncate(size_bytes)
        self._device = run(["losetup", "--find", "--show", image]).stdout.strip()
        self.path = Path(self._device)

    def close(self) -> None:
        run(["losetup", "--detach", self._device], check=False)
        self._filesystem.close()
