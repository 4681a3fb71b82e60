"""`nbdmirror demo`: a mirrored volume on this machine that survives its end and the end of a half."""

import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import NBDMIRROR, nbdmirror
from tests.integration.processes import children_of, command_name, run, signal_quietly, wait_for, wait_gone


class Demo:
    """A running `nbdmirror demo` with its output in a file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = directory.parent / "demo.out"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [NBDMIRROR, "demo", "--directory", directory, "--size", "64M"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self.output.read_text()

    def wait_said(self, text: str) -> None:
        wait_for(lambda: text in self.said(), 20, f"the demo to say {text!r}: {self.said()}")

    def uri(self) -> str:
        self.wait_said("Attach it")
        found = re.search(r"(?m)^nbd\S+$", self.said())
        assert found
        return found[0]

    def processes(self) -> list[int]:
        serves = children_of(self.process.pid)
        return [*serves, *(child for serve in serves for child in children_of(serve))]

    def stop(self, number: signal.Signals = signal.SIGINT) -> str:
        """Ends it; asserts exit status 0 and no process left."""
        processes = self.processes()
        self.process.send_signal(number)
        assert self.process.wait(12) == 0, self.said()
        for pid in processes:
            wait_gone(pid, 1)
        return self.said()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Demo]]:
    """Starts a demo, again and again in the same directory; kills what a failed test left."""
    demos: list[Demo] = []

    def start() -> Demo:
        demos.append(Demo(tmp_path / "demo"))
        return demos[-1]

    yield start
    for demo in demos:
        demo.process.kill()
        demo.process.wait()


def test_its_data_and_its_primary_stay(start: Callable[[], Demo], tmp_path: Path) -> None:
    picture = tmp_path / "picture"
    picture.write_bytes(bytes(range(256)) * 16384)
    demo = start()
    uri = demo.uri()
    demo.wait_said("a: primary, UpToDate | b: secondary, UpToDate | Connected")
    assert [command_name(pid) for pid in demo.processes()].count("nbdkit") == 2
    run(["nbdcopy", "--flush", picture, uri])
    nbdmirror("switch", demo.directory / "b")
    demo.wait_said("a: secondary, UpToDate | b: primary, UpToDate | Connected")
    said = demo.stop()
    assert "replica a: stopped, clean" in said
    assert "replica b: stopped, clean" in said
    again = start()
    uri = again.uri()
    assert "/b/nbd.sock" in uri
    run(["nbdcopy", uri, tmp_path / "back"])
    assert (tmp_path / "back").read_bytes()[: picture.stat().st_size] == picture.read_bytes()
    again.stop(signal.SIGTERM)


def test_a_half_that_was_killed_is_shown(start: Callable[[], Demo]) -> None:
    demo = start()
    demo.wait_said("Connected")
    other = next(
        pid
        for pid in children_of(demo.process.pid)
        if f"{demo.directory}/b" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    nbdkit = children_of(other)
    signal_quietly(other, signal.SIGKILL)
    for pid in nbdkit:
        wait_gone(pid)
    demo.wait_said("b: ENDED BY SIGKILL")
    second = nbdmirror("demo", "--directory", demo.directory, check=False)
    assert second.returncode == 1
    assert "served already" in second.stderr
    demo.stop()
    again = start()
    again.wait_said("a: primary, UpToDate | b: secondary, UpToDate | Connected")
    again.stop()


def test_nothing_is_left_when_it_is_killed(start: Callable[[], Demo]) -> None:
    demo = start()
    demo.wait_said("Connected")
    processes = demo.processes()
    assert len(processes) == 4
    demo.process.kill()
    demo.process.wait()
    for pid in processes:
        wait_gone(pid)


def test_a_port_that_was_taken_meanwhile_is_replaced(start: Callable[[], Demo]) -> None:
    demo = start()
    demo.wait_said("Connected")
    demo.stop()
    port = int(
        re.search(r'(?m)^listen = "tcp://127.0.0.1:(\d+)"', (demo.directory / "a" / "volume.toml").read_text())[1]
    )  # type: ignore[index]
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        again = start()
        again.wait_said(f"port {port} is in use")
        again.wait_said("Connected")
        again.stop()
