"""volume.toml: what a person may choose about a replica, read into a checked dataclass.

Every error names the file, the line or the key, what is wrong with it and what to write instead; an unknown key is an
error too, because a misspelt one would otherwise be silently without effect. What must never be edited (identifiers,
generations, states) is in the metadata file and not here.

One table, `_SETTINGS`, holds every key with its check; reading and the list of known keys come from it, so that they
can't differ. A schema library lost: it brings a dependency for a dozen keys, and its messages name its own terms.
"""

import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from mirror.core.errors import OperatorError
from mirror.core.limits import (
    KIB,
    LOG_SLOTS_DEFAULT,
    LOG_SLOTS_MAX,
    LOG_SLOTS_MIN,
    NAME_MAX_CHARACTERS,
    SPIN_US_MAX,
)
from mirror.core.policy import ALLOWED, Policies, Policy
from mirror.core.throttle import AUTO, FULL, Rate

FILE_NAME = "volume.toml"
SOCKET_NAME = "nbd.sock"
# Stands in a directory while `create` fills it.
INTERRUPTED_NAME = "create.unfinished"
PROTOCOLS = ("A", "B", "C")
NBD_DEFAULT_PORT = 10809

# Nobody writes more than a few lines; a larger file is another file by mistake.
FILE_BYTES_MAX = 16 * 1024
# The longest line holds a path (PATH_MAX is 4096). Python's TOML reader takes memory by the square of a dotted key's
# length: 4 GiB for one of 64 KiB.
LINE_CHARACTERS_MAX = 4200
# A wrong value is repeated in the message as far as this.
SHOWN_CHARACTERS_MAX = 200
# What the domain name system takes (RFC 1035); Python raises UnicodeError, no OSError, for a longer label.
HOST_CHARACTERS_MAX = 253
LABEL_MAX = 63

_NAME = re.compile(r"[A-Za-z0-9._-]+")
# The words of `resync_rate`; anything else is a number of bytes a second.
_RATES = {"auto": AUTO, "full": FULL}
_BYTES = re.compile(r"([0-9]{1,15})([KMG]?)(?:i?B)?")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_DURATION = re.compile(r"([0-9]{1,6})(s|m|h)")
RESYNC_AFTER_CRASH_S_MAX = 3600
# Slower than this a resync of any size is as good as none.
RESYNC_BYTES_PER_S_MIN = 64 * KIB

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*\.?")

Protocol = Literal["A", "B", "C"]


class ConfigError(OperatorError):
    """volume.toml can't be used."""


