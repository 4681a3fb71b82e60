"""volume.toml: what is written is read back, and each error names the file, the line or the key."""

from pathlib import Path

import pytest

from mirror.core.policy import Policy
from nbd_server import config
from nbd_server.config import Address, Config, ConfigError, TcpEndpoint, UnixEndpoint

WHERE = Path("DIR/volume.toml")

FULL = Config(
    name="vol.1_a-B",
    protocol="A",
    listen=Address("127.0.0.1", 7000),
    peer=Address("::1", 65535),
    backing=Path('/a "quoted"\\ path\x7f'),
    nbd=TcpEndpoint(Address("::1", 10810)),
    shared=True,
    peer_timeout_s=0.5,
    wait_for_peer_s=0.0,
    disk_timeout_s=600.0,
    resync_rate="100M",
    activity_log_extents=64,
    split_brain_no_primary=Policy.DISCARD_LEAST_CHANGES,
    split_brain_one_primary=Policy.DISCARD_SECONDARY,
)


@pytest.mark.parametrize(
    "written",
    [FULL, Config("v"), Config("v", resync_after_crash="30s"), Config("v", nbd=UnixEndpoint(Path("/run/v.sock")))],
)
def test_what_create_writes_is_read_back(written: Config) -> None:
    assert config.parse(config.render(written), WHERE) == written


def test_every_key_stands_in_the_written_file_even_where_it_has_its_default() -> None:
    text = config.render(Config("v"))
    for key in config.Config.__dataclass_fields__:
        assert any(line.startswith((f"{key} = ", f"# {key} = ")) for line in text.splitlines()), key


