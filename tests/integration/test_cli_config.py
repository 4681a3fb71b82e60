"""A wrong volume.toml: `serve` and `status` name the file and the key or line, say what to do, and exit with 1."""

from pathlib import Path

import pytest

from tests.integration.cluster import nbdmirror

WRONG = {
    "no toml": ("foo", ["line 1", "not valid TOML"]),
    "half a line": ('name = "vol"\n\nprotocol\n', ["line 3", "not valid TOML"]),
    "empty": ("", ["`name`", "missing"]),
    "misspelt": ('name = "vol"\npeer_timeout = 1', ["`peer_timeout`", "`peer_timeout_s`"]),
    "unknown": ('name = "vol"\nfoo = 1', ["`foo`", "known keys"]),
    "half a pair": ('name = "vol"\npeer = "tcp://127.0.0.1:7000"', ["`listen`", "missing"]),
    "wrong kind": ('name = "vol"\npeer_timeout_s = "two"', ["`peer_timeout_s`", "number"]),
    "out of range": ('name = "vol"\nactivity_log_extents = 1', ["`activity_log_extents`", "64"]),
    "wrong choice": ('name = "vol"\nprotocol = "X"', ["`protocol`", '"X"']),
    "wrong address": ('name = "vol"\nlisten = "x"\npeer = "y"', ["`listen`", "tcp://"]),
    "wrong name": ('name = "a/b"', ["`name`", "letters"]),
    "another name": ('name = "other"', ["'other'", "'vol'"]),
    "not text": (b'name = "\xff"', ["line 1", "UTF-8"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_serve_names_what_is_wrong(tmp_path: Path, case: str) -> None:
    contents, words = WRONG[case]
    replica = tmp_path / "a"
    nbdmirror("create", replica, "--name", "vol", "--size", "1M")
    file = replica / "volume.toml"
    file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    done = nbdmirror("serve", replica, check=False)
    assert done.returncode == 1, done
    assert [word for word in [*words, "volume.toml", "what to do"] if word not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["serve", "status", "inspect", "promote", "connect", "invalidate"])
def test_a_directory_that_is_no_replica(tmp_path: Path, verb: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, words in (("none", "does not exist"), ("empty", "is not a replica"), ("file", "not a directory")):
        done = nbdmirror(verb, tmp_path / name, check=False)
        assert done.returncode == 1, done
        assert words in done.stderr
        assert "what to do" in done.stderr
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_lost_configuration_is_told_apart_from_no_replica(tmp_path: Path) -> None:
    replica = tmp_path / "a"
    nbdmirror("create", replica, "--name", "vol", "--size", "1M")
    (replica / "volume.toml").unlink()
    done = nbdmirror("serve", replica, check=False)
    assert done.returncode == 1
    assert "metadata but no volume.toml" in done.stderr
    inspected = nbdmirror("inspect", replica, check=False)
    assert inspected.returncode == 1
    assert "vol, 1 MiB" in inspected.stdout
