"""Clients as processes: the logging writer, fio, qemu and libnbd's tools."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from tests.integration.cluster import Replica
from tests.integration.history import History
from tests.integration.processes import run, signal_quietly, wait_for

IDS_A_RUN = 100_000_000
WRITER = Path(__file__).with_name("writer.py")
PROJECT = Path(__file__).resolve().parents[2]


class Target(Protocol):
    """What a writer must know of a replica."""

    uri: str
    log_path: Path
    client_prefix: tuple[str, ...]


class Writer:
    """One run of writer.py against a replica; `history` gathers the runs of a test.

    Options are writer.py's, with underscores: Writer(a, history, 1, depth=16, flush_every=50).
    """

    def __init__(self, replica: Replica | Target, history: History, run: int = 1, /, **options: object) -> None:
        self.history = history
        self.log_path = replica.log_path.parent / f"writer-{run}.log"
        self.log_path.touch()
        words = [*replica.client_prefix, sys.executable, str(WRITER), replica.uri, str(self.log_path)]
        words += ["--seed", str(history.seed), "--first-id", str(run * IDS_A_RUN)]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
        self._answers, self._read_to = 0, 0
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def answers(self) -> int:
        """Requests answered so far."""
        with self.log_path.open("rb") as log:
            log.seek(self._read_to)
            text = log.read()
        whole = text.rpartition(b"\n")[0] + b"\n" if b"\n" in text else b""
        self._read_to += len(whole)
        self._answers += sum(line.startswith(b"A ") for line in whole.splitlines())
        return self._answers

    def wait_answers(self, more: int, timeout_s: float = 20.0) -> None:
        """Wait until `more` further requests have been answered; fails when the writer ends before."""
        goal = self.answers() + more

        def enough() -> bool:
            if self.answers() >= goal:
                return True
            assert self.process.poll() is None, f"the writer ended with {self.process.returncode}"
            return False

        wait_for(enough, timeout_s, f"{more} more answers to the writer")

    def wait_stalled(self, depth: int, timeout_s: float = 10.0) -> None:
        """Wait until `depth` requests are in flight and none has been answered for a tenth of a second."""
        seen: list[tuple[int, float]] = []

        def stalled() -> bool:
            answers = self.answers()
            if not seen or seen[-1][0] != answers:
                seen.append((answers, time.monotonic()))
            submitted = self.log_path.read_bytes().count(b"\nS ") + 1
            return submitted - answers >= depth and time.monotonic() - seen[-1][1] > 0.1

        wait_for(stalled, timeout_s, f"{depth} requests to wait")

    def kill(self) -> None:
        signal_quietly(self.process.pid, signal.SIGKILL)
        self.finish(-signal.SIGKILL)

    def stop(self, timeout_s: float = 20.0) -> None:
        """SIGTERM: it waits for its answers and flushes; the connection must still be there."""
        signal_quietly(self.process.pid, signal.SIGTERM)
        self.finish(0, timeout_s)

    def ended_by_loss(self, timeout_s: float = 20.0) -> None:
        """The server went away: the writer must have seen the connection end (exit status 3)."""
        self.finish(3, timeout_s)

    def finish(self, code: int, timeout_s: float = 20.0) -> None:
        """Wait for the end, check the exit status, add the run to the history."""
        try:
            _, said = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as late:
            self.process.kill()
            self.process.communicate()
            raise AssertionError(f"the writer did not end within {timeout_s} s") from late
        self.history.add(self.log_path)
        assert self.process.returncode == code, (
            f"writer ended with {self.process.returncode}, not {code}: {said.decode()}"
        )

    def close(self) -> None:
        """Never leave it behind, however the test went."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def new_history(rng: random.Random) -> History:
    return History(seed=rng.getrandbits(32))


def fio(uri: str, *options: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run fio's nbd engine; AssertionError when it reports an error (a failed --verify is one)."""
    how = ("--name=job", "--ioengine=nbd", "--output-format=json", "--verify_state_save=0")
    return run(["fio", *how, f"--uri={uri}", *options], timeout_s)