def test_a_default_can_be_set_by_taking_the_comment_sign_away() -> None:
    text = config.render(Config("v"))
    # One of two ways to say how large the log is, of which only one may be chosen.
    keys = tuple(f"# {key} = " for key in config.Config.__dataclass_fields__ if key != "resync_after_crash")
    bare = "\n".join(line.removeprefix("# ") if line.startswith(keys) else line for line in text.splitlines())
    read = config.parse(bare, WHERE)
    assert (read.listen, read.peer) == (Address("127.0.0.1", 7000), Address("127.0.0.1", 7001))
    assert read.peer_timeout_s == Config("v").peer_timeout_s


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["`name`", "missing"]),
        ("no toml at all", ["line 1", "not valid TOML"]),
        ('name = "v"\n\nprotocol C\n', ["line 3", "not valid TOML"]),
        ('name = "v', ["line 1", "not valid TOML"]),
        ('name = "v"\nname = "w"', ["line 2"]),
        ('nmae = "v"', ["`nmae`", "`name`"]),
        ('name = "v"\npeer_timeout = 2', ["`peer_timeout`", "`peer_timeout_s`"]),
        ('name = "v"\nquux = 2', ["`quux`", "known keys", "activity_log_extents"]),
        ('name = "v"\n[network]\nlisten = 1', ["section `network`"]),
        ("name = 1", ["`name`", "text in quotes"]),
        ('name = "a/b"', ["`name`", "letters, digits"]),
        ('name = ""', ["`name`", "letters, digits"]),
        ('name = "ä"', ["`name`", "letters, digits"]),
        (f'name = "{"n" * 64}"', ["`name`", "63", "64"]),
        ('name = "v"\nprotocol = "D"', ["`protocol`", '"D"', '"A", "B" or "C"']),
        ('name = "v"\nprotocol = 3', ["`protocol`", "text in quotes"]),
        ('name = "v"\nlisten = "tcp://127.0.0.1:1"', ["`peer`", "missing", "`listen`"]),
        ('name = "v"\npeer = "tcp://127.0.0.1:1"', ["`listen`", "missing", "`peer`"]),
        ('name = "v"\nlisten = "tcp://h:1"\npeer = "tcp://h:1"', ["same address"]),
        ('name = "v"\nbacking = "data"', ["`backing`", "absolute path"]),
        ('name = "v"\nnbd = "/run/x"', ["`nbd`", "unix:PATH or tcp:"]),
        ('name = "v"\nnbd = "unix:x"', ["`nbd`", "absolute path"]),
        ('name = "v"\nshared = "yes"', ["`shared`", "true or false"]),
        ('name = "v"\nshared = 1', ["`shared`", "true or false"]),
        ('name = "v"\npeer_timeout_s = "2"', ["`peer_timeout_s`", "number of seconds"]),
        ('name = "v"\npeer_timeout_s = true', ["`peer_timeout_s`", "number of seconds"]),
        ('name = "v"\npeer_timeout_s = 0', ["`peer_timeout_s`", "0.2 to 60"]),
        ('name = "v"\nwait_for_peer_s = -1', ["`wait_for_peer_s`", "0 to 600"]),
        ('name = "v"\ndisk_timeout_s = nan', ["`disk_timeout_s`", "nan"]),
        ('name = "v"\ndisk_timeout_s = inf', ["`disk_timeout_s`", "inf"]),
        ('name = "v"\nactivity_log_extents = 7.5', ["`activity_log_extents`", "whole number"]),
        ('name = "v"\nactivity_log_extents = 1', ["`activity_log_extents`", "64 to 8192"]),
        ('name = "v"\nresync_after_crash = 30', ["`resync_after_crash`", "text in quotes"]),
        ('name = "v"\nresync_after_crash = "30"', ["`resync_after_crash`", '"30s" or "2m"']),
        ('name = "v"\nresync_after_crash = "0s"', ["`resync_after_crash`", '"1s" to "60m"']),
        ('name = "v"\nresync_after_crash = "61m"', ["`resync_after_crash`", '"1s" to "60m"']),
        (
            'name = "v"\nresync_after_crash = "30s"\nactivity_log_extents = 64',
            ["`activity_log_extents`", "`resync_after_crash`", "take one"],
        ),
        ('name = "v"\nresync_rate = 100', ["`resync_rate`", "text in quotes"]),
        ('name = "v"\nresync_rate = "fast"', ["`resync_rate`", '"fast"', '"auto", "full"']),
        ('name = "v"\nresync_rate = "1K"', ["`resync_rate`", '"64K" or more']),
        ('name = "v"\nresync_rate = "0"', ["`resync_rate`", '"64K" or more']),
        # What once ended in a traceback.
        pytest.param("name = " + "[" * 4000, ["line 1", "brackets"], id="brackets"),
        pytest.param("name = " + "{a=" * 1300, ["line 1", "brackets"], id="braces"),
        pytest.param("name." + ".".join("a" * 2000) + " = 1", ["`name`", "text"], id="dots"),
        pytest.param("name = " + "1" * 4180, ["name"], id="digits"),
        pytest.param('name = "v"\npeer_timeout_s = ' + "1" * 4000, ["`peer_timeout_s`", "0.2 to 60"], id="seconds"),
        pytest.param('name = "v"\ndisk_timeout_s = 0x' + "f" * 4000, ["`disk_timeout_s`", "1 to 600"], id="hex"),
        pytest.param("name." + "a." * 30_000 + "a = 1", ["line 1", "4200"], id="a line of dots"),
        ('name = "v"\nnbd = "unix:/run/\\u0000x"', ["`nbd`", "absolute path"]),
        # Python's socket module raises UnicodeError for such a host.
        (f'name = "v"\nlisten = "tcp://{"a" * 64}:1"', ["`listen`", "host name"]),
        (f'name = "v"\nlisten = "tcp://{"a." * 150}a:1"', ["`listen`", "host name"]),
        ('name = "v"\nsplit_brain_no_primary = 1', ["`split_brain_no_primary`", "text in quotes"]),
        ('name = "v"\nsplit_brain_no_primary = "discard-secondary"', ["`split_brain_no_primary`", "least-changes"]),
        ('name = "v"\nsplit_brain_one_primary = "discard-least-changes"', ["`split_brain_one_primary`", "secondary"]),
        ('name = "v"\nsplit_brain_two_primaries = "discard-secondary"', ["`split_brain_two_primaries`", '"refuse"']),
        ('name = "v"\nsplit_brain = "refuse"', ["`split_brain`", "`split_brain_no_primary`"]),
    ],
)
def test_an_error_names_the_file_the_place_and_what_is_wrong(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, WHERE)
    message = str(caught.value)
    assert str(WHERE) in message
    assert [word for word in words if word not in message] == [], message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://127.0.0.1:7000", ("127.0.0.1", 7000)),
        ("tcp://[::1]:1", ("::1", 1)),
        ("tcp://localhost:65535", ("localhost", 65535)),
        ("tcp://node-1.example.com:80", ("node-1.example.com", 80)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    parsed = config.parse_address(text)
    assert parsed == address
    assert str(parsed) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp://",
        "127.0.0.1:7000",
        "udp://127.0.0.1:7000",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:99999999999999999999",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:7x",
        "tcp://127.0.0.1:٣",
        "tcp://127.0.0.256:7000",
        "tcp://1.2.3:7000",
        "tcp://:7000",
        "tcp://::1:7000",
        "tcp://[::1:7000",
        "tcp://[::1]7000",
        "tcp://[node]:7000",
        "tcp://no de:7000",
        "tcp://node/:7000",
        "tcp://-node:7000",
    ],
)
def test_what_is_no_address_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        config.parse_address(text)