class Address(NamedTuple):
    """A TCP address as `socket` takes it; an IPv6 host is without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://{host_in_brackets(self.host)}:{self.port}"


@dataclass(frozen=True)
class UnixEndpoint:
    """Where NBD clients come in: a unix socket."""

    path: Path

    def uri(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={quote(str(self.path))}"

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TcpEndpoint:
    """Where NBD clients come in: a TCP port."""

    address: Address

    def uri(self, name: str) -> str:
        host, port = self.address
        return f"nbd://{host_in_brackets(host)}:{port}/{name}"

    def __str__(self) -> str:
        return f"tcp:{host_in_brackets(self.address.host)}:{self.address.port}"


Endpoint = UnixEndpoint | TcpEndpoint


@dataclass(frozen=True)
class Config:
    """What volume.toml says. `listen` and `peer` are both there or both None (a volume that stands alone)."""

    name: str
    protocol: Protocol = "C"
    listen: Address | None = None
    peer: Address | None = None
    backing: Path | None = None
    nbd: Endpoint | None = None
    shared: bool = False
    peer_timeout_s: float = 2.0
    wait_for_peer_s: float = 3.0
    disk_timeout_s: float = 30.0
    spin: str | int = "auto"
    cores: str = "auto"
    resync_rate: str = "auto"
    activity_log_extents: int = LOG_SLOTS_DEFAULT
    resync_after_crash: str | None = None
    split_brain_no_primary: Policy = Policy.REFUSE
    split_brain_one_primary: Policy = Policy.REFUSE
    split_brain_two_primaries: Policy = Policy.REFUSE

    @property
    def policies(self) -> Policies:
        return Policies(self.split_brain_no_primary, self.split_brain_one_primary, self.split_brain_two_primaries)

    @property
    def rate(self) -> Rate:
        """What `resync_rate` means."""
        return parse_rate(self.resync_rate)

    @property
    def log_slots(self) -> int | None:
        """The fixed size of the activity log; None: by `resync_after_crash`."""
        return self.activity_log_extents if self.resync_after_crash is None else None

    @property
    def resync_after_crash_s(self) -> float | None:
        return None if self.resync_after_crash is None else parse_duration_s(self.resync_after_crash)

    def data_path(self, directory: Path) -> Path:
        return self.backing if self.backing is not None else directory / "data"

    def endpoint(self, directory: Path) -> Endpoint:
        return self.nbd if self.nbd is not None else UnixEndpoint(directory.absolute() / SOCKET_NAME)


# ---- single values: each of these raises ValueError with a sentence that ends a sentence ("... must be so and so")


def host_in_brackets(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def check_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("may hold letters, digits, '.', '_' and '-' only, and must hold one of them")
    if len(text) > NAME_MAX_CHARACTERS:
        raise ValueError(f"may have at most {NAME_MAX_CHARACTERS} characters, this has {len(text)}")
    if text in (".", ".."):
        raise ValueError("may not be '.' or '..'")
    return text


def _parse_host_and_port(text: str, example: str, default_port: int | None = None) -> Address:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket:
            raise ValueError(f"has '[' without ']'; write it like {example}")
        port_text = rest.removeprefix(":") if rest.startswith(":") else None
        if rest and port_text is None:
            raise ValueError(f"has '{rest}' after ']'; write it like {example}")
    else:
        host, colon, port_text_or_empty = text.rpartition(":") if ":" in text else (text, "", "")
        port_text = port_text_or_empty if colon else None
        if ":" in host:
            raise ValueError(f"holds an IPv6 address, which goes in brackets: {example.replace('127.0.0.1', '[::1]')}")
    if port_text is None:
        if default_port is None:
            raise ValueError(f"has no port; write it like {example}")
        port_text = str(default_port)
    _check_host(host, bracketed=text.startswith("["), example=example)
    if not (port_text.isascii() and port_text.isdigit() and 1 <= int(port_text[:6]) <= 65535):
        raise ValueError(f"has the port '{port_text}', a port is a number from 1 to 65535")
    return Address(host, int(port_text))


def _check_host(host: str, bracketed: bool, example: str) -> None:
    if bracketed:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(f"has '{host}' in brackets, which is not an IPv6 address") from None
        return
    if not host:
        raise ValueError(f"names no host; write it like {example}")
    if re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise ValueError(f"has the host '{host}', which is not an IPv4 address") from None
    elif not _HOST.fullmatch(host) or len(host) > HOST_CHARACTERS_MAX or max(map(len, host.split("."))) > LABEL_MAX:
        raise ValueError(f"has the host {_shown(host)}, which is neither an address nor a host name")


def parse_address(text: str) -> Address:
    """`tcp://HOST:PORT` -> Address. HOST is an IPv4 address, an IPv6 address in brackets or a host name."""
    example = "tcp://127.0.0.1:7000"
    if not text.startswith("tcp://"):
        raise ValueError(f"must begin with tcp://, like {example}")
    return _parse_host_and_port(text.removeprefix("tcp://"), example)


def parse_endpoint(text: str) -> Endpoint:
    """`unix:PATH` or `tcp:HOST[:PORT]` -> where NBD clients come in."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        path = Path(rest)
        if not path.is_absolute() or "\0" in rest:
            raise ValueError("must hold an absolute path, like unix:/run/volume.sock")
        return UnixEndpoint(path)
    if kind == "tcp" and rest:
        example = f"tcp:127.0.0.1:{NBD_DEFAULT_PORT}"
        return TcpEndpoint(_parse_host_and_port(rest.removeprefix("//"), example, NBD_DEFAULT_PORT))
    raise ValueError(f"must be unix:PATH or tcp:ADDRESS:PORT, like tcp:127.0.0.1:{NBD_DEFAULT_PORT}")


