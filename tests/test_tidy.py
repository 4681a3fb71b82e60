"""The house rules, as far as a program can hold them, and tests of the rules themselves.

A rule takes a file and says what is wrong with it, in lines that a reader can act on. What the linters know already
(unused names, formatting) is left to them; what they know and anybody could switch off with a comment is here again.
"""

import ast
import configparser
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINE_CHARACTERS_MAX = 120

# Who stands on whom: each package may import itself and what is named here.
MAY_IMPORT = {
    "mirror.core": set(),
    "mirror": {"mirror.core"},
    "nbd_server": {"mirror", "mirror.core"},
    "cli": {"nbd_server", "mirror", "mirror.core"},
    "bench": set(),
}
PRODUCT = ("mirror", "nbd_server", "cli")
FOLDERS = (*PRODUCT, "bench", "tests")
# From outside, by what a user has: processes, sockets, files.
FROM_OUTSIDE = ("tests/integration", "tests/kernel", "bench")

# All that the core may import: nothing that reads, writes, waits, locks, tells the time or draws a number.
CORE_IMPORTS = {
    "bisect",
    "collections",
    "collections.abc",
    "dataclasses",
    "enum",
    "errno",
    "functools",
    "hashlib",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "re",
    "struct",
    "typing",
    # The checksum, a function of bytes.
    "crc32c",
    "google_crc32c",
}
CORE_CALLS_NEVER = {"open", "print", "input", "exec", "eval", "__import__"}

# What runs without being imported, and who runs it.
ENTRY_POINTS = {
    "nbd_server/plugin.py": "nbdkit loads it",
    "bench/__main__.py": "python -m bench",
    "bench/bare_plugin.py": "nbdkit loads it",
    "bench/profile.py": "python -m bench.profile",
    "tests/sim/__main__.py": "python -m tests.sim",
    "tests/integration/writer.py": "a client process that tests start and kill",
    "tests/kernel/ask.py": "tests run it in a guest",
    "tests/crash/loader/sitecustomize.py": "Python loads it where a test asks for crash points",
}
# Beside an `except` that may catch everything and not raise it again: what it is the outermost call of.
OUTERMOST = "outermost"


@dataclass(frozen=True)
class Source:
    """A Python file of the project; `path` is relative to its root, with slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        """The layer it belongs to."""
        return "mirror.core" if self.path.startswith("mirror/core/") else self.path.split("/")[0]

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """Line and name of everything imported: modules, and what is taken out of them as if it were one."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found += [(node.lineno, node.module or "")]
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        return found

    def line(self, number: int) -> str:
        return self.text.splitlines()[number - 1]


def layer_of(module: str) -> str | None:
    """The package of the project that a module is in, None for everybody else's."""
    parts = module.split(".")
    if parts[:2] == ["mirror", "core"]:
        return "mirror.core"
    return parts[0] if parts[0] in FOLDERS else None


# -- rules ------------------------------------------------------------------------------------------------------------


def imports_point_one_way(source: Source) -> Iterator[str]:
    for number, name in source.imports:
        layer = layer_of(name)
        if layer is None or layer == source.package or layer in MAY_IMPORT.get(source.package, {layer}):
            continue
        # `from mirror import core` is an import of the package above the layer, not of all that is in it.
        if any(other.startswith(f"{name}.") for line, other in source.imports if line == number):
            continue
        yield f"{source.path}:{number}: {source.package} may not import {name}"


def outside_tests_import_no_product(source: Source) -> Iterator[str]:
    if source.path.startswith(FROM_OUTSIDE):
        for number, name in source.imports:
            if layer_of(name) in ("mirror.core", *PRODUCT):
                yield f"{source.path}:{number}: looks at the product from outside and imports {name}"


