"""nbdmirror demo: a mirrored volume on this machine, to look at and to play with.

Two replicas, each with a `serve` of its own, as on two machines; one status line for both. Each `serve` is a process
in a session of its own that gets SIGTERM when this one dies, however it dies.
"""

import contextlib
import dataclasses
import itertools
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cli import offline, output
from cli.ask import PROMOTE_S
from cli.create import Wish, make_replica
from cli.parameters import SIZE
from mirror.core.errors import MirrorError, OperatorError
from mirror.core.units import size_text
from nbd_server import config, control, hold, listening
from nbd_server.config import Address, Config, Endpoint, TcpEndpoint

VOLUME = "demo"
NAMES = ("a", "b")
FIRST_PORT = 7000
STATUS_TIMEOUT_S = 2.0
READY_S = 20.0
READY_LOOK_S = 0.1
LINKED = ("Connected", "SyncSource", "SyncTarget")
# `serve` stops within 5 s.
STOP_S = 6.0
LOOK_S = 1.0
LOG_LINES_SHOWN = 8
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command()
@click.option("--directory", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
@click.option("--size", type=SIZE, default="1G", show_default=True, help="Of a volume that is not there yet.")
def demo(directory: Path, size: int) -> None:
    """Run a mirrored volume on this machine.

    Until Ctrl-C. Its data stays in the directory for the next time.

    \b
    Examples:
      nbdmirror demo
      nbdmirror demo --directory /var/tmp/demo --size 10G
    """
    with _stop_asked() as stop:
        pair = Pair(directory.absolute())
        pair.prepare(size)
        try:
            pair.start()
            pair.wait_ready(stop)
            if not stop.is_set():
                output.say(pair.how_to_attach())
            _show(pair, stop)
        finally:
            pair.stop()


@contextlib.contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class Half:
    """One replica and the process that serves it."""

    name: str
    directory: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.directory.with_suffix(".log")

    def ended(self) -> str | None:
        """How its process ended, if it did."""
        code = self.process.poll() if self.process else 0
        if code is None:
            return None
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def status(self) -> dict[str, Any] | str:
        """The live status, or why there is none. Another process may serve it meanwhile."""
        try:
            return control.request(self.directory, "status", STATUS_TIMEOUT_S)
        except control.ServerSilent:
            return "does not answer"
        except MirrorError:
            return self.ended() or "not served"

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])


