"""Inputs for decoders: recorded bytes, changed a little, in ways that have broken decoders elsewhere.

Pure: the same generator state makes the same input.
"""

import random
from collections.abc import Callable, Sequence

BYTES_MAX = 64 * 1024
NUMBERS = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    4095,
    4096,
    4097,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)
WORDS = (
    b"[" * 2000,
    b'{"a":' * 2000,
    b"9" * 5000,
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"0.5",
    b"\\ud800",
    b"\x00",
    b"\xff\xfe",
    b"\n",
    b"'''",
    b'"""',
    b"= ",
    b"18446744073709551616",
)

Mutation = Callable[[random.Random, bytearray, Sequence[bytes]], None]


def flip(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8


def put_byte(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def put_number(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    size = rng.choice((2, 4, 8))
    at = rng.randrange(len(data))
    number = rng.choice(NUMBERS) % (1 << 8 * size)
    data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))


def put_noise(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = rng.randrange(len(data))
    count = rng.randrange(1, 64)
    data[at : at + count] = rng.randbytes(count)


def zero(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = rng.randrange(len(data))
    count = min(len(data) - at, rng.choice((1, 8, 512, 4096)))
    data[at : at + count] = bytes(count)


def drop(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 2, 4, 60, rng.randrange(1, len(data) + 1)))]


def cut(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data)) :]


def double(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = rng.randrange(len(data))
    piece = data[at : at + rng.randrange(1, 200)]
    where = rng.randrange(len(data))
    data[where:where] = piece * rng.choice((1, 1, 2, 50))


def put_word(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = rng.randrange(len(data))
    data[at : at + rng.choice((0, 0, 1, 5))] = rng.choice(WORDS)


def swap(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    one, other = sorted(rng.randrange(len(data)) for _ in range(2))
    count = min(rng.randrange(1, 64), other - one)
    data[one : one + count], data[other : other + count] = data[other : other + count], data[one : one + count]


def splice(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    """Goes on as another one does."""
    other = rng.choice(corpus)
    if other:
        at = rng.randrange(len(data))
        data[at:] = other[min(at, len(other) - 1) if rng.random() < 0.7 else rng.randrange(len(other)) :]


MUTATIONS: tuple[Mutation, ...] = (
    flip,
    flip,
    flip,
    put_byte,
    put_number,
    put_number,
    put_noise,
    zero,
    drop,
    cut,
    double,
    put_word,
    swap,
    splice,
)


def mutate(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One of the recorded inputs with one to four changes. It may come out unchanged."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        if data:
            rng.choice(MUTATIONS)(rng, data, corpus)
    return bytes(data[:BYTES_MAX])
