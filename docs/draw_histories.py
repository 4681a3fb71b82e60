"""Draws docs/pictures/*.svg and writes the table of docs/histories.md: `make pictures`.

Each picture is a story told with the functions of mirror.core.generation, and its end is what the table decides about
the two standings that come of it: a picture can't show anything else than what the program does. A test keeps the files
equal to what this program makes of the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from types import SimpleNamespace

from mirror.core import generation
from mirror.core.generation import NO_VOLUME, TABLE, Action, Generations, Kind, Outcome, Standing, decide
from mirror.core.policy import REFUSE_ALWAYS, Policies, Policy
from mirror.core.states import DiskState, Role

HERE = Path(__file__).resolve().parent
PAGE = HERE / "histories.md"
BEGIN, END = "<!-- the table: written by draw_histories.py -->", "<!-- the end of the table -->"

# -- stories ----------------------------------------------------------------------------------------------------------

LANES = {"a": 78, "b": 168}
FIRST_X, STEP_X = 70, 112
COLOURS = ("#5b6b7b", "#2471a3", "#c0661a", "#1e8449", "#7d3c98", "#a93226")
VOLUME = b"v" * 16


@dataclass
class Replica:
    """One lane: what it would say of itself now, and where its line has come to."""

    standing: Standing
    x: int = FIRST_X
    dead: bool = False


@dataclass
class Story:
    """Builds two standings and their picture, event by event, from left to right."""

    name: str
    title: str
    policies: Policies = REFUSE_ALWAYS
    # What lies under everything else, the lanes, and the rest.
    ground: list[str] = field(default_factory=list)
    lanes: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    x: int = FIRST_X
    next_number: int = 1
    names: dict[int, str] = field(default_factory=dict)
    linked_from: int | None = None
    # The last generation's circle.
    drawn_at: tuple[str, int] = ("", 0)

    def __post_init__(self) -> None:
        self.replicas = {name: Replica(self._first(name)) for name in LANES}

    def _first(self, name: str) -> Standing:
        return Standing(
            replica_id=name.encode() * 16,
            volume_id=VOLUME,
            name="vol",
            size_bytes=1 << 30,
            next_size_bytes=0,
            kind=Kind.ESTABLISHED,
            role=Role.SECONDARY,
            disk=DiskState.UP_TO_DATE,
            current=self.number(0),
            base=0,
            history=(),
            crashed_primary=False,
            kept_memory=True,
            dirty_blocks=0,
            met_peer=True,
            discard_my_data=False,
            policies=self.policies,
        )

    def number(self, offset: int = 1) -> int:
        """A new generation, numbered from 2 as it comes (1 is day 0); the first one is common."""
        self.next_number += offset
        number = self.next_number + 1
        self.names.setdefault(number, f"g{len(self.names) + 1}")
        return number

    def change(self, name: str, **changes: object) -> None:
        known = self.replicas[name]
        known.standing = replace(known.standing, **changes)  # type: ignore[arg-type]

    def at(self, name: str, generations: Generations) -> None:
        self.change(name, **generations._asdict())

    # Events

    def in_step(self, primary: str = "a") -> "Story":
        self.change(primary, role=Role.PRIMARY)
        for name in LANES:
            self._new_generation(name)
            self._word(name, "primary" if name == primary else "secondary", below=name == "b")
        self.linked_from = self.x
        return self._on()

    def separate(self, **kinds: dict[str, object]) -> "Story":
        """They have never met: each with these changes to its standing."""
        for name, changes in kinds.items():
            self.change(name, met_peer=False, **changes)
            self._new_generation(name)
            self._word(name, str(self.replicas[name].standing.kind.value), below=name == "b")
        return self._on()

    def write(self, name: str = "") -> "Story":
        """Together, or alone: then a new generation first (record-before-ack-alone)."""
        if not name:
            return self._event("a", "writes", both=True)
        known = self.replicas[name].standing
        if known.current in (self._common(), *self._other(name).history) or known.kind is not Kind.ESTABLISHED:
            self.at(name, generation.moved_on(known, self.number()))
            self._new_generation(name)
        self.change(name, dirty_blocks=known.dirty_blocks + 3, kind=Kind.ESTABLISHED)
        return self._event(name, "writes alone")

    def promote(self, name: str, forced: bool = False) -> "Story":
        known = self.replicas[name].standing
        volume = known.volume_id if known.volume_id != NO_VOLUME else name.encode() * 16
        self.at(name, generation.moved_on(known, self.number()))
        self.change(name, role=Role.PRIMARY, disk=DiskState.UP_TO_DATE, kind=Kind.ESTABLISHED, volume_id=volume)
        self._new_generation(name)
        return self._event(name, "promoted\nby --force" if forced else "promoted")

    def demote(self, name: str) -> "Story":
        self.change(name, role=Role.SECONDARY)
        return self._event(name, "demoted")

    def cut(self, open_blocks: int = 0) -> "Story":
        """The link is lost; what was written since the last flush of both is dirty on the primary."""
        self._unlink()
        for name, known in self.replicas.items():
            if known.standing.role is Role.PRIMARY:
                self.change(name, dirty_blocks=open_blocks)
            else:
                self.change(name, disk=DiskState.CONSISTENT)
        x, middle = self.x, sum(LANES.values()) // 2
        self.shapes.append(f'<path d="M{x - 7},{middle + 7} l14,-14 m0,14 l-14,-14" class="cut"/>')
        self.shapes.append(_text(x + 14, middle + 4, "link lost", "start"))
        return self._on()

    def outdate(self, name: str) -> "Story":
        self._unlink()
        self.change(name, disk=DiskState.OUTDATED)
        return self._event(name, "left behind:\nOutdated")

    def kill(self, name: str, power: bool = False) -> "Story":
        known = self.replicas[name].standing
        if self.linked_from is not None:
            self._unlink()
        crashed = known.crashed_primary or known.role is Role.PRIMARY
        self.change(
            name,
            role=Role.SECONDARY,
            crashed_primary=crashed,
            kept_memory=known.kept_memory and not power,
            dirty_blocks=max(known.dirty_blocks, 3 if crashed else 0),
        )
        self._event(name, "loses power" if power else "killed")
        lane, x = LANES[name], self.x - STEP_X
        self.shapes.append(f'<path d="M{x - 6},{lane + 6} l12,-12 m0,12 l-12,-12" class="death"/>')
        return self

    def resync_interrupted(self, source: str, target: str) -> "Story":
        """A resync by bitmap began, and did not end."""
        self.change(target, disk=DiskState.INCONSISTENT)
        self.change(source, dirty_blocks=2)
        self._copy(source, target, "breaks off", broken=True)
        return self._on()

    def untracked(self, name: str) -> "Story":
        self.at(name, generation.untracked(self.replicas[name].standing, self.number()))
        self._new_generation(name)
        return self._event(name, "serves with no\npeer, no map")

    def tell(self, name: str) -> "Story":
        self.change(name, discard_my_data=True)
        return self._event(name, "connect\n--discard-my-data")

    # Drawing

    def _common(self) -> int:
        return min(known.standing.current for known in self.replicas.values())

    def _other(self, name: str) -> Standing:
        return self.replicas["b" if name == "a" else "a"].standing

    def _on(self) -> "Story":
        self.x += STEP_X
        for name in LANES:
            self._line(name, self.x)
        return self

    def _line(self, name: str, until: int) -> None:
        known = self.replicas[name]
        colour = COLOURS[self._index(known.standing.current)]
        self.lanes.append(f'<path d="M{known.x},{LANES[name]} H{until}" stroke="{colour}" class="lane"/>')
        known.x = until

    def _index(self, number: int) -> int:
        return list(self.names).index(number) % len(COLOURS)

    def _new_generation(self, name: str) -> None:
        known = self.replicas[name].standing
        lane, colour = LANES[name], COLOURS[self._index(known.current)]
        self.shapes.append(f'<circle cx="{self.x}" cy="{lane}" r="11" fill="{colour}"/>')
        self.drawn_at = name, self.x
        label = self.names[known.current]
        self.shapes.append(f'<text x="{self.x}" y="{lane + 4}" text-anchor="middle" class="generation">{label}</text>')

    def _word(self, name: str, word: str, below: bool) -> None:
        parts = word.split("\n")
        first = 27 if below else -18 - 14 * (len(parts) - 1)
        for number, part in enumerate(parts):
            self.shapes.append(_text(self.x, LANES[name] + first + 14 * number, part, "middle"))

    def _event(self, name: str, word: str, both: bool = False) -> "Story":
        lane = LANES[name]
        if both:
            for one in LANES.values():
                self.shapes.append(f'<circle cx="{self.x}" cy="{one}" r="4" class="event"/>')
        elif self.drawn_at != (name, self.x):
            self.shapes.append(f'<circle cx="{self.x}" cy="{lane}" r="4" class="event"/>')
        self._word(name, word, below=name == "b")
        return self._on()

    def _unlink(self) -> None:
        if self.linked_from is not None:
            top, bottom = LANES.values()
            width = self.x - self.linked_from
            band = f'<rect x="{self.linked_from}" y="{top}" width="{width}" height="{bottom - top}" class="linked"/>'
            self.ground.append(band)
            self.linked_from = None

    def _copy(self, source: str, target: str, word: str, broken: bool = False) -> None:
        begin, end = LANES[source], LANES[target]
        way = 1 if end > begin else -1
        until = end - 16 * way if not broken else (begin + end) // 2
        self.shapes.append(f'<path d="M{self.x},{begin + 12 * way} V{until}" class="copy" marker-end="url(#tip)"/>')
        self.shapes.append(_text(self.x + 12, (begin + end) // 2 + 4, word, "start"))

    def outcome(self) -> Outcome:
        return decide(self.replicas["a"].standing, self.replicas["b"].standing)

    def svg(self) -> str:
        """They meet: what the table says."""
        self._unlink()
        outcome = self.outcome()
        top, bottom = LANES.values()
        self.shapes.append(f'<path d="M{self.x},{top - 34} V{bottom + 34}" class="meet"/>')
        self.shapes.append(_text(self.x, top - 40, "they meet", "middle"))
        if outcome.action in (Action.SOURCE_BITMAP, Action.SOURCE_FULL):
            self._copy("a", "b", _copied(outcome.action))
        elif outcome.action in (Action.TARGET_BITMAP, Action.TARGET_FULL):
            self._copy("b", "a", _copied(outcome.action))
        else:
            word = {Action.NONE: "equal", Action.WAIT: "wait", Action.REFUSE: "refused"}
            sign = word.get(outcome.action, "split brain")
            self.shapes.append(_text(self.x + 12, (top + bottom) // 2 + 4, sign, "start"))
        width = self.x + 250
        lanes = [_text(24, lane + 5, name, "middle", "name") for name, lane in LANES.items()]
        rule = _text(self.x + 12, bottom + 30, outcome.rule, "start", "rule")
        body = "\n".join([*self.ground, *self.lanes, *self.shapes, *lanes, rule])
        return f"{_HEAD.format(width=width, title=escape(self.title))}{body}\n</svg>\n"


def _copied(action: Action) -> str:
    full = action in (Action.SOURCE_FULL, Action.TARGET_FULL)
    return "all that differs" if full else "the changed blocks"


def _text(x: int, y: int, word: str, anchor: str, name: str = "word") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{name}">{escape(word)}</text>'


_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 230" width="{width}" height="230" role="img">
<title>{title}</title>
<style>
text {{ font: 12px sans-serif; fill: #333 }}
.name {{ font-weight: bold; font-size: 16px }}
.generation {{ fill: #fff; font-size: 11px; font-weight: bold }}
.rule {{ font: bold 13px monospace; fill: #111 }}
.lane {{ stroke-width: 5; fill: none }}
.linked {{ fill: #e8f3ea }}
.event {{ fill: #fff; stroke: #333; stroke-width: 2 }}
.cut, .death {{ stroke: #c0392b; stroke-width: 3; fill: none }}
.meet {{ stroke: #999; stroke-width: 1.5; stroke-dasharray: 4 4 }}
.copy {{ stroke: #111; stroke-width: 3; fill: none }}
</style>
<defs><marker id="tip" viewBox="0 0 10 10" refX="5" refY="5" markerWidth="4" markerHeight="4" orient="auto">
<path d="M0,0 L10,5 L0,10 z" fill="#111"/></marker></defs>
<rect width="100%" height="100%" fill="#fff"/>
"""

