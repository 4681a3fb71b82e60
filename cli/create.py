"""nbdmirror create: make a replica.

It is made in place, because DIR may be the root of a filesystem of its own. A marker file comes first and goes last:
what an interrupted create left is recognised by it, by `serve` and by a second create alike, and never taken for a
replica. What fails is removed again, and nothing that was there before is ever touched.
"""

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import click

from cli import output
from cli.parameters import ADDRESS, NAME, PROTOCOL, SIZE, directory_argument
from mirror import signatures
from mirror.core import layout
from mirror.core.errors import DeviceError, MirrorError, OperatorError
from mirror.core.generation import DAY0, NO_VOLUME, Kind
from mirror.core.layout import Superblock
from mirror.core.limits import BLOCK_BYTES
from mirror.core.states import DiskState
from mirror.core.units import size_text
from mirror.runtime import Runtime
from mirror.store import REPLICA_FILES, create_replica_files
from nbd_server import hold, listening
from nbd_server.config import FILE_NAME, INTERRUPTED_NAME, Address, Config, Protocol, is_loopback, render


@dataclasses.dataclass(frozen=True)
class Wish:
    """What the command line asks for, beside the configuration."""

    size: int | None
    keep_data: bool = False
    force: bool = False
    join: bool = False


@click.command()
@directory_argument
@click.option("--name", required=True, type=NAME, help="The volume's name: letters, digits, '.', '_', '-'.")
@click.option("--size", type=SIZE, help="Like 10G, 512MiB or bytes. Needed but with --backing.")
@click.option("--listen", type=ADDRESS, help="Where this replica waits for its peer.")
@click.option("--peer", type=ADDRESS, help="Where the peer waits.")
@click.option(
    "--protocol",
    type=PROTOCOL,
    default="C",
    show_default=True,
    help="When a write is acknowledged: C written on both, B in the peer's memory, A written here.",
)
@click.option("--backing", metavar="PATH", type=click.Path(path_type=Path), help="A file or block device for the data.")
@click.option("--keep-data", is_flag=True, help="Make the contents of the backing the volume's.")
@click.option("--force", is_flag=True, help="Take the backing though it bears a filesystem that may be lost.")
@click.option("--join", is_flag=True, help="Replace a lost replica: copy everything from the peer.")
def create(
    directory: Path,
    name: str,
    size: int | None,
    listen: Address | None,
    peer: Address | None,
    protocol: Protocol,
    backing: Path | None,
    keep_data: bool,
    force: bool,
    join: bool,
) -> None:
    """Make a replica.

    DIR must not exist yet, or be empty.

    \b
    Examples:
      nbdmirror create /srv/vol --name vol --size 10G
      nbdmirror create /srv/vol --name vol --size 10G --listen tcp://127.0.0.1:7000 --peer tcp://127.0.0.1:7001
      nbdmirror create /srv/vol --name vol --backing /dev/vg/vol --keep-data
    """
    wish = Wish(size, keep_data, force, join)
    _check_usage(listen, peer, backing, wish)
    config = Config(name, protocol, listen, peer, backing and backing.absolute())
    size_bytes = make_replica(directory, config, wish)
    _report(directory, config, size_bytes, wish)


def make_replica(directory: Path, config: Config, wish: Wish) -> int:
    """Make the replica's directory and files; returns the volume's size. Raises MirrorError, then nothing is left."""
    with _new_directory(directory):
        if config.backing is not None:
            _check_backing(config.backing, wish)
        size_bytes = _size(config.backing, wish)
        superblock = layout.encode_superblock(_first_superblock(config, size_bytes, wish, Runtime()))
        _make_files(directory, size_bytes, config, superblock)
    return size_bytes


def _check_usage(listen: Address | None, peer: Address | None, backing: Path | None, wish: Wish) -> None:
    def refuse_if(wrong: bool, message: str) -> None:
        if wrong:
            raise click.UsageError(message)

    refuse_if(wish.size is None and backing is None, "Missing option '--size'. Only --backing has a size of its own.")
    refuse_if(listen is not None and peer is None, "--listen needs --peer: the address where the other replica waits.")
    refuse_if(peer is not None and listen is None, "--peer needs --listen: the address where this replica waits.")
    refuse_if(listen is not None and listen == peer, f"--listen and --peer are the same address, {peer}.")
    refuse_if(wish.keep_data and wish.force, "--keep-data and --force are alternatives: give one of them.")
    refuse_if((wish.keep_data or wish.force) and backing is None, "--keep-data and --force are for a --backing.")
    refuse_if(wish.join and peer is None, "--join copies everything from the peer: give --listen and --peer.")
    refuse_if(
        wish.join and wish.keep_data,
        "--join overwrites the backing with the peer's contents, so --keep-data can't be kept: give --force instead.",
    )


@contextlib.contextmanager
def _new_directory(directory: Path) -> Iterator[None]:
    """DIR with a marker in it, for as long as it is being filled; on failure all is as it was."""
    made = _make_directory(directory)
    marker = directory / INTERRUPTED_NAME
    try:
        try:
            os.close(os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            raise _exists(directory) from None
        _sync(directory)
        try:
            yield
        except BaseException:
            for name in (FILE_NAME, *REPLICA_FILES):
                (directory / name).unlink(missing_ok=True)
            marker.unlink()
            raise
        marker.unlink()
        _sync(directory)
        _sync(directory.absolute().parent)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def _make_directory(directory: Path) -> bool:
    """Whether it was made, or was there and is empty. Raises OperatorError."""
    try:
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700)
        return True
    except FileExistsError:
        if not directory.is_dir():
            raise OperatorError(f"{directory} exists and is not a directory", remedy="choose another path") from None
        if any(directory.iterdir()):
            raise _exists(directory) from None
        directory.chmod(0o700)
        return False
    except OSError as error:
        raise OperatorError(
            f"can't make {directory}: {error.strerror}", remedy="choose a place that you may write to"
        ) from None


