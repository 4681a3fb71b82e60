"""Which copy of the product nbdkit runs: the compiled one that `make setup` left, if it was made of these sources.

What a request passes on its way is compiled by mypyc (setup/compile.py has the list), from the very files that run
without it too: half of what Python takes for a write is gone then, and nothing else changes. The copy lies in the
virtual environment and not beside the sources, so whoever changes those and forgets to set up runs what he wrote.
"""

import hashlib
import sys
from pathlib import Path

from mirror.core import stages

PACKAGES = ("mirror", "nbd_server")
SOURCES = Path(__file__).resolve().parent.parent
COPY = Path(sys.prefix) / "compiled"
# In the copy: the fingerprint of its sources.
MADE_FROM = "made-from"


def sources(root: Path) -> list[Path]:
    """Of the packages in this directory, in an order that lasts."""
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def fingerprint(root: Path) -> str:
    """Of all that the copy is made of: these sources, for this Python."""
    digest = hashlib.sha256(repr(sys.version_info[:2]).encode())
    for path in sources(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def import_root() -> Path:
    """The directory that nbdkit's Python imports the packages from."""
    try:
        fresh = (COPY / MADE_FROM).read_text() == fingerprint(SOURCES)
    except FileNotFoundError:
        fresh = False
    return COPY if fresh else SOURCES


def is_running() -> bool:
    """Whether this process runs the compiled copy."""
    # Any of those that are compiled; this one brings nothing else with it.
    return not str(stages.__file__).endswith(".py")
