"""What a backing holds before it becomes a volume: its size, and whether somebody's data bears a signature.

`blkid -p` knows nearly a hundred signatures and their checksums, so it is asked where it is there (util-linux, part of
every Debian); else a table of the common ones. What neither knows (a database on a bare device) goes unnoticed: the
operator's word, `--keep-data` or `--force`, stays what counts.

What lost: libblkid through ctypes (a structure a version), wipefs (reports magic strings of what is long gone).
"""

import os
import shutil
import subprocess
from pathlib import Path

from mirror.runtime import Runtime
from mirror.store.data_file import DataFile
from mirror.store.files import failed, open_file, read_all

# Found by users, too, whose PATH has no administrator's directories.
_MORE_PATHS = f"{os.defpath}:/usr/sbin:/sbin"
_BLKID_TIMEOUT_S = 10
_BLKID_FOUND, _BLKID_NOTHING, _BLKID_AMBIVALENT = 0, 2, 8

_USAGES = {
    "filesystem": "a filesystem",
    "crypto": "encrypted contents",
    "raid": "a part of a RAID or a volume group",
}

# (offset, magic, what it is); sectors are of 512 bytes, a swap area's page of 4 096.
_TABLE = (
    (1080, b"\x53\xef", "a filesystem (ext2, ext3 or ext4)"),
    (0, b"XFSB", "a filesystem (xfs)"),
    (65600, b"_BHRfS_M", "a filesystem (btrfs)"),
    (1024, b"\x10\x20\xf5\xf2", "a filesystem (f2fs)"),
    (3, b"NTFS    ", "a filesystem (ntfs)"),
    (3, b"EXFAT   ", "a filesystem (exfat)"),
    (82, b"FAT32   ", "a filesystem (vfat)"),
    (54, b"FAT1", "a filesystem (vfat)"),
    (0, b"hsqs", "a filesystem (squashfs)"),
    (32769, b"CD001", "a filesystem (iso9660)"),
    (0, b"LUKS\xba\xbe", "encrypted contents (LUKS)"),
    *((sector * 512, b"LABELONE", "a part of a volume group (LVM2)") for sector in range(4)),
    (0, b"\xfc\x4e\x2b\xa9", "a part of a RAID (md)"),
    (4096, b"\xfc\x4e\x2b\xa9", "a part of a RAID (md)"),
    (4086, b"SWAPSPACE2", "a swap area"),
    (512, b"EFI PART", "a partition table (gpt)"),
    (4096, b"EFI PART", "a partition table (gpt)"),
    (510, b"\x55\xaa", "a boot sector or a partition table (dos)"),
)
_TABLE_BYTES = max(offset + len(magic) for offset, magic, _ in _TABLE)


def size_of(path: Path) -> int:
    """Bytes of a file or block device. Raises OperatorError for anything else, DeviceError."""
    data = DataFile(path, Runtime(), own=False)
    data.close()
    return data.file_bytes


def find(path: Path) -> str | None:
    """What the file or block device seems to hold ("a filesystem (ext4)"), None for nothing known. Changes nothing."""
    blkid = shutil.which("blkid", path=f"{os.environ.get('PATH', '')}:{_MORE_PATHS}")
    if blkid is None:
        return _find_by_table(path)
    try:
        asked = subprocess.run(
            [blkid, "-p", "-o", "export", path.absolute()],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_BLKID_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return _find_by_table(path)
    if asked.returncode == _BLKID_AMBIVALENT:
        return "signatures of several kinds"
    if asked.returncode == _BLKID_FOUND:
        return _in_words(dict(line.split("=", 1) for line in asked.stdout.splitlines() if "=" in line))
    # It also says "nothing" when it could not read, and when a checksum is wrong: the table is less forgiving.
    return _find_by_table(path)


def _in_words(found: dict[str, str]) -> str:
    if "TYPE" in found:
        usage = _USAGES.get(found.get("USAGE", ""))
        return f"{usage} ({found['TYPE']})" if usage else f"a {found['TYPE']} area"
    return f"a partition table ({found.get('PTTYPE', 'of an unknown kind')})"


def _find_by_table(path: Path) -> str | None:
    fd = open_file(path, os.O_RDONLY)
    try:
        start = read_all(fd, _TABLE_BYTES, 0)
    except OSError as error:
        raise failed(path, "read", error) from error
    finally:
        os.close(fd)
    return next((what for offset, magic, what in _TABLE if start.startswith(magic, offset)), None)
