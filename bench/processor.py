"""Where the servers' processor time goes: samples of perf divided into a few groups, a table and a picture of them.

A sample is a stack. In the kernel the group is that of the first rule which one of its functions fits, so that what a
socket does to wake somebody counts as waking; outside the kernel it is that of the library or program it is in.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from statistics import median
from typing import NamedTuple

from bench.figures import Record
from bench.works import FILE, LARGE, WRITE, WRITE_DEEP

PYTHON, COMPILED, CHECKSUMS, NBDKIT, C_LIBRARY = "Python", "nbdmirror, compiled", "checksums", "nbdkit", "C library"
WAKING, COPYING, CLIENT, NETWORK, ON_FILE, REST = (
    f"kernel: {part}" for part in ("waking, waiting", "copying", "client's socket", "network", "file", "rest")
)
OTHER = "other"

# How the name of a file begins that a sample is in, and whose time that is.
PROGRAMS: Mapping[str, tuple[str, ...]] = {
    PYTHON: ("libpython", "python", "_ctypes.", "libffi"),
    COMPILED: ("nbdmirror__mypyc",),
    CHECKSUMS: ("_crc32c",),
    NBDKIT: ("nbdkit",),
    C_LIBRARY: ("libc.", "libc-", "libpthread", "ld-linux", "[vdso]"),
}
# How a function of the kernel begins that is in the stack, and what it is for; the first that fits.
KERNEL: Mapping[str, tuple[str, ...]] = {
    WAKING: (
        *("schedule", "__schedule", "finish_task_switch", "try_to_wake_up", "__wake_up", "wake_up_"),
        # They end in a jump to what wakes; an interrupt to give way to another.
        *("sock_def_readable", "sock_def_write_space", "unix_write_space", "asm_sysvec_reschedule"),
        *("futex_", "do_futex", "__x64_sys_futex", "__x64_sys_sched_yield", "do_sched_yield", "rwsem_"),
    ),
    COPYING: (
        *("_copy_to_iter", "_copy_from_iter", "copy_folio_from_iter", "copy_page_from_iter", "copy_page_to_iter"),
        *("rep_movs", "memcpy"),
    ),
    CLIENT: ("unix_",),
    # Lending pages to the socket (vmsplice, splice) is sending too.
    NETWORK: ("tcp_", "__tcp_", "inet_", "ip_", "net_rx_", "splice_", "__do_splice", "vmsplice", "__do_sys_vmsplice"),
    ON_FILE: (
        *("ext4_", "xfs_", "btrfs_", "jbd2_", "generic_perform_write", "filemap_", "block_", "blk_", "folio_"),
        *("__x64_sys_pread", "__x64_sys_pwrite", "do_preadv", "do_pwritev", "do_sync_file_range"),
    ),
}
GROUPS = (*PROGRAMS, *KERNEL, REST, OTHER)
# What is below it in a stack was interrupted, and has nothing to do with it.
INTERRUPTS = ("asm_sysvec_", "asm_common_interrupt")

# The unmirrored one, and the two of a mirrored volume.
SERVERS = (FILE, "primary", "secondary")
ASLEEP = f"{WRITE}, nobody spinning"
HEADINGS: Mapping[str, str] = {
    WRITE_DEEP: "16 writes of 4 KiB at a time",
    LARGE: "1 MiB writes, 4 at a time",
    ASLEEP: "one write of 4 KiB at a time, nobody spinning",
}

# Less is a few samples.
LEAST_US = 0.5
_FRAME = re.compile(r"\s+[0-9a-f]+ (.+) \((.+)\)")


class Frame(NamedTuple):
    function: str
    # With its path; in brackets for the kernel and its modules.
    program: str

    @property
    def is_kernel(self) -> bool:
        return self.program.startswith("[") and self.program not in ("[vdso]", "[unknown]")


def stacks(lines: Iterable[str]) -> Iterator[tuple[int, list[Frame]]]:
    """The process id and the stack, innermost first, of each sample that `perf script -F pid,ip,sym,dso` printed."""
    pid, frames = 0, list[Frame]()
    for line in lines:
        found = _FRAME.fullmatch(line.rstrip())
        if found is not None:
            frames.append(Frame(*found.groups()))
        elif line.strip():
            pid, frames = int(line.split()[0]), []
        elif frames:
            yield pid, frames
            frames = []
    if frames:
        yield pid, frames


def group_of(frames: list[Frame]) -> str:
    """One of GROUPS."""
    innermost = frames[0]
    if not innermost.is_kernel:
        name = innermost.program.rpartition("/")[2]
        return next((group for group, begins in PROGRAMS.items() if name.startswith(begins)), OTHER)
    functions = []
    for frame in frames:
        if not frame.is_kernel:
            break
        functions.append(frame.function)
        if frame.function.startswith(INTERRUPTS):
            break
    for group, begins in KERNEL.items():
        if any(function.startswith(begins) for function in functions):
            return group
    return REST


def count(lines: Iterable[str]) -> dict[int, Counter[str]]:
    """Samples by process id and group."""
    found: dict[int, Counter[str]] = {}
    for pid, frames in stacks(lines):
        found.setdefault(pid, Counter())[group_of(frames)] += 1
    return found


def values_of(samples: Counter[str], processor_us: float) -> dict[str, float]:
    """What a write takes of a server's processor, divided by its samples: `GROUP_us` for each group."""
    of_all = max(samples.total(), 1)
    return {f"{group}_us": processor_us * samples[group] / of_all for group in GROUPS}


