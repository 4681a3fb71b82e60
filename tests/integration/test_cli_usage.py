"""Help, exit statuses, and what a terminal gets that a pipe does not."""

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from tests.integration.cluster import NBDMIRROR, Cluster, nbdmirror

VERBS = [
    *("create", "serve", "status", "why-slow", "promote", "demote", "switch"),
    *("connect", "disconnect", "diff", "verify", "resize", "invalidate", "inspect", "destroy", "demo"),
]


def test_help_lists_the_verbs_and_each_has_examples() -> None:
    overview = nbdmirror("--help").stdout
    assert re.findall(r"^  ([a-z-]+) {2,}\S", overview, re.MULTILINE)[-len(VERBS) :] == VERBS
    for verb in VERBS:
        text = nbdmirror(verb, "--help").stdout
        assert "Example" in text
        assert f"nbdmirror {verb}" in text


@pytest.mark.parametrize("words", [[], ["frobnicate"], ["status"], ["status", "a", "b"], ["promote", "a", "--farce"]])
def test_wrong_usage_is_exit_status_2(words: list[str]) -> None:
    done = nbdmirror(*words, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: nbdmirror" in done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["status", "--json"], 1),
        (["status", "--json", "--watch"], 1),
        (["connect", "--json", "--dry-run"], 1),
        (["why-slow", "--json"], 1),
        (["diff", "--json"], 3),
        (["verify", "--json"], 3),
        (["verify", "--json", "--stop"], 3),
        (["verify", "--json", "--background"], 3),
    ],
)
def test_an_error_is_an_object_too_where_json_was_asked_for(tmp_path: Path, words: list[str], code: int) -> None:
    plain = nbdmirror(words[0], tmp_path / "nothing", *[word for word in words[1:] if word != "--json"], check=False)
    assert (plain.returncode, plain.stdout) == (code, "")
    done = nbdmirror(words[0], tmp_path / "nothing", *words[1:], check=False)
    assert (done.returncode, done.stderr) == (code, plain.stderr)
    told = json.loads(done.stdout)
    assert set(told) == {"error", "remedy"}
    assert told["error"] in done.stderr
    assert told["remedy"] in done.stderr


def test_a_version_is_told() -> None:
    assert re.fullmatch(r"nbdmirror \d+\.\d+\.\d+\n", nbdmirror("--version").stdout)


def on_terminal(*words: str, **environment: str) -> bytes:
    """What the command writes to a terminal."""
    main, terminal = pty.openpty()
    with subprocess.Popen(
        [NBDMIRROR, *words], stdin=terminal, stdout=terminal, stderr=terminal, env={**os.environ, **environment}
    ) as process:
        os.close(terminal)
        seen = b""
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # the terminal's end, as Linux tells it
                break
            if not part:
                break
            seen += part
        process.wait(10)
    os.close(main)
    return seen


def test_colours_on_a_terminal_only_and_never_with_no_color(tmp_path: Path) -> None:
    replica = tmp_path / "a"
    nbdmirror("create", replica, "--name", "vol", "--size", "1M")
    assert b"\x1b[" in on_terminal("status", str(replica), TERM="xterm", NO_COLOR="")
    colour = re.compile(rb"\x1b\[[0-9;]*3[0-7]m")
    assert colour.search(on_terminal("status", str(replica), TERM="xterm", NO_COLOR=""))
    assert not colour.search(on_terminal("status", str(replica), TERM="xterm", NO_COLOR="1"))
    assert "\x1b" not in nbdmirror("status", replica).stdout


def test_output_cut_short_is_no_stack(tmp_path: Path) -> None:
    replica = tmp_path / "a"
    nbdmirror("create", replica, "--name", "vol", "--size", "1M")
    done = subprocess.run(
        f"{NBDMIRROR} inspect {replica} | head -n 0",
        shell=True,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.stderr == ""


def test_discard_asks_on_a_terminal_only(cluster: Cluster) -> None:
    a = cluster.standalone().serve()
    for options in ((), ("--yes",)):
        done = a.command("connect", "--discard-my-data", *options, check=False)
        assert done.returncode == 1
        assert "stands alone" in done.stderr
