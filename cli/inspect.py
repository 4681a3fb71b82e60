"""nbdmirror inspect: a replica's metadata in words, also when it is damaged. Reads only."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from rich.text import Text

from cli import offline, output
from cli.offline import Body, Damage, Metadata
from cli.parameters import directory_argument
from mirror.core.activity_log import DamagedLog
from mirror.core.errors import DamagedRecord, DeviceError, MirrorError
from mirror.core.layout import Geometry, Superblock
from mirror.core.limits import EXTENT_BYTES
from mirror.core.states import DiskState
from mirror.core.units import exact_size_text, size_text
from mirror.store import DATA_NAME, META_NAME, PARKED_NAME, SUSPECTS_NAME, UNPROVEN_NAME
from mirror.store.parked_file import ParkedFile
from nbd_server import config, hold
from nbd_server.config import Config
from nbd_server.status import iso_time

# While a server writes, a record may be caught half written: then another look shows it whole.
LOOKS = 3

KINDS = {
    "fresh": "new: never written, never met a peer",
    "backing": "new, with contents of its own: never met a peer",
    "joining": "waits for a peer to copy everything from",
    "established": "in use",
}


class Findings:
    """What is shown, and how much of it is damage."""

    def __init__(self) -> None:
        self.sections: list[tuple[str, list[tuple[str, str | Text]]]] = []
        self.damages: list[str] = []
        self.remedy = "a start says what can still be used, and mends what it can"

    def section(self, title: str) -> None:
        self.sections.append((title, []))

    def add(self, label: str, value: str | Text) -> None:
        self.sections[-1][1].append((label, value))

    def damaged(self, label: str, what: str, why: str) -> None:
        self.add(label, Text.assemble(("DAMAGED", "bold red"), f": {why}"))
        self.damages.append(f"{what}: {why}")


@click.command()
@directory_argument
def inspect(directory: Path) -> None:
    """Show a replica's metadata in words.

    Record by record, also when it is damaged. Changes nothing.

    Exit status 1 means that something is damaged, missing or too short.

    \b
    Example:
      nbdmirror inspect /srv/vol
    """
    served = hold.holder(directory) is not None
    for _ in range(LOOKS if served else 1):
        findings = _look(directory, served)
        if not findings.damages:
            break
    for title, pairs in findings.sections:
        output.say(title)
        output.say(output.rows((f"  {label}", value) for label, value in pairs))
    if served:
        output.warn("it is being served: what stands here may have changed already")
    if findings.damages:
        output.fail(f"{len(findings.damages)} damaged or missing: {'; '.join(findings.damages[:3])}", findings.remedy)
        sys.exit(1)
    output.say("all records are sound")


def _look(directory: Path, served: bool) -> Findings:
    findings = Findings()
    replica = _show_config(directory, findings)
    metadata = offline.read(directory)
    _show_superblock(directory, metadata, served, findings)
    known = metadata.copies.superblock
    if known is not None and metadata.body is not None:
        if replica is not None and replica.name != known.name:
            findings.damaged("name", config.FILE_NAME, f"it names the volume {replica.name!r}, not {known.name!r}")
        _show_log(known, metadata.body, findings)
        _show_map(known, metadata.body, findings)
        _show_suspects(directory, metadata.body, known.suspect_parts, findings)
        _show_unproven(directory, metadata.body, findings)
        _show_parked(directory, known, findings)
    _show_data(replica.data_path(directory) if replica else directory / DATA_NAME, known, findings)
    return findings


def _show_suspects(directory: Path, body: Body, parts: tuple[tuple[int, int], ...], findings: Findings) -> None:
    findings.section(str(directory / SUSPECTS_NAME))
    for page in body.damaged_suspects:
        why = "it can't be read: its extents are compared again"
        findings.damaged(f"page {page}", f"page {page} of the suspects", why)
    if _is_there(SUSPECTS_NAME, body, findings):
        suspect_bytes = body.suspects.dirty_bytes
        findings.add("suspects", f"{suspect_bytes} bytes were found different" if suspect_bytes else "none")
        for offset, length in parts:
            findings.add("part", f"{length} bytes at {offset} of a suspect block were written while the peer was away")


def _show_unproven(directory: Path, body: Body, findings: Findings) -> None:
    findings.section(str(directory / UNPROVEN_NAME))
    for page, error in body.damaged_unproven.items():
        findings.damaged(f"page {page}", f"page {page} of the unproven extents", _why(error))
    if _is_there(UNPROVEN_NAME, body, findings):
        findings.add("unproven", f"{body.unproven_extents} extents to compare, beside those in the activity log")


def _show_parked(directory: Path, known: Superblock, findings: Findings) -> None:
    findings.section(str(directory / PARKED_NAME))
    parked = ParkedFile(directory / PARKED_NAME, make=False)
    try:
        writes = parked.read(known.log_epoch)
    except DeviceError as error:
        findings.damaged("contents", PARKED_NAME, error.message)
    else:
        if not parked.exists:
            findings.add("file", "not there: the next serve makes it")
        findings.add(
            "parked", f"{len(writes)} writes to be applied, if nothing was forgotten since" if writes else "none"
        )
    finally:
        parked.close()


def _is_there(name: str, body: Body, findings: Findings) -> bool:
    if name in body.missing:
        findings.damaged("file", name, offline.MISSING[name])
    return name not in body.missing


def _show_config(directory: Path, findings: Findings) -> Config | None:
    findings.section(str(directory / config.FILE_NAME))
    try:
        replica = config.load(directory)
    except MirrorError as error:
        if not (directory / META_NAME).exists():
            raise
        findings.damaged("contents", config.FILE_NAME, error.message)
        findings.remedy = error.remedy
        return None
    findings.add("volume", replica.name)
    findings.add("peer", f"{replica.peer}, protocol {replica.protocol}" if replica.peer else "none: it stands alone")
    return replica


def _show_superblock(directory: Path, metadata: Metadata, served: bool, findings: Findings) -> None:
    path = directory / META_NAME
    findings.section(f"{path}: superblock")
    known = metadata.copies.superblock
    for label, copy in (("first copy", metadata.first), ("second copy", metadata.second)):
        if isinstance(copy, Superblock):
            findings.add(label, f"sound, number {copy.sequence}")
        else:
            findings.damaged(label, f"the {label} of the superblock", _why(copy))
    findings.add("together", f"{metadata.copies.row.name}: {metadata.copies.row.sentence}")
    if known is None:
        assert metadata.copies.refusal is not None
        findings.add("verdict", metadata.copies.refusal.message)
        findings.remedy = metadata.copies.refusal.remedy
        return
    for label, value in _fields(known, served):
        findings.add(label, value)
    size, needed = path.stat().st_size, Geometry(known.size_bytes).metadata_bytes
    if size < needed:
        findings.damaged("file", str(path), f"it has {size} bytes instead of {needed}: it was truncated")


def _fields(known: Superblock, served: bool) -> Iterator[tuple[str, str]]:
    yield "volume", f"{known.name}, {exact_size_text(known.size_bytes)}"
    if known.next_size_bytes:
        yield "resize", f"to {exact_size_text(known.next_size_bytes)}; finished or undone when both replicas meet"
    yield "volume id", known.volume_id.hex() if any(known.volume_id) else "none yet"
    yield "replica id", known.replica_id.hex()
    yield "kind", f"{known.kind.value}: {KINDS[known.kind.value]}"
    yield "disk", known.disk.value
    yield "peer's disk", known.peer_disk.value if known.peer_disk else "not known"
    yield "met its peer", "yes" if known.met_peer else "no"
    yield "generation", f"{known.current:016x}" if known.current else "none: its contents count for nothing"
    yield "base", f"{known.base:016x}, the map holds all changes since" if known.base else "none: not moved on alone"
    yield "history", " ".join(f"{one:016x}" for one in known.history) or "none"
    yield "last run", "it is being served" if served else _last_run(known)
    yield "incarnation", f"{known.incarnation:016x}, boot {known.boot_id.hex()}"
    yield "redundancy", f"lost since {iso_time(known.redundancy_lost_at)}" if known.redundancy_lost_at else "not lost"
    if known.last_resync is not None:
        yield "last resync", ", ".join(f"{key} {value}" for key, value in known.last_resync.items())


def _last_run(known: Superblock) -> str:
    role = "primary" if known.primary else "secondary, or never run"
    if known.clean:
        return "stopped in order" if not known.primary else "stopped in order as primary, which can't be"
    return f"not stopped in order; it was {role}"


def _show_log(known: Superblock, body: Body, findings: Findings) -> None:
    findings.section("activity log")
    ours = [one for one in body.log_records if not isinstance(one, Damage) and one.epoch == known.log_epoch]
    unreadable = [position for position, one in enumerate(body.log_records) if isinstance(one, Damage)]
    former = len(body.log_records) - len(ours) - len(unreadable)
    findings.add("slots", f"{known.log_slots}, in epoch {known.log_epoch}")
    findings.add(
        "records", f"{len(ours)} of this epoch, {former} blank or of former ones, {len(unreadable)} unreadable"
    )
    if isinstance(body.log, DamagedLog):
        findings.damaged("contents", "the activity log", body.log.why)
    else:
        if body.log.torn is not None:
            findings.add(
                "torn", f"the record at position {body.log.torn}: a crash came while it was written, as it may"
            )
        hot = len(body.log.extents)
        findings.add("extents", f"{hot} named ({size_text(hot * EXTENT_BYTES)})")
    for row in body.found.rows:
        findings.add("a start finds", f"{row.name}: {row.sentence}")


def _show_map(known: Superblock, body: Body, findings: Findings) -> None:
    findings.section("dirty map")
    findings.add("pages", f"{Geometry(known.size_bytes).pages}, {len(body.damaged_pages)} damaged")
    for index, error in list(body.damaged_pages.items())[:8]:
        findings.damaged(f"page {index}", f"page {index} of the dirty map", _why(error))
    findings.add("dirty", f"{size_text(body.dirty.dirty_bytes)} missing on the peer")
    at_start = offline.dirty_at_start(known, body).dirty_bytes
    if at_start != body.dirty.dirty_bytes:
        findings.add("with the log", f"{size_text(at_start)} would be compared at the next contact")


def _show_data(path: Path, known: Superblock | None, findings: Findings) -> None:
    findings.section(str(path))
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            allocated = os.fstat(file.fileno()).st_blocks * 512
    except OSError as error:
        findings.damaged("file", str(path), f"it can't be read: {error.strerror}")
        return
    findings.add("size", f"{size_text(size)}, {size_text(allocated)} of it allocated")
    if known is None:
        return
    if size < known.size_bytes:
        findings.damaged("file", str(path), f"it has {size} bytes, the volume {known.size_bytes}: it was truncated")
        findings.remedy = "restore it, or make a new replica beside a good peer: nbdmirror create --join"
    if known.disk is DiskState.FAILED:
        findings.add("state", "Failed: the device refused something; nbdmirror invalidate, once it is mended")


def _why(error: Damage) -> str:
    return error.why if isinstance(error, DamagedRecord) else error.message
