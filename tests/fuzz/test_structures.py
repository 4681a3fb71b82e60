"""Made-up structures through the decoders (hypothesis): any JSON, any TOML value, any sealed records, any bytes.

The examples are the same in every run; `make test-long` takes more of them. tests/unit has the round trips.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirror import handshake
from mirror.core import wire
from mirror.core.activity_log import ActivityLog, DamagedLog
from mirror.core.errors import MirrorError, ProtocolError
from mirror.core.layout import LogRecord, blank_log_record, encode_log_record, ring_position
from mirror.core.limits import HEADER_BYTES, LOG_RING_RECORDS
from mirror.core.policy import ALLOWED
from mirror.core.wire import MessageType
from nbd_server import config
from tests.fuzz import corpus
from tests.fuzz.targets import check_connection, check_control, check_hello, check_line

PATH = Path("volume.toml")

examples = pytest.mark.parametrize("count", [50, pytest.param(5000, marks=pytest.mark.long)])


def search(count: int, test: Any) -> None:
    """Run a hypothesis test with so many examples, the same ones every time."""
    settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )(test)()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**65) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@examples
def test_any_value_in_any_place_of_a_hello(count: int) -> None:
    told = json.loads(corpus.json_messages("HELLO")[0])
    places = [(key,) for key in told] + [("standing", key) for key in told["standing"]]

    @given(st.sampled_from(places), json_values)
    def test(place: tuple[str, ...], other: Any) -> None:
        changed = json.loads(json.dumps(told))
        where = changed
        for key in place[:-1]:
            where = where[key]
        where[place[-1]] = other
        check_hello(json.dumps(changed).encode())

    search(count, test)


KEYS = (
    "op", "role", "disk", "done_bytes", "total_bytes", "bytes_per_s", "eta_s", "current", "history", "result",
    "generation", "resync_generation", "map", "request", "answer", "reason",
)  # fmt: skip


@examples
def test_any_control_message(count: int) -> None:
    @given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=6))
    def test(message: dict[str, Any]) -> None:
        check_control(json.dumps(message).encode())

    search(count, test)


@examples
def test_any_line_on_the_control_socket(count: int) -> None:
    @given(st.dictionaries(st.sampled_from(("command", "force", "discard_my_data")), json_values) | json_values)
    def test(request: Any) -> None:
        check_line(json.dumps(request).encode() + b"\n")

    search(count, test)


toml_values = st.one_of(
    st.text(max_size=30).map(json.dumps),
    st.integers(-(10**30), 10**30).map(str),
    st.floats().map(str),
    st.sampled_from(("true", "false", "1979-05-27T07:32:00Z", "[]", "{}", "[[]]", "{a = 1}", "''", "0x" + "f" * 500)),
    st.text(max_size=30),
)


@examples
def test_any_value_of_any_key_of_volume_toml(count: int) -> None:
    @given(st.dictionaries(st.sampled_from(list(config._SETTINGS)) | st.text(max_size=10), toml_values, max_size=4))
    def test(table: dict[str, str]) -> None:
        text = "\n".join(
            ["name = 'vol'"] * ("name" not in table) + [f"{key} = {value}" for key, value in table.items()]
        )
        try:
            found = config.parse(text, PATH)
        except config.ConfigError as error:
            assert str(PATH) in str(error)  # noqa: PT017  what is no error is looked at below
        else:
            assert config.parse(config.render(found), PATH) == found

    search(count, test)


@examples
def test_any_bytes_behind_a_greeting(count: int) -> None:
    ready = wire.ready_command(b"DEALER")

    @given(st.sampled_from((b"", wire.greeting(), wire.greeting() + ready)), st.binary(max_size=300))
    def test(start: bytes, raw: bytes) -> None:
        check_connection(start + raw)

    search(count, test)


@examples
def test_any_frame_in_any_form(count: int) -> None:
    """Long and short prefixes, commands and messages, with lengths that fit and that don't."""

    @given(st.lists(st.tuples(st.sampled_from((0, 1, 2, 4, 6)), st.integers(0, 2**64 - 1), st.binary(max_size=80))))
    def test(frames: list[tuple[int, int, bytes]]) -> None:
        raw = wire.greeting() + wire.ready_command(b"DEALER")
        for flags, number, body in frames:
            length = len(body) if number % 3 else number
            raw += bytes((flags,)) + (length.to_bytes(8, "big") if flags & 2 else bytes((length % 256,))) + body
        check_connection(raw)

    search(count, test)


