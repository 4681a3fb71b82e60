"""Compiles what a request passes on its way, with mypyc, into a copy of the product: see nbd_server/compiled.py.

Run by setup/install.sh; done in a blink when the copy is of these very sources.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nbd_server import compiled  # noqa: E402

# What is left out: what no request passes, and what computes for long without waiting. Compiled code does not let other
# threads run in between, as interpreted code does every 5 ms.
MODULES = (
    "mirror/batches.py",
    "mirror/change.py",
    "mirror/confirmer.py",
    "mirror/core/activity_log.py",
    "mirror/core/commits.py",
    "mirror/core/dirty_map.py",
    "mirror/core/histogram.py",
    "mirror/core/in_flight.py",
    "mirror/core/log_size.py",
    "mirror/core/parked.py",
    "mirror/core/range_lock.py",
    "mirror/core/spin.py",
    "mirror/core/stages.py",
    "mirror/core/unflushed.py",
    "mirror/core/wire.py",
    "mirror/deferred.py",
    "mirror/flush.py",
    "mirror/link.py",
    "mirror/log_writer.py",
    "mirror/parking.py",
    "mirror/primary.py",
    "mirror/replica.py",
    "mirror/running.py",
    "mirror/secondary.py",
    "mirror/session.py",
    "mirror/spans.py",
    "mirror/store/data_file.py",
    "mirror/store/files.py",
    "mirror/store/parked_file.py",
    "mirror/suspects.py",
    "mirror/trace.py",
    "nbd_server/requests.py",
)


def main() -> None:
    if compiled.import_root() == compiled.COPY:
        return
    print(f"setup: compiling {len(MODULES)} modules (a minute or two)", flush=True)
    fingerprint = compiled.fingerprint(ROOT)
    with tempfile.TemporaryDirectory(prefix="compiled-", dir=compiled.COPY.parent) as directory:
        copy = Path(directory) / "copy"
        for path in compiled.sources(ROOT):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        with open(Path(directory) / "log", "w+") as log:
            try:
                build(Path(directory), copy, log.fileno())
            except BaseException:
                log.seek(0)
                sys.stderr.write(log.read())
                raise
        (copy / compiled.MADE_FROM).write_text(fingerprint)
        shutil.rmtree(compiled.COPY, ignore_errors=True)
        copy.rename(compiled.COPY)


def build(directory: Path, copy: Path, log: int) -> None:
    """Lay the shared libraries beside the modules of the copy; what the tools say goes to the descriptor `log`."""
    import setuptools
    from mypyc.build import mypycify

    with contextlib.chdir(ROOT):
        said = os.dup(1), os.dup(2)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            modules = mypycify(list(MODULES), group_name="nbdmirror", target_dir=str(directory / "c"))
            setuptools.setup(
                name="nbdmirror",
                packages=[],
                ext_modules=modules,
                script_args=["build_ext", "--build-lib", str(copy), "--build-temp", str(directory / "objects")],
            )
        finally:
            for number, descriptor in enumerate(said, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


main()