def parse_rate(text: str) -> Rate:
    """`auto`, `full`, or a cap in bytes a second like 100M; units are powers of 1024."""
    if text in _RATES:
        return _RATES[text]
    found = _BYTES.fullmatch(text)
    if found is None:
        raise ValueError(f'is {_shown(text)}, it must be "auto", "full" or bytes a second like "100M"')
    bytes_per_s = int(found[1]) * _UNITS[found[2]]
    if bytes_per_s < RESYNC_BYTES_PER_S_MIN:
        raise ValueError(f'is {_shown(text)}, it must be "{RESYNC_BYTES_PER_S_MIN // KIB}K" or more')
    return Rate(bytes_per_s, governed=True)


def parse_duration_s(text: str) -> float:
    """`30s`, `2m` or `1h` -> seconds."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError(f'is {_shown(text)}, it must be one number with its unit like "30s" or "2m"')
    seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
    if not 1 <= seconds <= RESYNC_AFTER_CRASH_S_MAX:
        raise ValueError(f'is {_shown(text)}, it must be from "1s" to "{RESYNC_AFTER_CRASH_S_MAX // 60}m"')
    return float(seconds)


def is_loopback(address: Address | tuple[str, int]) -> bool:
    """Whether this address can't leave the machine. A host name other than localhost may resolve to anything: no."""
    host = address[0]
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---- the table of keys


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a text in quotes, not {_shown(value)} alone")
    return value


def _protocol(value: object) -> Protocol:
    text = _text(value)
    if text not in PROTOCOLS:
        raise ValueError(f'is {_shown(value)}, it must be "A", "B" or "C"')
    return text  # type: ignore[return-value]


def _backing(value: object) -> Path:
    text = _text(value)
    if not text.startswith("/") or "\0" in text:
        raise ValueError(f"must be an absolute path, not {_shown(value)}")
    return Path(text)


def _rate(value: object) -> str:
    text = _text(value)
    parse_rate(text)
    return text


def _duration(value: object) -> str:
    text = _text(value)
    parse_duration_s(text)
    return text


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false (without quotes), not {_shown(value)}")
    return value


def _seconds(least: float, most: float) -> Callable[[object], float]:
    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be a number of seconds (without quotes), not {_shown(value)}")
        if not least <= value <= most:
            raise ValueError(f"is {_shown(value)}, it must be from {least:g} to {most:g} seconds")
        return float(value)

    return check


def _whole_number(least: int, most: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be a whole number (without quotes), not {_shown(value)}")
        if not least <= value <= most:
            raise ValueError(f"is {_shown(value)}, it must be from {least} to {most}")
        return value

    return check


def _spin(value: object) -> str | int:
    if value in ("auto", "off"):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= SPIN_US_MAX:
        raise ValueError(f'is {_shown(value)}, it must be "auto", "off", or microseconds from 1 to {SPIN_US_MAX}')
    return value


def _cores(value: object) -> str:
    if value not in ("auto", "any"):
        raise ValueError(f'is {_shown(value)}, it must be "auto" or "any"')
    return str(value)


def _policy(field: str) -> Callable[[object], Policy]:
    names = [policy.value for policy in ALLOWED[field]]

    def check(value: object) -> Policy:
        text = _text(value)
        if text not in names:
            one_of = f"one of {', '.join(map(_shown, names))}" if len(names) > 1 else _shown(names[0])
            raise ValueError(f"is {_shown(text)}, it must be {one_of}")
        return Policy(text)

    return check


def _shown(value: object) -> str:
    try:
        text = str(value) if isinstance(value, float) else json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):
        return f"such a value ({type(value).__name__})"
    return text if len(text) <= SHOWN_CHARACTERS_MAX else f"{text[:SHOWN_CHARACTERS_MAX]}..."


_SETTINGS: dict[str, Callable[[object], Any]] = {
    "name": lambda value: check_name(_text(value)),
    "protocol": _protocol,
    "listen": lambda value: parse_address(_text(value)),
    "peer": lambda value: parse_address(_text(value)),
    "backing": _backing,
    "nbd": lambda value: parse_endpoint(_text(value)),
    "shared": _flag,
    # Shorter than 0.2 s a busy machine would look dead; longer than a minute a client's own time limits come first.
    "peer_timeout_s": _seconds(0.2, 60),
    "wait_for_peer_s": _seconds(0, 600),
    "disk_timeout_s": _seconds(1, 600),
    "spin": _spin,
    "cores": _cores,
    "resync_rate": _rate,
    "activity_log_extents": _whole_number(LOG_SLOTS_MIN, LOG_SLOTS_MAX),
    "resync_after_crash": _duration,
    "split_brain_no_primary": _policy("no_primary"),
    "split_brain_one_primary": _policy("one_primary"),
    "split_brain_two_primaries": _policy("two_primaries"),
}
assert list(_SETTINGS) == [field.name for field in fields(Config)]