ZERO = Policies(Policy.DISCARD_ZERO_CHANGES, Policy.DISCARD_ZERO_CHANGES)
FRESH = {"kind": Kind.FRESH, "volume_id": NO_VOLUME, "current": generation.DAY0}
JOINING = {"kind": Kind.JOINING, "volume_id": NO_VOLUME, "current": 0, "disk": DiskState.INCONSISTENT}


def stories() -> list[Story]:
    """All pictures, in the order of the page."""

    def told(name: str, title: str, tell: Callable[[Story], Story], policies: Policies = REFUSE_ALWAYS) -> Story:
        return tell(Story(name, title, policies))

    return [
        told("behind", "The usual return", lambda s: s.in_step().write().cut(2).write("a")),
        told("equal-primary", "A link that was lost for a moment", lambda s: s.in_step().write().cut(2)),
        told(
            "equal-crashed",
            "Both are killed",
            lambda s: s.in_step().write().kill("a").kill("b"),
        ),
        told(
            "equal-memory", "One lost power, the other one did not", lambda s: s.in_step().write().kill("a", power=True)
        ),
        told(
            "failover",
            "The primary is lost, and comes back",
            lambda s: s.in_step().write().kill("a").promote("b").write("b"),
        ),
        told(
            "far-behind",
            "A copy of long ago",
            lambda s: s.in_step().cut().demote("a").untracked("a"),
        ),
        told(
            "inconsistent-target",
            "A resync that was interrupted",
            lambda s: s.in_step().cut(2).write("a").resync_interrupted("a", "b"),
        ),
        told("both-primary", "Both are primary", lambda s: s.in_step().cut().promote("b").write("b").write("a")),
        told(
            "split-brain",
            "Split brain",
            lambda s: s.in_step().cut().promote("b").write("b").write("a").demote("b"),
        ),
        told(
            "discard-bitmap",
            "The operator's word",
            lambda s: s.in_step().cut().promote("b").write("b").write("a").demote("b").tell("b"),
        ),
        told(
            "policy-discard-zero-changes",
            "A split brain in which nothing is lost",
            lambda s: s.in_step().cut().promote("b").write("a").demote("b"),
            ZERO,
        ),
        told(
            "forced",
            "An Outdated copy is promoted by force",
            lambda s: s.in_step().outdate("b").write("a").promote("b", forced=True).write("b").demote("a"),
        ),
        told("primary-behind", "A primary that was overtaken", lambda s: s.in_step().cut().promote("b").demote("b")),
    ]