class Pair:
    """Both replicas."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.halves = [Half(name, directory / name) for name in NAMES]
        # Who was primary last: a stop in order leaves no primary in the metadata.
        self._primary_file = directory / "primary"
        self._endpoints: dict[str, Endpoint] = {}

    # -- before the start

    def prepare(self, size: int) -> None:
        """Have both replicas, with ports that are free."""
        for half in self.halves:
            holder = hold.holder(half.directory)
            if holder is not None:
                raise OperatorError(
                    f"{half.directory} is being served already, by process {holder}",
                    remedy="stop that first, or choose another --directory",
                )
        missing = [half for half in self.halves if not half.directory.exists()]
        if missing:
            self._create(missing, size)
        self._free_ports()

    def _create(self, missing: list[Half], size: int) -> None:
        here = [half for half in self.halves if half not in missing]
        if not here:
            ports = _free_ports(2)
            addresses = dict(zip(NAMES, ports, strict=True))
        else:
            other = config.load(here[0].directory)
            assert other.listen is not None, "a replica of the demo has a peer"
            assert other.peer is not None, "a replica of the demo has a peer"
            addresses = {here[0].name: other.listen, missing[0].name: other.peer}
            size = _size_of(here[0].directory)
            self._primary_file.write_text(f"{here[0].name}\n")
        for half in missing:
            peer = next(address for name, address in addresses.items() if name != half.name)
            wanted = Config(VOLUME, listen=addresses[half.name], peer=peer)
            make_replica(half.directory, wanted, Wish(size, join=bool(here)))
            output.say(f"created {half.directory}, {size_text(size)}{', to be copied from the other' if here else ''}")

    def _free_ports(self) -> None:
        """Replace, in both files, the address of a port that somebody else has taken meanwhile."""
        listens = {half.name: config.load(half.directory).listen for half in self.halves}
        for half in self.halves:
            listen = listens[half.name]
            if listen is None or _is_free(listen):
                continue
            new = next(port for port in _free_ports(3) if port not in listens.values())
            listens[half.name] = new
            output.warn(f"port {listen.port} is in use; replica {half.name} listens at {new.port} from now on")
            for one in self.halves:
                path = one.directory / config.FILE_NAME
                path.write_text(path.read_text().replace(f'"{listen}"', f'"{new}"'))

    # -- the run

    def start(self) -> None:
        """Both as secondary: whichever way the last run ended, they first agree on the data."""
        for half in self.halves:
            self._endpoints[half.name] = self._endpoint(half)
            options = ["--nbd", str(self._endpoints[half.name])]
            # As this command was started; SIGTERM when this process is gone, even by SIGKILL.
            command = ["setpriv", "--pdeathsig", "TERM", "--", sys.executable, sys.argv[0], "serve"]
            with half.log.open("wb") as log:
                half.process = subprocess.Popen(
                    [*command, str(half.directory), *options],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def _endpoint(self, half: Half) -> Endpoint:
        endpoint = config.load(half.directory).endpoint(half.directory)
        try:
            listening.check_socket_path(endpoint)
        except OperatorError:
            return TcpEndpoint(_free_ports(1)[0])  # a deep directory: no unix socket can have such a path
        return endpoint

    def recorded_primary(self) -> str:
        try:
            name = self._primary_file.read_text().strip()
        except FileNotFoundError:
            name = ""
        return name if name in NAMES else NAMES[0]

    def wait_ready(self, stop: threading.Event) -> None:
        """Until they are connected and one is primary. Raises OperatorError with what the log says."""
        for _ in range(int(READY_S / READY_LOOK_S)):
            for half in self.halves:
                if half.ended():
                    raise OperatorError(
                        f"replica {half.name} {half.ended()}; the end of {half.log}:\n{half.last_words()}"
                    )
            states = self.statuses()
            if stop.is_set() or all(isinstance(one, dict) and one["connection"] in LINKED for one in states.values()):
                break
            stop.wait(READY_LOOK_S)
        else:
            output.warn(f"the replicas are not connected after {READY_S:g} s, see {self.directory}/*.log")
        if not stop.is_set():
            self._promote_one()

    def _promote_one(self) -> None:
        """The last primary if it can be, else the other one."""
        refusals = []
        for half in self._primary_first():
            try:
                control.request(half.directory, "promote", PROMOTE_S, force=False)
            except MirrorError as error:
                refusals.append(f"replica {half.name}: {error}")
                continue
            self._primary_file.write_text(f"{half.name}\n")
            return
        raise OperatorError(f"neither replica can be primary: {'; '.join(refusals)}")

    def _primary_first(self) -> list[Half]:
        primary = self.recorded_primary()
        return sorted(self.halves, key=lambda half: half.name != primary)

    def statuses(self) -> dict[str, dict[str, Any] | str]:
        found = {half.name: half.status() for half in self.halves}
        for name, state in found.items():
            if isinstance(state, dict) and state["role"] == "primary" and name != self.recorded_primary():
                self._primary_file.write_text(f"{name}\n")
        return found

    def stop(self) -> None:
        """The primary first, so that it never finds its peer missing; then the other."""
        self.statuses()
        for half in self._primary_first():
            process = half.process
            if process is None:
                continue
            how = half.ended()
            if how is None:
                process.terminate()
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                how = "stopped, clean" if "stopped, clean" in half.last_words() else f"not clean, see {half.log}"
            output.say(f"replica {half.name}: {how}")

    def how_to_attach(self) -> str:
        primary = self.recorded_primary()
        endpoint = self._endpoints[primary]
        uri = endpoint.uri(VOLUME)
        if isinstance(endpoint, TcpEndpoint):
            kernel = f"{endpoint.address.host} {endpoint.address.port} /dev/nbd0"
        else:
            kernel = f"-unix {endpoint.path} /dev/nbd0"
        other = next(half.directory for half in self.halves if half.name != primary)
        return f"""
{uri}

