"""Where the processor goes: perf's samples by group, what people read of them, and what is in the repository."""

import xml.etree.ElementTree
from collections import Counter

import pytest

from bench import processor, report
from bench.figures import Record, Round
from bench.processor import KERNEL, NBDKIT, OTHER, PROGRAMS, PYTHON, REST, WAKING
from bench.works import FILE, WRITE_DEEP

KERNEL_NAME = "[kernel.kallsyms]"
LIBPYTHON = "/usr/lib/libpython3.11.so.1.0"
SAID = f"""\
   6764\x20
\t          1bb784 [unknown] ({LIBPYTHON})
\t    7f804b630660 [unknown] ([unknown])

   6719\x20
\tffffffff81b6a330 _copy_to_iter ({KERNEL_NAME})
\tffffffff8158f0c7 tcp_recvmsg ({KERNEL_NAME})
\t           f6417 recv (/usr/lib/libc.so.6)

   6764\x20
\t            1234 std::f(int) (.part.0) (/srv/a place/nbdkit)
"""


def stack(*functions: str) -> list[processor.Frame]:
    """In the kernel, innermost first, called from libc."""
    return [
        *(processor.Frame(function, KERNEL_NAME) for function in functions),
        processor.Frame("pwrite", "/usr/lib/libc.so.6"),
    ]


def test_samples_are_counted_by_process_and_group() -> None:
    assert processor.count(SAID.splitlines()) == {
        6764: {PYTHON: 1, NBDKIT: 1},
        6719: {processor.COPYING: 1},
    }


def test_nothing_said_is_nothing_counted() -> None:
    assert processor.count([]) == {}


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (LIBPYTHON, PYTHON),
        ("/x/compiled/nbdmirror__mypyc.cpython-311-x86_64-linux-gnu.so", processor.COMPILED),
        ("/x/crc32c/_crc32c.cpython-311-x86_64-linux-gnu.so", processor.CHECKSUMS),
        ("/x/sbin/nbdkit", NBDKIT),
        ("/x/plugins/nbdkit-python-plugin.so", NBDKIT),
        ("/usr/lib/libc.so.6", processor.C_LIBRARY),
        ("[vdso]", processor.C_LIBRARY),
        ("/usr/lib/libcrypto.so.3", OTHER),
        ("[unknown]", OTHER),
    ],
)
def test_outside_the_kernel_the_program_decides(program: str, expected: str) -> None:
    # What called it does not.
    assert processor.group_of([processor.Frame("f", program), processor.Frame("g", LIBPYTHON)]) == expected


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        # Who wakes by sending wakes; who waits for a lock of the file waits.
        (["_raw_spin_unlock_irqrestore", "try_to_wake_up", "__wake_up_sync_key", "unix_stream_sendmsg"], WAKING),
        (["_raw_spin_unlock_irqrestore", "sock_def_readable", "tcp_data_queue", "tcp_v4_rcv"], WAKING),
        (["irqentry_exit_to_user_mode", "asm_sysvec_reschedule_ipi"], WAKING),
        (["rwsem_spin_on_owner", "rwsem_down_write_slowpath", "ext4_buffered_write_iter"], WAKING),
        (["finish_task_switch.isra.0", "__schedule", "futex_wait"], WAKING),
        (["copy_folio_from_iter_atomic", "generic_perform_write", "ext4_buffered_write_iter"], processor.COPYING),
        (["_copy_from_iter", "tcp_sendmsg_locked"], processor.COPYING),
        (["kfree", "unix_stream_read_generic", "sock_read_iter"], processor.CLIENT),
        (["skb_release_data", "tcp_ack", "net_rx_action", "handle_softirqs"], processor.NETWORK),
        (["ext4_block_write_begin", "ext4_da_write_begin", "vfs_write"], processor.ON_FILE),
        (["do_syscall_64"], REST),
        # A kernel whose symbols may not be read.
        (["[unknown]"], REST),
        # A packet for somebody else that came in while it copied.
        (["kfree", "net_rx_action", "asm_sysvec_call_function", "_copy_to_iter"], processor.NETWORK),
        (["rcu_core", "asm_sysvec_apic_timer_interrupt", "_copy_to_iter"], REST),
    ],
)
def test_in_the_kernel_the_first_rule_that_fits_decides(functions: list[str], expected: str) -> None:
    assert processor.group_of(stack(*functions)) == expected


def test_a_part_of_the_kernel_that_was_called_counts_and_not_who_called_the_kernel() -> None:
    assert processor.group_of([*stack("do_syscall_64"), processor.Frame("tcp_sendmsg", LIBPYTHON)]) == REST


def test_every_group_has_a_rule_and_a_colour() -> None:
    assert (*PROGRAMS, *KERNEL, REST, OTHER) == processor.GROUPS
    assert set(processor.COLOURS) == set(processor.GROUPS)


def test_the_processor_is_divided_by_samples() -> None:
    values = processor.values_of(Counter({PYTHON: 3, REST: 1}), 40.0)
    assert (values[f"{PYTHON}_us"], values[f"{REST}_us"], values[f"{OTHER}_us"]) == (30, 10, 0)
    assert sum(values.values()) == 40
    assert sum(processor.values_of(Counter(), 40.0).values()) == 0


def record() -> Record:
    made = Record({"cores": 2})
    for server, each_us in ((FILE, (10.0, 30.0, 20.0)), ("primary", (50.0,)), ("secondary", (0.1,))):
        shares = [processor.values_of(Counter({PYTHON: 1}), us) for us in each_us]
        rounds = [Round({**values, "operations_per_s": 1e4}) for values in shares]
        made.add(WRITE_DEEP, server, rounds)
    return made


def test_a_table_has_medians_of_what_is_worth_a_row() -> None:
    [table] = processor.tables(record())
    assert f"| µs of processor a write | {FILE} | primary | secondary |" in table
    assert "| Python | 20.0 | 50.0 | 0.1 |" in table
    assert "| together | 20.0 | 50.0 | 0.1 |" in table
    assert "| cores at work meanwhile | 0.20 | 0.50 | 0.00 |" in table
    assert OTHER not in table
    assert processor.tables(Record()) == []


def test_a_picture_is_well_formed_and_names_its_bars_and_groups() -> None:
    picture = processor.picture(record())
    assert picture is not None
    xml.etree.ElementTree.fromstring(picture)
    for name in (FILE, "primary", "secondary", *(group.replace("'", "&#x27;") for group in processor.GROUPS)):
        assert f">{name}<" in picture
    assert processor.picture(Record()) is None


def test_the_page_has_it_only_where_it_was_measured() -> None:
    text = f"{report.BEGIN}\n{report.END}"
    assert "### Where the processor goes" in report.page(text, Record(), Record(), Record(), record())
    assert "### Where the processor goes" not in report.page(text, Record(), Record(), Record(), Record())


def test_the_picture_is_of_what_was_measured() -> None:
    assert report.PROFILE.with_suffix(".svg").read_text() == processor.picture(report.load(report.PROFILE)), (
        "make report"
    )
