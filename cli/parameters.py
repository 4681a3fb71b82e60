"""Arguments and options that several verbs share: the directory, sizes, names, addresses. A bad one is wrong usage."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mirror.core.limits import BLOCK_BYTES
from nbd_server import config

# nbdkit and the NBD protocol count bytes in a signed 64-bit number.
SIZE_BYTES_MAX = (1 << 63) - BLOCK_BYTES

_SIZE = re.compile(r"([+-]?[0-9]+)(\.[0-9]+)?\s*(?:([kmgtpe])i?)?b?", re.IGNORECASE | re.ASCII)
_POWERS = {letter: 1024**power for power, letter in enumerate(["", "k", "m", "g", "t", "p", "e"])}


def parse_size(text: str) -> int:
    """10G, 512MiB, 1.5T, 4096 -> bytes; units are powers of 1024, in either case. Raises ValueError with a sentence."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"'{text}' is not a size; write it like 10G, 512MiB or a number of bytes")
    whole, fraction, letter = found.groups(default="")
    unit = _POWERS[letter.lower()]
    size = int(whole) * unit
    if size < 0 or (size == 0 and not float(fraction or 0)):
        raise ValueError(f"the size is '{text}', it must be larger than zero")
    if fraction:
        if unit == 1:
            raise ValueError(f"'{text}' is not a whole number of bytes")
        # As a ratio, because 0.1T in floating point is not what it looks like.
        digits = fraction[1:]
        size += unit * int(digits) // 10 ** len(digits)
    if size > SIZE_BYTES_MAX:
        raise ValueError(f"'{text}' is larger than any block device can be (8 EiB)")
    return int(size)


class Parsed(click.ParamType[Any]):
    """A value that a function parses; its ValueError is the message."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002 - click's signature
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _with_value(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The checks of volume.toml end the sentence "`key` ..."; here it begins with the value."""

    def parse_named(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise ValueError(f"'{text}' {error}") from None

    return parse_named


def _endpoint(text: str) -> config.Endpoint:
    # A path on the command line is relative to where one is.
    if text.startswith("unix:") and len(text) > len("unix:"):
        text = f"unix:{Path(text.removeprefix('unix:')).absolute()}"
    return config.parse_endpoint(text)


def _protocol(text: str) -> str:
    if text.upper() not in config.PROTOCOLS:
        raise ValueError(f"'{text}' is no protocol; it is one of {', '.join(config.PROTOCOLS)}")
    return text.upper()


SIZE = Parsed("SIZE", parse_size)
NAME = Parsed("NAME", _with_value(config.check_name))
PROTOCOL = Parsed("A|B|C", _protocol)
ADDRESS = Parsed("tcp://ADDR:PORT", _with_value(config.parse_address))
ENDPOINT = Parsed("unix:PATH|tcp:ADDR:PORT", _with_value(_endpoint))

directory_argument = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
yes_option = click.option("--yes", is_flag=True, help="Don't ask.")