Attach it, one client at a time:
  kernel   sudo modprobe nbd; sudo nbd-client {kernel} -name {VOLUME}
           (then mkfs.ext4 /dev/nbd0 and mount it; in the end: sudo nbd-client -d /dev/nbd0)
  qemu     qemu-img info '{uri}'
           qemu-system-x86_64 -drive format=raw,file='{uri}'
  nbdcopy  nbdcopy SOMEFILE '{uri}'
  fio      fio --name=demo --ioengine=nbd --uri='{uri}' \\
               --rw=randwrite --bs=4k --iodepth=16 --size=256M --time_based --runtime=10

Look:  nbdmirror status {self.directory / primary}
Hand over: nbdmirror switch {other}
Logs:  {self.directory}/*.log
Ctrl-C stops both.
"""


def _size_of(directory: Path) -> int:
    """The size of the volume of a replica that is not being served."""
    known = offline.read(directory).copies.superblock
    if known is None:
        raise OperatorError(f"the metadata of {directory} is damaged", remedy=f"nbdmirror inspect {directory}")
    return known.size_bytes


# -- ports


def _is_free(address: Address) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _free_ports(count: int) -> list[Address]:
    # Counting up from a fixed one: easy to recognise, and below those that the system gives to outgoing connections.
    candidates = (Address("127.0.0.1", port) for port in range(FIRST_PORT, 32768))
    return list(itertools.islice(filter(_is_free, candidates), count))


# -- the status line


def _show(pair: Pair, stop: threading.Event) -> None:
    """One line that changes; in a pipe a line for every change of state."""
    console = Console(highlight=False)
    if not console.is_terminal:
        before = ""
        while not stop.wait(LOOK_S):
            now = _line(pair.statuses(), None)
            if now != before:
                output.say(now)
            before = now
        return
    last: dict[str, int] | None = None
    with Live(Text(""), console=console, auto_refresh=False, transient=True) as live:
        while not stop.is_set():
            states = pair.statuses()
            live.update(Text(_line(states, last or {})), refresh=True)
            last = _counters(states)
            stop.wait(LOOK_S)


def _counters(states: dict[str, dict[str, Any] | str]) -> dict[str, int]:
    return {
        key: sum(state["io"][key] for state in states.values() if isinstance(state, dict))
        for key in ("reads", "writes", "read_bytes", "written_bytes")
    }


def _line(states: dict[str, dict[str, Any] | str], last: dict[str, int] | None) -> str:
    """`last`: the counters a second ago, for rates; None: no rates, which would change each second."""
    parts = []
    for name, state in states.items():
        if isinstance(state, str):
            parts.append(f"{name}: {state.upper()}")
        else:
            parts.append(f"{name}: {state['role']}, {state['disk']}")
    served = [state for state in states.values() if isinstance(state, dict)]
    parts += dict.fromkeys(state["connection"] for state in served)
    if last is None:
        return " | ".join(parts)
    for state in served:
        if state["dirty_bytes"] and state["role"] == "primary":
            parts.append(f"{size_text(state['dirty_bytes'])} dirty")
        resync = state["resync"]
        if resync and resync["total_bytes"] and state["role"] == "primary":
            parts.append(f"resync {100 * resync['done_bytes'] / resync['total_bytes']:.0f} %")
    rates = {key: max(0, now - last.get(key, now)) for key, now in _counters(states).items()}
    parts.append(f"{rates['writes']} writes/s {size_text(rates['written_bytes'])}/s")
    parts.append(f"{rates['reads']} reads/s {size_text(rates['read_bytes'])}/s")
    return " | ".join(parts)