# -- what people read


def medians_us(record: Record, work: str) -> dict[str, dict[str, float]]:
    """By server and group, over the rounds."""
    rounds = record.rounds.get(work, {})
    return {
        server: {group: median(one[f"{group}_us"] for one in rounds[server]) for group in GROUPS}
        for server in SERVERS
        if rounds.get(server)
    }


def cores_at_work(record: Record, work: str, server: str) -> float:
    """How many cores the server kept busy, the median of the rounds."""
    rounds = record.rounds[work][server]
    return median(one["operations_per_s"] * sum(one[f"{group}_us"] for group in GROUPS) / 1e6 for one in rounds)


def tables(record: Record) -> list[str]:
    """Markdown, a table for each work; groups that nobody spends LEAST_US in are left out."""
    made = []
    for work, heading in HEADINGS.items():
        found = medians_us(record, work)
        if not found:
            continue
        rows = {group: [groups[group] for groups in found.values()] for group in GROUPS}
        rows = {group: values_us for group, values_us in rows.items() if max(values_us) >= LEAST_US}
        rows["together"] = [sum(groups.values()) for groups in found.values()]
        lines = [f"| {name} | {' | '.join(f'{us:.1f}' for us in values_us)} |" for name, values_us in rows.items()]
        head = [f"| µs of processor a write | {' | '.join(found)} |", "| --- |" + " ---: |" * len(found)]
        cores = [cores_at_work(record, work, server) for server in found]
        lines.append(f"| cores at work meanwhile | {' | '.join(f'{count:.2f}' for count in cores)} |")
        made.append("\n".join([f"**{heading}**", "", *head, *lines]))
    return made


WIDTH, LEFT, RIGHT, BAR, GAP, HEAD = 760, 100, 60, 26, 6, 34
LEGEND_COLUMNS, LEGEND_ROW = 4, 20
COLOURS = {
    PYTHON: "#2e6fd9",
    COMPILED: "#8fb8f5",
    CHECKSUMS: "#8d5fa8",
    NBDKIT: "#222222",
    C_LIBRARY: "#999999",
    WAKING: "#d1495b",
    COPYING: "#edae49",
    CLIENT: "#f6d9a0",
    NETWORK: "#00798c",
    ON_FILE: "#66a182",
    REST: "#cfe3d6",
    OTHER: "#dddddd",
}
# Narrower than this a part has no room for its number.
NUMBER_WIDTH = 30


def picture(record: Record) -> str | None:
    """A bar for each server, of what it spends where; each work in a scale of its own."""
    parts: list[str] = []
    y = 4
    for work, heading in HEADINGS.items():
        found = medians_us(record, work)
        if not found:
            continue
        y += HEAD
        parts.append(f'<text x="10" y="{y - 10}" font-size="15">{escape(heading)}: µs of processor a write</text>')
        longest_us = max(sum(groups.values()) for groups in found.values()) or 1.0
        for server, groups in found.items():
            parts += _bar(server, groups, (WIDTH - LEFT - RIGHT) / longest_us, y)
            y += BAR + GAP
    if not parts:
        return None
    y += GAP
    for number, group in enumerate(GROUPS):
        row, column = divmod(number, LEGEND_COLUMNS)
        x, top = 10 + column * (WIDTH - 10) // LEGEND_COLUMNS, y + row * LEGEND_ROW
        parts.append(f'<rect x="{x}" y="{top}" width="14" height="14" fill="{COLOURS[group]}"/>')
        parts.append(f'<text x="{x + 20}" y="{top + 12}">{escape(group)}</text>')
    height = y + -(-len(GROUPS) // LEGEND_COLUMNS) * LEGEND_ROW + 6
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<g font-family="sans-serif" font-size="12" fill="#222222">',
    ]
    return "\n".join([*head, *parts, "</g></svg>"]) + "\n"


def _bar(server: str, groups: Mapping[str, float], us_width: float, y: int) -> list[str]:
    parts = [f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(server)}</text>']
    x = float(LEFT)
    for group, us in groups.items():
        wide = us * us_width
        size = f'width="{wide:.1f}" height="{BAR}"'
        parts.append(f'<rect x="{x:.1f}" y="{y}" {size} fill="{COLOURS[group]}"/>')
        if wide >= NUMBER_WIDTH:
            dark = group in (PYTHON, CHECKSUMS, NBDKIT, WAKING, NETWORK)
            colour = ' fill="white"' if dark else ""
            parts.append(f'<text x="{x + wide / 2:.1f}" y="{y + 17}" text-anchor="middle"{colour}>{us:.1f}</text>')
        x += wide
    parts.append(f'<text x="{x + 6:.1f}" y="{y + 17}">{sum(groups.values()):.0f}</text>')
    return parts