# -- the table --------------------------------------------------------------------------------------------------------

_ACTIONS = {
    Action.NONE: ("connected, nothing to copy", "none"),
    Action.SOURCE_BITMAP: ("the changed blocks", "x"),
    Action.TARGET_BITMAP: ("the changed blocks", "y"),
    Action.SOURCE_FULL: ("all that differs", "x"),
    Action.TARGET_FULL: ("all that differs", "y"),
    Action.WAIT: ("wait, asked again", "none"),
    Action.REFUSE: ("refused", "none"),
    Action.SPLIT_BRAIN: ("refused: split brain", "none"),
}
_BY_MAPS = ("the changed blocks where the maps tell all, else all that differs", "x")
# What a reason may name of the two standings.
_SOME = SimpleNamespace(name="...", size_bytes="n", dirty_blocks="n")


def table() -> str:
    """Every row of the table, in order, as Markdown."""
    lines = ["| rule | story | what is done | source | because |", "| --- | --- | --- | --- | --- |"]
    for row in TABLE:
        done, source = _ACTIONS[row.action] if isinstance(row.action, Action) else _BY_MAPS
        because = row.reason.format(it="x", other="y", a=_SOME, b=_SOME)
        lines.append(f"| `{row.rule}` | {row.story} | {done} | {source} | {because} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its table made anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> None:
    """Write all of it."""
    (HERE / "pictures").mkdir(exist_ok=True)
    for story in stories():
        (HERE / "pictures" / f"{story.name}.svg").write_text(story.svg())
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
