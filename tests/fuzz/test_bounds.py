"""The worst that can be made by hand for whoever reads JSON and TOML: within the bounds that the documents state."""

import itertools
import string
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mirror.core import wire
from mirror.core.errors import MirrorError
from mirror.core.limits import CONTROL_BYTES_MAX, MIB
from nbd_server import config
from tests.fuzz.targets import CONFIG_BYTES
from tests.golden import by_docs

PATH = Path("volume.toml")
# What docs/protocol.md says JSON may take.
JSON_TIMES = 48


def taken(read: Callable[[], object]) -> int:
    """The most memory that a reader had at a time, whether it refused or not."""
    tracemalloc.start()
    try:
        try:
            read()
        except MirrorError:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def names() -> Iterator[str]:
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_lowercase, repeat=length))


def filled(row: str) -> str:
    """As many such rows, each with a name of its own, as a file may hold."""
    found, size = [], 0
    for name in names():
        size += len(row.format(name=name))
        if size > config.FILE_BYTES_MAX:
            return "".join(found)
        found.append(row.format(name=name))
    raise AssertionError("names() ends")


DOTTED = "a." * ((config.LINE_CHARACTERS_MAX - 10) // 2)

TOML = {
    "one long dotted key": "name." + "a." * 8_000 + "a = 1",
    "a dotted key as long as a line": f"{DOTTED}a = 1",
    "dotted keys as long as a line": "".join(f"{name}.{DOTTED}a = 1\n" for name in itertools.islice(names(), 3)),
    "tables in tables": filled("[{name}.a.b]\n"),
    "tables": filled("[{name}]\n"),
    "dotted keys": filled("{name}.a.b = 1\n"),
    "lists": "name = [\n" + "[],[],[],[],[],[],[],[],[],[],\n" * 500 + "]",
    "inline tables": "name = [\n" + "{a.b.c.d.e=1},\n" * 1000 + "]",
}


@pytest.mark.parametrize("text", TOML.values(), ids=TOML)
def test_a_volume_toml_made_to_be_dear(text: str) -> None:
    assert len(text) <= config.FILE_BYTES_MAX
    assert taken(lambda: config.parse(text, PATH)) < CONFIG_BYTES


JSON = {
    "lists": b"[],",
    "tables": b"{},",
    "tables of one": b'{"":0},',
    "lists of one": b"[0],",
    "lists in lists": b"[" * 9 + b"]" * 9 + b",",
    "lists in lists in lists": b"[" * 900 + b"]" * 900 + b",",
    "tables in tables": b'{"":' * 90 + b"0" + b"}" * 90 + b",",
    "numbers": b"1e9,",
    "texts": b'"a",',
}


@pytest.mark.parametrize("piece", JSON.values(), ids=JSON)
def test_json_made_to_be_dear(piece: bytes) -> None:
    raw = b'{"map": [' + piece * (MIB // 4 // len(piece)) + b"0]}"
    assert taken(lambda: wire.decode_object(raw, "a message")) < JSON_TIMES * len(raw)


def test_more_json_than_a_message_may_hold_is_refused_unread() -> None:
    raw = b"[" * (CONTROL_BYTES_MAX + 1)
    assert taken(lambda: wire.decode_object(raw, "a message")) < 10_000


def test_the_documents_state_these_bounds() -> None:
    assert f"{JSON_TIMES} times as much memory" in by_docs.section("protocol.md", "Bounds")
    assert f"volume.toml {CONFIG_BYTES // MIB} MiB" in by_docs.section("format.md", "Bounds")