def test_endpoints_and_their_uris() -> None:
    unix = config.parse_endpoint("unix:/run/a b/v.sock")
    assert unix == UnixEndpoint(Path("/run/a b/v.sock"))
    assert unix.uri("v") == "nbd+unix:///v?socket=/run/a%20b/v.sock"
    tcp = config.parse_endpoint("tcp:[::1]:1234")
    assert tcp == TcpEndpoint(Address("::1", 1234))
    assert tcp.uri("v") == "nbd://[::1]:1234/v"
    assert config.parse_endpoint("tcp:127.0.0.1") == TcpEndpoint(Address("127.0.0.1", 10809))
    assert [str(endpoint) for endpoint in (unix, tcp)] == ["unix:/run/a b/v.sock", "tcp:[::1]:1234"]


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("auto", (None, True)),
        ("full", (None, False)),
        ("100M", (100 << 20, True)),
        ("1GiB", (1 << 30, True)),
        ("65536", (65536, True)),
    ],
)
def test_rates_of_a_resync(text: str, rate: tuple[int | None, bool]) -> None:
    assert config.parse_rate(text) == rate
    assert config.parse(f'name = "v"\nresync_rate = "{text}"', WHERE).rate == rate


def test_the_size_of_the_log_is_fixed_or_by_a_goal() -> None:
    assert (Config("v").log_slots, Config("v").resync_after_crash_s) == (1024, None)
    by_goal = config.parse('name = "v"\nresync_after_crash = "2m"', WHERE)
    assert (by_goal.log_slots, by_goal.resync_after_crash_s) == (None, 120.0)
    assert config.parse('name = "v"\nresync_after_crash = "1h"', WHERE).resync_after_crash_s == 3600.0


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("fe80::1", False),
        ("node.example.com", False),
        ("localhost.example.com", False),
    ],
)
def test_what_counts_as_loopback(host: str, loopback: bool) -> None:
    assert config.is_loopback(Address(host, 1)) is loopback


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        config.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="is not a replica"):
        config.load(tmp_path)
    (tmp_path / "meta").touch()
    with pytest.raises(ConfigError, match=r"metadata but no volume\.toml"):
        config.load(tmp_path)
    file = tmp_path / "volume.toml"
    file.touch()
    with pytest.raises(ConfigError, match="not a directory"):
        config.load(file)
    file.write_bytes(b'name = "v"\n# caf\xe9\n')
    with pytest.raises(ConfigError, match="line 2: byte 0xe9"):
        config.load(tmp_path)
    file.write_bytes(b"#" * 100_000)
    with pytest.raises(ConfigError, match="larger than 16 KiB"):
        config.load(tmp_path)
    file.write_text(config.render(FULL))
    assert config.load(tmp_path) == FULL
