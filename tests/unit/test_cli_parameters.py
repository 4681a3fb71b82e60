"""Sizes as people write them."""

import pytest

from cli.output import duration_text
from cli.parameters import SIZE_BYTES_MAX, parse_size
from mirror.core.units import exact_size_text, size_text


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("4096", 4096),
        ("4096B", 4096),
        ("8k", 8192),
        ("8K", 8192),
        ("8KiB", 8192),
        ("8Ki", 8192),
        ("8kb", 8192),
        ("512MiB", 512 << 20),
        ("512 MiB", 512 << 20),
        (" 10G ", 10 << 30),
        ("1GB", 1 << 30),
        ("1.5g", 3 << 29),
        ("0.5k", 512),
        ("0.1T", (1 << 40) // 10),
        ("2T", 2 << 40),
        ("3PiB", 3 << 50),
        (str(SIZE_BYTES_MAX), SIZE_BYTES_MAX),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "0",
            "0G",
            "0.0M",
            "-1",
            "-5G",
            "+",
            "G",
            "5X",
            "5i",
            "1,5G",
            "1.5",
            ".5G",
            "1.",
            "ten",
            "1 2",
            "1e9",
        ),
        *("0x10", "٣G", "8E", "99999999999999999999", "1G\0", "1GG"),
    ],
)
def test_what_is_no_size_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1 << 30, "1 GiB"),
        (123456789, "117.7 MiB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert size_text(count) == text


def test_exact_sizes_name_the_last_byte() -> None:
    assert [exact_size_text(count) for count in (0, 1023, 1024, (1 << 30) + 1)] == [
        "0 bytes",
        "1023 bytes",
        "1 KiB (1024 bytes)",
        "1.0 GiB (1073741825 bytes)",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (12, "12 s"), (95.4, "1 min 35 s"), (7260, "2 h 1 min")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
