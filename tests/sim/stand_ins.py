"""What the product imports in place of `os`, `select`, `socket` and `time`: it goes on to the real one or to a life's.

A compiled module keeps what its `import os` gave it where nobody else reaches it. So all of `mirror` is imported here,
once, with these in the place of the real modules; then a life need only say what they go on to.
"""

import importlib
import os
import pkgutil
import select
import socket
import sys
import time
from types import ModuleType
from typing import Any

from tests.sim import small  # isort: skip  the limits come before the product

import mirror

assert small.SMALL
assert "mirror.link" not in sys.modules, "the product was imported with the real modules before"


class StandIn:
    """Has whatever `target` has."""

    def __init__(self, real: ModuleType) -> None:
        self.target: Any = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


OS, SELECT, SOCKET, TIME = (StandIn(module) for module in (os, select, socket, time))


def _import_product() -> None:
    own = {"os": OS, "select": SELECT, "socket": SOCKET, "time": TIME}
    real = {name: sys.modules[name] for name in own}
    sys.modules.update(own)  # type: ignore[arg-type]
    try:
        for module in pkgutil.walk_packages(mirror.__path__, "mirror."):
            importlib.import_module(module.name)
    finally:
        sys.modules.update(real)
    # Not for what it imported in passing.
    for name, module in list(sys.modules.items()):
        for key, value in list(vars(module).items()):
            if isinstance(value, StandIn) and not name.startswith(("mirror.", __name__)):
                setattr(module, key, value.target)


_import_product()