def core_is_pure(source: Source) -> Iterator[str]:
    if source.package != "mirror.core":
        return
    for node in ast.walk(source.tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name not in CORE_IMPORTS and layer_of(name) != "mirror.core":
                yield f"{source.path}:{node.lineno}: the core is pure and may not import {name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CORE_CALLS_NEVER:
            yield f"{source.path}:{node.lineno}: the core is pure and may not call {node.func.id}"


def no_broad_except(source: Source) -> Iterator[str]:
    """What catches everything raises it again, or is marked as the outermost call of a thread or process."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler) or not _is_broad(node.type):
            continue
        last = node.body[-1]
        if isinstance(last, ast.Raise) and last.exc is None:
            continue
        if OUTERMOST in source.line(node.lineno).partition("#")[2] and source.package != "mirror.core":
            continue
        yield f"{source.path}:{node.lineno}: a broad except that neither ends in `raise` nor is marked {OUTERMOST!r}"


def _is_broad(caught: ast.expr | None) -> bool:
    if caught is None:
        return True
    if isinstance(caught, ast.Tuple):
        return any(_is_broad(one) for one in caught.elts)
    return isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException")


def no_print(source: Source) -> Iterator[str]:
    if source.package in ("cli", "bench"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{source.path}:{node.lineno}: print; log it, return it, or raise it"


def no_sleep_in_tests(source: Source) -> Iterator[str]:
    if source.package != "tests":
        return
    for node in ast.walk(source.tree):
        sleeps = isinstance(node, ast.Attribute) and node.attr == "sleep"
        taken = isinstance(node, ast.ImportFrom) and any(alias.name == "sleep" for alias in node.names)
        if sleeps or taken:
            yield f"{source.path}:{node.lineno}: a sleep; wait for what the test is about"


def lines_fit(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), start=1):
        # A remark to a tool at the end does not count, as with the linter.
        if len(re.sub(r"  # (type: ignore|noqa).*", "", line)) > LINE_CHARACTERS_MAX:
            yield f"{source.path}:{number}: {len(line)} characters, at most {LINE_CHARACTERS_MAX} fit"


def modules_say_what_they_are(source: Source) -> Iterator[str]:
    if source.text.strip() and not ast.get_docstring(source.tree):
        yield f"{source.path}:1: a module opens with what it is and what it promises"


def limits_have_reasons(source: Source) -> Iterator[str]:
    """In limits.py a comment stands above each constant, or above the group that it follows without a gap."""
    if source.path != "mirror/core/limits.py":
        return
    lines = source.text.splitlines()
    for node in source.tree.body:
        if not isinstance(node, ast.Assign):
            continue
        above = node.lineno - 2
        while above >= 0 and lines[above].strip() and not lines[above].startswith("#"):
            above -= 1
        names = ", ".join(target.id for target in node.targets if isinstance(target, ast.Name))
        if names not in ("KIB", "MIB", "GIB") and not (above >= 0 and lines[above].startswith("#")):
            yield f"{source.path}:{node.lineno}: {names} has no reason above it"


RULES: tuple[Callable[[Source], Iterator[str]], ...] = (
    imports_point_one_way,
    outside_tests_import_no_product,
    core_is_pure,
    no_broad_except,
    no_print,
    no_sleep_in_tests,
    lines_fit,
    modules_say_what_they_are,
    limits_have_reasons,
)


def unused_files(sources: Iterable[Source], entry_points: Iterable[str]) -> Iterator[str]:
    """Files that nothing imports. A file of the product that tests alone import is unused too."""
    sources = list(sources)
    importers: dict[str, set[str]] = {}
    for source in sources:
        for _, name in source.imports:
            importers.setdefault(name, set()).add(source.package)
    for source in sources:
        name = Path(source.path).name
        by_pytest = source.package == "tests" and (name == "conftest.py" or name.startswith("test_"))
        if source.path in entry_points or name == "__init__.py" or by_pytest:
            continue
        used_by = importers.get(source.module, set())
        if source.package != "tests":
            used_by = used_by - {"tests"}
        if not used_by:
            yield f"{source.path}: nothing imports it"


# -- the project ------------------------------------------------------------------------------------------------------


def project() -> list[Source]:
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


def console_scripts() -> list[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    return [script.partition("=")[2].strip().partition(":")[0].replace(".", "/") + ".py" for script in scripts]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_is_tidy(rule: Callable[[Source], Iterator[str]]) -> None:
    wrong = [line for source in project() for line in rule(source)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_file_is_used() -> None:
    wrong = list(unused_files(project(), [*ENTRY_POINTS, *console_scripts()]))
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_entry_point_is_there() -> None:
    for path in (*ENTRY_POINTS, *console_scripts()):
        assert (ROOT / path).is_file(), path


# -- the rules --------------------------------------------------------------------------------------------------------

DOC = '"""What it is."""\n'

# (rule, path, text, complaints)
EXAMPLES = [
    (imports_point_one_way, "mirror/a.py", "from mirror.core import limits", 0),
    (imports_point_one_way, "mirror/a.py", "import mirror.core.limits\nimport os", 0),
    (imports_point_one_way, "mirror/a.py", "from nbd_server import config", 1),
    (imports_point_one_way, "mirror/a.py", "import cli.main", 1),
    (imports_point_one_way, "mirror/a.py", "def f():\n    from tests import x", 1),
    (imports_point_one_way, "mirror/core/a.py", "from mirror.core.errors import MirrorError", 0),
    (imports_point_one_way, "mirror/core/a.py", "from mirror.store import Store", 1),
    (imports_point_one_way, "mirror/core/a.py", "from mirror import store", 1),
    (imports_point_one_way, "nbd_server/a.py", "from mirror.store import Store", 0),
    (imports_point_one_way, "nbd_server/a.py", "from cli import output", 1),
    (imports_point_one_way, "cli/a.py", "from nbd_server.config import load\nfrom mirror.core import errors", 0),
    (imports_point_one_way, "cli/a.py", "import bench", 1),
    (imports_point_one_way, "bench/a.py", "from bench import b", 0),
    (imports_point_one_way, "bench/a.py", "from mirror.core import limits", 1),
    (imports_point_one_way, "tests/unit/test_a.py", "from mirror.core import limits", 0),
    (outside_tests_import_no_product, "tests/integration/test_a.py", "from tests.integration import cluster", 0),
    (outside_tests_import_no_product, "tests/integration/test_a.py", "from mirror.core import limits", 2),
    (outside_tests_import_no_product, "tests/unit/test_a.py", "from mirror.core import limits", 0),
    (core_is_pure, "mirror/core/a.py", "import struct\nfrom collections.abc import Callable\nimport enum", 0),
    (core_is_pure, "mirror/core/a.py", "import time", 1),
    (core_is_pure, "mirror/core/a.py", "from threading import Lock", 1),
    (core_is_pure, "mirror/core/a.py", "import os, random, socket", 3),
    (core_is_pure, "mirror/core/a.py", "from mirror.runtime import Runtime", 1),
    (core_is_pure, "mirror/core/a.py", "def f(p):\n    return open(p)", 1),
    (core_is_pure, "mirror/a.py", "import time\nopen('x')", 0),
    (no_broad_except, "mirror/a.py", "try:\n    f()\nexcept OSError:\n    pass", 0),
    (no_broad_except, "mirror/a.py", "try:\n    f()\nexcept BaseException:\n    g()\n    raise", 0),
    (no_broad_except, "mirror/a.py", "try:\n    f()\nexcept Exception:\n    pass", 1),
    (no_broad_except, "mirror/a.py", "try:\n    f()\nexcept:\n    pass", 1),
    (no_broad_except, "mirror/a.py", "try:\n    f()\nexcept (OSError, Exception) as e:\n    raise E from e", 1),
    (no_broad_except, "mirror/a.py", "try:\n    f()\nexcept Exception:  # noqa: BLE001  outermost call\n    pass", 0),
    (no_broad_except, "mirror/core/a.py", "try:\n    f()\nexcept Exception:  # outermost call\n    pass", 1),
    (no_broad_except, "mirror/a.py", "try:\n    f()\nexcept Exception:  # noqa: BLE001\n    pass", 1),
    (no_print, "mirror/a.py", "print('x')", 1),
    (no_print, "nbd_server/a.py", "def f():\n    print('x')", 1),
    (no_print, "cli/a.py", "print('x')", 0),
    (no_print, "mirror/a.py", "log.print('x')  # print('x')", 0),
    (no_sleep_in_tests, "tests/unit/test_a.py", "import time\ntime.sleep(1)", 1),
    (no_sleep_in_tests, "tests/unit/test_a.py", "from time import sleep", 1),
    (no_sleep_in_tests, "tests/unit/test_a.py", "import time\nwait = time.sleep", 1),
    (no_sleep_in_tests, "tests/unit/test_a.py", "run(['sleep', '1'])  # time.sleep", 0),
    (no_sleep_in_tests, "cli/a.py", "import time\ntime.sleep(1)", 0),
    (lines_fit, "mirror/a.py", "x = 1  # " + "y" * 120, 1),
    (lines_fit, "mirror/a.py", "#" * 120, 0),
    (lines_fit, "mirror/a.py", "x = " + "y" * 110 + "  # type: ignore[attr-defined]", 0),
    (modules_say_what_they_are, "mirror/a.py", DOC, 0),
    (modules_say_what_they_are, "mirror/a.py", "x = 1", 1),
    (modules_say_what_they_are, "mirror/__init__.py", "", 0),
    (limits_have_reasons, "mirror/core/limits.py", "KIB = 1024\n\n# Why.\nA = 1\nB = 2\n\n# Why too.\nC = 3", 0),
    (limits_have_reasons, "mirror/core/limits.py", "# Why.\nA = 1\n\nB = 2", 1),
    (limits_have_reasons, "mirror/core/other.py", "A = 1", 0),
]


@pytest.mark.parametrize(("rule", "path", "text", "complaints"), EXAMPLES)
def test_each_rule_sees_what_it_is_for(
    rule: Callable[[Source], Iterator[str]], path: str, text: str, complaints: int
) -> None:
    assert len(list(rule(Source(path, text)))) == complaints


def test_every_rule_has_an_example_of_either_kind() -> None:
    for rule in RULES:
        seen = {bool(complaints) for one, _, _, complaints in EXAMPLES if one is rule}
        assert seen == {False, True}, rule.__name__


def test_unused_files_are_found() -> None:
    sources = [
        Source("mirror/__init__.py", ""),
        Source("mirror/used.py", ""),
        Source("mirror/tested.py", ""),
        Source("mirror/lonely.py", "from mirror import used"),
        Source("cli/main.py", "from mirror.lonely import x"),
        Source("tests/helper.py", ""),
        Source("tests/unit/conftest.py", ""),
        Source("tests/unit/test_a.py", "from mirror import tested"),
    ]
    found = [line.partition(":")[0] for line in unused_files(sources, ["cli/main.py"])]
    assert found == ["mirror/tested.py", "tests/helper.py"]


def test_every_described_target_of_the_makefile_is_phony() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert sorted(phony[0].split()) == sorted(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))


def test_the_core_list_names_no_module_with_a_clock_or_a_socket() -> None:
    impure = {
        "time",
        "os",
        "threading",
        "random",
        "socket",
        "asyncio",
        "subprocess",
        "secrets",
        "io",
        "select",
        "datetime",
    }
    assert impure <= sys.stdlib_module_names
    assert not impure & CORE_IMPORTS