def _exists(directory: Path) -> OperatorError:
    if (directory / INTERRUPTED_NAME).exists():
        return OperatorError(
            f"{directory} holds what an interrupted create left (or one that is running)",
            remedy=f"remove it: nbdmirror destroy {directory}",
        )
    what = "is a replica already" if (directory / FILE_NAME).exists() else "exists already and is not empty"
    return OperatorError(
        f"{directory} {what}; nothing of it was changed", remedy="choose another directory, or remove this one first"
    )


def _size(backing: Path | None, wish: Wish) -> int:
    """The volume's size in whole blocks: what was asked for is rounded up, what a backing has is rounded down."""
    if wish.size is None:
        assert backing is not None
        has = signatures.size_of(backing)
        size = has // BLOCK_BYTES * BLOCK_BYTES
        if size == 0:
            raise OperatorError(f"{backing} holds {has} bytes, not one block of {BLOCK_BYTES}", remedy="make it larger")
        if size != has:
            output.warn(f"{backing} holds {has} bytes; the volume is {size}, a multiple of {BLOCK_BYTES}")
        return size
    size = -(-wish.size // BLOCK_BYTES) * BLOCK_BYTES
    if size != wish.size:
        output.warn(f"the size was rounded up from {wish.size} to {size} bytes, a multiple of {BLOCK_BYTES}")
    if backing is not None and size < (has := signatures.size_of(backing)):
        output.warn(f"{backing} holds {has} bytes; the volume is its first {size}, whatever stands behind them")
    return size


def _check_backing(backing: Path, wish: Wish) -> None:
    """It must be there, and hold nothing that somebody may want, unless told. That it is free is for `serve` to see."""
    try:
        kind = backing.stat().st_mode
    except OSError as error:
        raise OperatorError(
            f"can't use {backing} as backing: {error.strerror}",
            remedy="name a file or block device that exists, or leave --backing away",
        ) from None
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        raise OperatorError(
            f"can't use {backing} as backing: it is neither a file nor a block device", remedy="name another one"
        )
    try:
        os.close(hold.hold_data(backing, Runtime()))
    except hold.HeldElsewhere as error:
        output.warn(f"{error.message}; it can't be served while that lasts")
    found = signatures.find(backing)
    if found is None or wish.keep_data or wish.force:
        return
    raise OperatorError(
        f"{backing} holds {found}",
        remedy="--keep-data makes it the volume's contents, --force takes the backing whatever it holds",
    )


def _first_superblock(config: Config, size_bytes: int, wish: Wish, runtime: Runtime) -> Superblock:
    if wish.join:
        kind, current = Kind.JOINING, 0
    elif config.backing is not None:
        kind, current = Kind.BACKING, runtime.random_number()
    else:
        kind, current = Kind.FRESH, DAY0
    return Superblock(
        sequence=1,
        name=config.name,
        size_bytes=size_bytes,
        replica_id=runtime.random_bytes(16),
        volume_id=NO_VOLUME,
        kind=kind,
        disk=DiskState.INCONSISTENT if wish.join else DiskState.UP_TO_DATE,
        peer_disk=None,
        current=current,
        base=0,
        history=(),
        primary=False,
        clean=True,
        met_peer=False,
        incarnation=runtime.random_number(),
        boot_id=runtime.boot_id(),
        log_slots=config.activity_log_extents,
        log_epoch=1,
        protocol=config.protocol,
        redundancy_lost_at=0.0,
        last_resync=None,
    )


def _make_files(directory: Path, size_bytes: int, config: Config, superblock: bytes) -> None:
    try:
        create_replica_files(directory, size_bytes, config.backing, superblock)
        _write_durable(directory / FILE_NAME, render(config))
    except DeviceError as error:
        if error.errno == errno.EFBIG:
            raise OperatorError(error.message, remedy="choose a smaller --size, or another filesystem") from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        metadata = size_text(layout.Geometry(size_bytes).metadata_bytes)
        raise OperatorError(
            f"{error.message}; the metadata of this volume takes {metadata}, all of it at once",
            remedy="make room, or choose another filesystem",
        ) from None


def _write_durable(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _report(directory: Path, config: Config, size_bytes: int, wish: Wish) -> None:
    where = f"with peer {config.peer}, protocol {config.protocol}" if config.peer else "without a peer"
    output.say(f'created {directory}: a replica of "{config.name}", {size_text(size_bytes)}, {where}')
    options = ""
    wide = [str(address) for address in (config.listen, config.peer) if address and not is_loopback(address)]
    if wide:
        output.warn(f"{' and '.join(wide)} is not loopback, and nothing is encrypted: serve takes --insecure for that")
        options += " --insecure"
    try:
        listening.check_socket_path(config.endpoint(directory))
    except MirrorError as error:
        output.warn(f"{error.message}; {error.remedy}")
        options += " --nbd unix:/a/shorter/path"
    if config.peer and not wish.join:
        options += "   (on one of the two with --primary)"
    output.say(f"next: nbdmirror serve {directory}{options}")