# ---- the file


def load(directory: Path) -> Config:
    """Read DIR/volume.toml. Raises ConfigError."""
    if (directory / INTERRUPTED_NAME).exists():
        raise ConfigError(
            f"{directory} is not a replica: its creation was interrupted",
            remedy=f"remove what it left (nbdmirror destroy {directory}), and create it again",
        )
    path = directory / FILE_NAME
    return parse(_read(path), path)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise _not_a_replica(path) from None
    except OSError as error:
        raise ConfigError(
            f"can't read {path}: {error.strerror}", remedy="run as the user that owns the replica"
        ) from None
    if len(raw) > FILE_BYTES_MAX:
        raise ConfigError(
            f"{path} is larger than {FILE_BYTES_MAX // 1024} KiB, so it is not a volume's configuration",
            remedy=f"put the real {FILE_NAME} there",
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8 text",
            remedy="write the file again as plain text",
        ) from None


def _not_a_replica(path: Path) -> ConfigError:
    directory = path.parent
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        return ConfigError(
            f"{directory} {what}", remedy="give the directory of a replica, or make one: nbdmirror create"
        )
    if (directory / "meta").exists():
        return ConfigError(
            f"{directory} holds a replica's metadata but no {FILE_NAME}",
            remedy=f"write one; `name = ...` is all that a volume without a peer needs "
            f"(`nbdmirror inspect {directory}` shows the name)",
        )
    return ConfigError(
        f"{directory} is not a replica: it holds no {FILE_NAME}",
        remedy="give the directory of a replica, or make one: nbdmirror create",
    )


def parse(text: str, path: Path) -> Config:
    """The contents of a volume.toml -> Config. `path` is for messages only."""
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > LINE_CHARACTERS_MAX:
            raise ConfigError(
                f"{path}, line {number}: {len(line)} characters, more than {LINE_CHARACTERS_MAX}",
                remedy="a line is one key and its value",
            )
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: a number of 5 000 digits, say
        what = "brackets in too many brackets" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(
            _where_toml_ends(what, text, path), remedy='a line is: key = value, texts in quotes: name = "volume"'
        ) from None
    values = {key: _checked(key, value, path) for key, value in table.items()}
    if "name" not in values:
        raise ConfigError(f"{path}: the key `name` is missing", remedy='add the line: name = "..."')
    for one, other in (("listen", "peer"), ("peer", "listen")):
        if one in values and other not in values:
            raise ConfigError(
                f"{path}: the key `{other}` is missing, though `{one}` is there",
                remedy=f"add `{other}` to have a peer, or take `{one}` away to stand alone",
            )
    if "listen" in values and values["listen"] == values["peer"]:
        raise ConfigError(
            f"{path}: `listen` and `peer` are the same address, {values['peer']}",
            remedy="`peer` is the address where the other replica listens",
        )
    if "activity_log_extents" in values and "resync_after_crash" in values:
        raise ConfigError(
            f"{path}: `activity_log_extents` and `resync_after_crash` both set the size of the activity log",
            remedy="take one of the two lines away: the first fixes the size, the second lets the volume choose it",
        )
    return Config(**values)


def _where_toml_ends(error: str, text: str, path: Path) -> str:
    """tomllib says "what (at line 3, column 4)" or "what (at end of document)"."""
    what, _, where = error.rpartition(" (at ")
    found = re.match(r"line (\d+), column (\d+)", where)
    line = int(found[1]) if found else text.rstrip("\n").count("\n") + 1
    return f"{path}, line {line}: not valid TOML: {what or error}"


def _checked(key: str, value: object, path: Path) -> Any:
    check = _SETTINGS.get(key)
    if check is None:
        nearest = difflib.get_close_matches(key, _SETTINGS, n=1, cutoff=0.5)
        known = f"did you mean `{nearest[0]}`?" if nearest else f"known keys: {', '.join(_SETTINGS)}"
        what = "section" if isinstance(value, dict) else "key"
        raise ConfigError(f"{path}: unknown {what} `{key}`", remedy=known)
    try:
        return check(value)
    except ValueError as error:
        raise ConfigError(f"{path}: `{key}` {error}", remedy=f"correct the line `{key} = ...`") from None


