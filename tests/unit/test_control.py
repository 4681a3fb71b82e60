"""The control socket: answers, refusals, silence, garbage, many at a time, and a path of any length."""

import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirror.core.errors import OperatorError
from mirror.runtime import Runtime
from nbd_server import control, hold
from nbd_server.control import CommandRefused, ControlServer, NotServing, ServerSilent
from tests.shortages import refuse_descriptors_then_a_thread

RUNTIME = Runtime()


class Volume:
    """What stands behind the socket."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.waiting = threading.Semaphore(0)

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["command"]:
            case "status":
                return {"asked": request}
            case "refuse":
                raise OperatorError("it is Outdated", remedy="use --force")
            case "wait":
                self.waiting.release()
                assert self.release.wait(10)
                return {}
        raise ZeroDivisionError("a bug")


@pytest.fixture
def volume() -> Volume:
    return Volume()


@pytest.fixture
def server(tmp_path: Path, volume: Volume) -> Iterator[ControlServer]:
    server = ControlServer(tmp_path / control.FILE_NAME, volume.handle, RUNTIME)
    server.start()
    yield server
    volume.release.set()
    server.stop()


def raw(directory: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    connection.connect(str(directory / control.FILE_NAME))
    return connection


@pytest.mark.usefixtures("server")
def test_a_command_carries_its_arguments_and_returns_the_result(tmp_path: Path) -> None:
    result = control.request(tmp_path, "status", 5, force=True)
    assert result == {"asked": {"command": "status", "force": True}}


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("line", [b"[" * 60_000, b'{"command":' * 5000, b'{"command": 7}', b'{"a":' + b"1" * 5000])
def test_a_line_that_is_no_request_is_answered_so(tmp_path: Path, line: bytes) -> None:
    with raw(tmp_path) as connection:
        connection.sendall(line + b"\n")
        assert "not a request" in json.loads(connection.makefile().readline())["error"]["message"]


def test_it_outlives_a_lack_of_descriptors_and_threads(
    tmp_path: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_descriptors_then_a_thread(monkeypatch, "control-command")
    server = ControlServer(tmp_path / control.FILE_NAME, volume.handle, RUNTIME)
    server.start()
    with raw(tmp_path) as connection, connection.makefile("rb") as replies:
        assert json.loads(replies.readline())["error"] == {"message": "can't start the thread", "remedy": "allow more"}
    assert control.request(tmp_path, "status", 5)
    server.stop()


@pytest.mark.usefixtures("server")
def test_the_socket_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / control.FILE_NAME).stat().st_mode) == 0o600


@pytest.mark.usefixtures("server")
def test_a_refusal_comes_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(CommandRefused) as caught:
        control.request(tmp_path, "refuse", 5)
    assert (caught.value.message, caught.value.remedy) == ("it is Outdated", "use --force")


@pytest.mark.usefixtures("server")
def test_a_bug_in_a_command_is_logged_and_the_server_lives_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CommandRefused, match="ZeroDivisionError"):
        control.request(tmp_path, "divide", 5)
    assert "ZeroDivisionError" in caplog.text
    assert control.request(tmp_path, "status", 5)


@pytest.mark.usefixtures("server")
def test_one_connection_carries_several_requests_and_survives_garbage(tmp_path: Path) -> None:
    with raw(tmp_path) as connection, connection.makefile("rb") as replies:
        for line in (b"\n", b"not json\n", b"[]\n", b'{"command": 1}\n', b"\xff\xfe\n"):
            connection.sendall(line)
            assert json.loads(replies.readline())["ok"] is False
        connection.sendall(b'{"command": "status"}\n{"command": "status"}\n')
        assert [json.loads(replies.readline())["ok"] for _ in range(2)] == [True, True]


@pytest.mark.usefixtures("server")
def test_an_endless_line_is_refused(tmp_path: Path) -> None:
    with raw(tmp_path) as connection, connection.makefile("rb") as replies:
        connection.sendall(b"x" * (control.REQUEST_BYTES_MAX + 1))
        assert json.loads(replies.readline())["ok"] is False
        assert replies.readline() == b""


@pytest.mark.usefixtures("server")
def test_a_slow_command_holds_up_no_other(tmp_path: Path, volume: Volume) -> None:
    thread = threading.Thread(target=control.request, args=(tmp_path, "wait", 10))
    thread.start()
    assert volume.waiting.acquire(timeout=5)
    assert control.request(tmp_path, "status", 5)
    volume.release.set()
    thread.join()


@pytest.mark.usefixtures("server")
def test_more_commands_than_allowed_are_refused_and_room_comes_back(tmp_path: Path, volume: Volume) -> None:
    connections = [raw(tmp_path) for _ in range(control.CONNECTIONS_MAX)]
    for connection in connections:
        connection.sendall(b'{"command": "wait"}\n')
    for _ in connections:
        assert volume.waiting.acquire(timeout=5)
    with pytest.raises(CommandRefused, match="too many"):
        control.request(tmp_path, "status", 5)
    volume.release.set()
    for connection in connections:
        with connection.makefile("rb") as replies:
            assert json.loads(replies.readline())["ok"]
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
        connection.close()
    assert control.request(tmp_path, "status", 5)


@pytest.mark.usefixtures("server")
def test_no_answer_in_time_is_said(tmp_path: Path) -> None:
    with pytest.raises(ServerSilent, match=r"no answer to 'wait' within 0\.2 s"):
        control.request(tmp_path, "wait", 0.2)


def test_stop_lets_a_command_answer_and_removes_the_socket(tmp_path: Path, volume: Volume) -> None:
    server = ControlServer(tmp_path / control.FILE_NAME, volume.handle, RUNTIME)
    server.start()
    idle = raw(tmp_path)
    with raw(tmp_path) as busy, busy.makefile("rb") as replies:
        busy.sendall(b'{"command": "wait"}\n')
        assert volume.waiting.acquire(timeout=5)
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        assert idle.recv(1) == b""
        volume.release.set()
        assert json.loads(replies.readline())["ok"]
        stopper.join()
    idle.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotServing):
        control.request(tmp_path, "status", 5)


def test_nothing_serves(tmp_path: Path) -> None:
    with pytest.raises(NotServing, match="nothing serves"):
        control.request(tmp_path, "status", 5)
    with pytest.raises(NotServing, match="does not exist"):
        control.request(tmp_path / "none", "status", 5)


def test_a_leftover_socket_is_nobody_and_is_replaced(tmp_path: Path, volume: Volume) -> None:
    with socket.socket(socket.AF_UNIX) as leftover:
        leftover.bind(str(tmp_path / control.FILE_NAME))
    with pytest.raises(NotServing, match="nothing serves"):
        control.request(tmp_path, "status", 5)
    server = ControlServer(tmp_path / control.FILE_NAME, volume.handle, RUNTIME)
    server.start()
    assert control.request(tmp_path, "status", 5)
    server.stop()


def test_a_server_that_is_starting_is_waited_for(tmp_path: Path, volume: Volume) -> None:
    held = hold.hold_directory(tmp_path, RUNTIME)
    with pytest.raises(ServerSilent, match=rf"process {os.getpid()}"):
        control.request(tmp_path, "status", 0.2)
    results: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: results.append(control.request(tmp_path, "status", 10)))
    asking.start()
    server = ControlServer(tmp_path / control.FILE_NAME, volume.handle, RUNTIME)
    server.start()
    asking.join()
    server.stop()
    os.close(held)
    assert results


def test_a_directory_whose_path_is_too_long_for_a_socket(tmp_path: Path, volume: Volume) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    server = ControlServer(deep / control.FILE_NAME, volume.handle, RUNTIME)
    server.start()
    assert control.request(deep, "status", 5)
    server.stop()


@pytest.mark.parametrize(
    "answer",
    [b"\xff\n", b"[]\n", b"7\n", b"{}\n", b'{"ok": true}\n', b'{"ok": true, "result": []}\n', b"[" * 9999 + b"\n"],
    ids=lambda answer: repr(answer[:20]),
)
def test_an_answer_that_cannot_be_read_is_no_traceback(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / control.FILE_NAME))
        listener.listen()

        def say() -> None:
            connection = listener.accept()[0]
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        thread = threading.Thread(target=say)
        thread.start()
        with pytest.raises((ServerSilent, CommandRefused)) as caught:
            control.request(tmp_path, "status", 5)
        thread.join()
        assert caught.value.message