@examples
def test_any_header_under_a_right_checksum(count: int) -> None:
    @given(st.integers(0, 255), st.integers(0, 255), st.binary(min_size=HEADER_BYTES - 8, max_size=HEADER_BYTES - 8))
    def test(version: int, kind: int, rest: bytes) -> None:
        fields = b"nb" + bytes((version, kind)) + rest
        raw = fields + wire.crc32c(fields).to_bytes(4, "little")
        known = version == wire.VERSION and kind in {int(one) for one in MessageType}
        try:
            header = wire.decode_header(raw)
        except ProtocolError:
            assert not known
        else:
            assert known
            assert wire.encode_message(*header)[-HEADER_BYTES:] == raw if header.payload_length < 2**26 else True

    search(count, test)


def log_records() -> st.SearchStrategy[LogRecord]:
    extents = st.none() | st.integers(0, 40)
    return st.builds(
        lambda epoch, sequence, slots, changes, start, run: LogRecord(
            epoch,
            sequence,
            slots,
            tuple((slot, extent) for slot, extent in changes.items() if slot < slots),
            tuple((slot, extent) for slot, extent in enumerate(run, start) if slot < slots),
        ),
        st.integers(0, 4),
        st.integers(0, 140),
        st.sampled_from((1, 64, 400)),
        st.dictionaries(st.integers(0, 399), extents, max_size=5),
        st.integers(0, 63),
        st.lists(extents, max_size=5),
    )


@examples
def test_any_sealed_records_in_a_ring(count: int) -> None:
    @given(st.lists(log_records(), max_size=80), st.booleans())
    def test(records: list[LogRecord], in_place: bool) -> None:
        ring = [blank_log_record()] * LOG_RING_RECORDS
        for at, record in enumerate(records):
            ring[ring_position(record.sequence if in_place else at)] = encode_log_record(record)
        found = ActivityLog.rebuild(ring, 3)
        if isinstance(found, DamagedLog):
            assert found.why
            return
        # Whatever is believed, what the newest record granted is in it.
        ours = [one for one in records if one.epoch == 3 and encode_log_record(one) in ring]
        newest = max(ours, key=lambda one: one.sequence, default=None)
        if newest is not None:
            assert {extent for _, extent in newest.changes if extent is not None} <= found.extents

    search(count, test)


@examples
def test_any_two_replicas_decide_or_refuse(count: int) -> None:
    """Whatever standings two sides have, as far as they can be read: a decision, never an exception."""
    told = json.loads(corpus.json_messages("HELLO")[0])["standing"]
    numbers = st.integers(0, 3)
    standings = st.fixed_dictionaries(
        {
            "replica_id": st.sampled_from(("01" * 16, "02" * 16)),
            "volume_id": st.sampled_from(("00" * 16, "01" * 16, "03" * 16)),
            "name": st.sampled_from(("vol", "other")),
            "kind": st.sampled_from([kind.value for kind in handshake.Kind]),
            "role": st.sampled_from([role.value for role in handshake.Role]),
            "disk": st.sampled_from([disk.value for disk in handshake.DiskState]),
            "current": numbers,
            "base": numbers,
            "history": st.lists(st.integers(1, 3), max_size=3),
            "policies": st.fixed_dictionaries(
                {name: st.sampled_from([policy.value for policy in chosen]) for name, chosen in ALLOWED.items()}
            ),
            **{key: st.booleans() for key, value in told.items() if isinstance(value, bool)},
        }
    )

    @given(standings, standings)
    def test(one: dict[str, Any], other: dict[str, Any]) -> None:
        mine, theirs = (handshake.decode_standing({**told, **standing}) for standing in (one, other))
        try:
            here, there = handshake.generation.decide(mine, theirs), handshake.generation.decide(theirs, mine)
        except MirrorError as error:
            pytest.fail(str(error))
        assert here.rule == there.rule
        assert here.action is handshake.generation.mirror(there.action)

    search(count, test)