def _quoted(text: str) -> str:
    """A TOML basic string; JSON's escapes are a part of TOML's, but for DEL, which JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _line(key: str, value: object, default: object, example: object = None) -> str:
    """`key = value`, or the same behind a comment sign when it is the default."""
    shown = value if value != default else (default if example is None else example)
    shown = shown.value if isinstance(shown, Policy) else shown
    text = str(shown).lower() if isinstance(shown, bool) else str(shown)
    if isinstance(shown, str | Path | tuple | UnixEndpoint | TcpEndpoint):
        text = _quoted(text)
    return f"{'# ' if value == default else ''}{key} = {text}"


def render(config: Config) -> str:
    """The commented volume.toml that `create` writes; `parse` reads the same Config back from it."""
    default = Config(config.name)
    return f"""\
# One replica of a volume. Changes take effect at the next `nbdmirror serve`.

# The volume's name: the name of the NBD export, the same on both replicas. It can't be changed.
name = {_quoted(config.name)}

# When a write is acknowledged: "C" when both replicas have written it, "B" when the peer has it in memory,
# "A" when it is written here and queued to be sent.
protocol = {_quoted(config.protocol)}

# Where this replica waits for its peer, and where the peer waits. Both or none; without them the volume stands alone.
# Addresses other than loopback need `serve --insecure`: nothing is encrypted.
{_line("listen", config.listen, None, "tcp://127.0.0.1:7000")}
{_line("peer", config.peer, None, "tcp://127.0.0.1:7001")}

# The file or block device that holds the data, if it is not the file `data` beside this one.
{_line("backing", config.backing, None, "/dev/disk/by-id/...")}

# Where NBD clients come in: a unix socket (nbd.sock beside this file when not set) or a TCP port.
{_line("nbd", config.nbd, None, "tcp:127.0.0.1:10809")}

# Several clients at a time. Only for clients that coordinate their writes, such as a cluster filesystem.
{_line("shared", config.shared, default.shared)}

# A peer that is silent for so many seconds is given up; writes wait no longer than this.
{_line("peer_timeout_s", config.peer_timeout_s, default.peer_timeout_s)}

# With `serve --primary`: how many seconds to ask for the peer before coming up without it.
{_line("wait_for_peer_s", config.wait_for_peer_s, default.wait_for_peer_s)}

# A disk that does not answer for so many seconds is given up.
{_line("disk_timeout_s", config.disk_timeout_s, default.disk_timeout_s)}

# How the two ends of the link wait for each other's next message while a single write is on its way: "auto" spins
# instead of sleeping while the volume finds that this pays, "off" never does, a number does for so many microseconds.
{_line("spin", config.spin, default.spin)}

# Where the threads that serve clients run: "auto" keeps them on one core while the volume finds that this serves more
# requests (Python runs one thread at a time), "any" leaves it to the kernel.
{_line("cores", config.cores, default.cores)}

# How fast a resync may go: "auto" holds it back as far as clients' writes need it, to 30 % of its speed at most;
# "full" never does; "100M" is "auto" and never more than so many bytes a second.
{_line("resync_rate", config.resync_rate, default.resync_rate)}

# Extents of 4 MiB that may be written at a time without a metadata write; also what is compared after a crash.
{_line("activity_log_extents", config.activity_log_extents, default.activity_log_extents)}

# Instead: how long a resync after a crash may take at most. The volume measures, and chooses the extents itself.
{_line("resync_after_crash", config.resync_after_crash, None, "30s")}

# What to do when both replicas were written to while apart (split brain), by the number of primaries when they meet
# again; the same on both replicas. "refuse": stay apart until the operator decides. "discard-zero-changes": the one
# that changed nothing follows. "discard-least-changes" (no primary) and "discard-secondary" (one primary) lose
# acknowledged data without asking. Two primaries always stay apart.
{_line("split_brain_no_primary", config.split_brain_no_primary, Policy.REFUSE)}
{_line("split_brain_one_primary", config.split_brain_one_primary, Policy.REFUSE)}
{_line("split_brain_two_primaries", config.split_brain_two_primaries, Policy.REFUSE)}
"""
