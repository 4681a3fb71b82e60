"""A client that keeps requests in flight and logs what happened to each; a process of its own (`python writer.py`).

It lives through the death of the server (the requests in flight are then logged as lost) and can be killed itself: each
line is one write(2) to the log. One line an event, `history.py` reads them:

    S id kind first_block blocks fua seconds     submitted; kind W(rite) Z(ero) T(rim) F(lush) R(ead)
    A id seconds                                 answered well
    E id errno seconds                           answered with an error
    L id seconds                                 the connection ended before the answer
    M id block seconds                           a read returned something else than the last write of that block

Every block written holds its seed, number and the id of its write, so that a block read back tells where it comes from.
SIGTERM: no new requests, the ones in flight are waited for, a flush, exit 0. A lost connection: exit 3.
"""

import argparse
import os
import random
import select
import signal
import struct
import sys
import time

sys.path.append("/usr/lib/python3/dist-packages")

import nbd

BLOCK_BYTES = 4096
RECORD = struct.Struct("<8sQQQ")
MAGIC = b"nbdmtest"
ENOTCONN = 107


def block_contents(seed: int, block: int, identifier: int) -> bytes:
    """The 4096 bytes that request `identifier` writes to a block: every second one can't be compressed."""
    record = RECORD.pack(MAGIC, seed, block, identifier)
    if identifier % 2:
        return record + random.Random(identifier << 32 | block).randbytes(BLOCK_BYTES - RECORD.size)
    return record * (BLOCK_BYTES // RECORD.size)


class Writer:
    """The loop: fill every connection up to its depth, wait for answers, log."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(options.seed ^ options.first_id)
        self.log_fd = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.next_id = options.first_id
        self.busy_blocks: set[int] = set()
        self.in_flight = [0] * options.connections
        self.handles: list[nbd.NBD] = []
        self.stopping = False
        self.lost = False
        self.answered = 0
        self.writes_since_flush = 0
        self.last_written: dict[int, bytes | None] = {}

    def log(self, text: str) -> None:
        os.write(self.log_fd, f"{text} {time.monotonic():.6f}\n".encode())

    def connect(self) -> None:
        for _ in range(self.options.connections):
            handle = nbd.NBD()
            handle.connect_uri(self.options.uri)
            self.handles.append(handle)

    def stop(self, *_: object) -> None:
        self.stopping = True

    # -- requests -----------------------------------------------------------------------------------------------

    def choose(self) -> tuple[str, int, int, bool]:
        """Kind, first block, blocks, FUA of the next request."""
        options = self.options
        if options.flush_every and self.writes_since_flush >= options.flush_every:
            self.writes_since_flush = 0
            return "F", 0, 0, False
        chance = self.random.random()
        if chance < options.zeroes / 2:
            kind = "Z"
        elif chance < options.zeroes:
            kind = "T"
        elif chance < options.zeroes + options.reads:
            kind = "R"
        else:
            kind = "W"
        fua = kind == "W" and self.random.random() < options.fua
        for _ in range(1000):
            count = self.random.randint(1, options.blocks_max)
            first = options.first_block + self.random.randrange(options.blocks - count + 1)
            if self.options.overlap or self.busy_blocks.isdisjoint(range(first, first + count)):
                return kind, first, count, fua
        raise SystemExit("no block is free: more blocks or less depth, please")

    def submit(self, number: int) -> None:
        kind, first, count, fua = self.choose()
        identifier = self.next_id
        self.next_id += 1
        handle, blocks = self.handles[number], range(first, first + count)
        if not self.options.overlap:
            self.busy_blocks.update(blocks)
        self.in_flight[number] += 1
        self.writes_since_flush += kind in "WZT"
        data = nbd.Buffer(count * BLOCK_BYTES) if kind == "R" else b""
        if kind == "W":
            data = b"".join(block_contents(self.options.seed, block, identifier) for block in blocks)

        def done(error: "nbd.errno") -> int:
            self.answer(number, identifier, kind, blocks, data, error.value)
            return 1

        flags = nbd.CMD_FLAG_FUA if fua else 0
        offset, length = first * BLOCK_BYTES, count * BLOCK_BYTES
        self.log(f"S {identifier} {kind} {first} {count} {int(fua)}")
        if kind == "W":
            handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset, done, flags)
        elif kind == "Z":
            handle.aio_zero(length, offset, done)
        elif kind == "T":
            handle.aio_trim(length, offset, done)
        elif kind == "R":
            handle.aio_pread(data, offset, done)
        else:
            handle.aio_flush(done)

    def answer(
        self, number: int, identifier: int, kind: str, blocks: range, data: "bytes | nbd.Buffer", error: int
    ) -> None:
        self.in_flight[number] -= 1
        if not self.options.overlap:
            self.busy_blocks.difference_update(blocks)
        if error == ENOTCONN or (error and self.handles[number].aio_is_dead()):
            self.log(f"L {identifier}")
            return
        if error:
            self.log(f"E {identifier} {error}")
            for block in blocks:
                self.last_written.pop(block, None)
            return
        self.answered += 1
        if kind == "R":
            self.check_read(identifier, blocks, data)
        else:
            for block in blocks:
                whole = data[(block - blocks.start) * BLOCK_BYTES :][:BLOCK_BYTES] if kind == "W" else None
                self.last_written[block] = whole
        self.log(f"A {identifier}")

    def check_read(self, identifier: int, blocks: range, data: "nbd.Buffer") -> None:
        """A read must return what the last answered write left there (without overlaps nothing else wrote)."""
        if self.options.overlap:
            return
        contents = data.to_bytearray()
        for block in blocks:
            if block in self.last_written:
                wanted = self.last_written[block] or bytes(BLOCK_BYTES)
                at = (block - blocks.start) * BLOCK_BYTES
                if contents[at : at + BLOCK_BYTES] != wanted:
                    self.log(f"M {identifier} {block}")

    # -- the loop -----------------------------------------------------------------------------------------------

    def wait(self, timeout_ms: int) -> None:
        """Let libnbd move the bytes of every connection that is ready."""
        poller = select.poll()
        by_fd = {}
        for handle in self.handles:
            direction = handle.aio_get_direction()
            mask = (select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0) | (
                select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
            )
            fd = handle.aio_get_fd()
            by_fd[fd] = handle
            poller.register(fd, mask)
        for fd, events in poller.poll(timeout_ms):
            handle = by_fd[fd]
            direction = handle.aio_get_direction()
            if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and direction & nbd.AIO_DIRECTION_READ:
                handle.aio_notify_read()
            elif events & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
                handle.aio_notify_write()

    def wanted(self) -> bool:
        return not self.stopping and (
            not self.options.count or self.next_id - self.options.first_id < self.options.count
        )

    def run(self) -> int:
        self.connect()
        signal.signal(signal.SIGTERM, self.stop)
        try:
            while self.wanted() or any(self.in_flight):
                for number, _ in enumerate(self.handles):
                    while self.wanted() and self.in_flight[number] < self.options.depth:
                        self.submit(number)
                self.wait(200)
            self.options.flush_every, self.writes_since_flush = 1, 1
            self.submit(0)
            while any(self.in_flight):
                self.wait(200)
        except nbd.Error:
            pass
        self.lost = any(handle.aio_is_dead() or handle.aio_is_closed() for handle in self.handles)
        for handle in self.handles if not self.lost else ():
            handle.shutdown()
        return 3 if self.lost else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="keep requests in flight, log what happens to each")
    parser.add_argument("uri")
    parser.add_argument("log")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first-id", type=int, default=1)
    parser.add_argument("--first-block", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=4096, help="blocks of 4 KiB that may be written")
    parser.add_argument("--blocks-max", type=int, default=1, help="of one request")
    parser.add_argument("--depth", type=int, default=1, help="requests in flight a connection")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--count", type=int, default=0, help="requests; 0: until SIGTERM")
    parser.add_argument("--flush-every", type=int, default=0, help="writes between two flushes; 0: only at the end")
    parser.add_argument("--fua", type=float, default=0.0, help="share of writes with FUA")
    parser.add_argument("--zeroes", type=float, default=0.0, help="share of requests that zero or trim")
    parser.add_argument("--reads", type=float, default=0.0)
    parser.add_argument("--overlap", action="store_true", help="several requests may write one block at once")
    return Writer(parser.parse_args()).run()


if __name__ == "__main__":
    sys.exit(main())
