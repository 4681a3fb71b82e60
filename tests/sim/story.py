"""Histories for the checker's own tests: told by hand, and those of an honest volume."""

import random

from tests.sim.history import History, Violation
from tests.sim.recording import Loss, Operation, Reign

SECTORS = 8


class Story:
    """A history told in a line each, with a clock of its own."""

    def __init__(self) -> None:
        self.history = History(SECTORS)
        self.now = 0

    def tick(self) -> int:
        self.now += 1
        return self.now

    def reign(
        self, replica: str, parent: Reign | None = None, loss: Loss = Loss.NONE, until: int | None = None
    ) -> Reign:
        return self.history.begin_reign(self.tick(), replica, parent, until, loss)

    def call(
        self, reign: Reign, kind: str, tag: int = 0, *, fua: bool = False, at: int = 0, count: int = 4
    ) -> Operation:
        return reign.call(self.tick(), kind, at, count, tag, fua=fua)

    def done(self, operation: Operation, *values: int) -> None:
        operation.answer(self.tick(), values * operation.count if len(values) == 1 else values)

    def write(self, reign: Reign, tag: int, *, fua: bool = False, at: int = 0, count: int = 4) -> None:
        self.done(self.call(reign, "write", tag, fua=fua, at=at, count=count))

    def read(self, reign: Reign, *values: int, at: int = 0, count: int = 4) -> Operation:
        operation = self.call(reign, "read", at=at, count=count)
        self.done(operation, *values)
        return operation

    def flush(self, reign: Reign) -> None:
        self.done(self.call(reign, "flush"))

    def broken(self) -> list[str]:
        return [violation.invariant for violation in self.history.check()]


class Life:
    """A volume that keeps its promises, with clients, failovers and power cuts; read number `lie` gives anything."""

    def __init__(self, seed: int, lie: int | None = None) -> None:
        self.rng = random.Random(seed)
        self.lie = lie
        self.story = Story()
        self.reign = self.story.reign("a")
        self.contents = [0] * SECTORS
        self.kept: list[set[int]] = [{0} for _ in range(SECTORS)]
        self.under_way: list[Operation] = []
        self.reads: list[Operation] = []
        # What was said of each read at its answer.
        self.told: list[Violation] = []
        for tag in range(1, 150):
            action = self.rng.random()
            if action < 0.5 or not self.under_way:
                self.begin(tag)
            elif action < 0.97:
                self.end(self.under_way.pop(self.rng.randrange(len(self.under_way))))
            else:
                self.fail_over()

    def begin(self, tag: int) -> None:
        kind = self.rng.choice(["read", "write", "write", "zero", "flush"])
        at = self.rng.randrange(SECTORS)
        count = 0 if kind == "flush" else self.rng.randrange(1, SECTORS - at + 1)
        self.under_way.append(self.story.call(self.reign, kind, tag, at=at, count=count))

    def end(self, operation: Operation) -> None:
        now = self.story.tick()
        if operation.kind == "read":
            values = [self.contents[sector] for sector in operation.sectors]
            if len(self.reads) == self.lie:
                values = [self.rng.choice([0, now // 4, now // 3, now // 2]) for _ in values]
            operation.answer(now, values)
            self.reads.append(operation)
            self.told += self.story.history.check_read(operation)
        elif operation.kind == "flush":
            self.kept = [{value} for value in self.contents]
            operation.answer(now)
        elif self.rng.random() < 0.15:
            operation.fail(now)
            self.take_effect(operation, partly=True)
        else:
            self.take_effect(operation)
            operation.answer(now)

    def take_effect(self, operation: Operation, *, partly: bool = False) -> None:
        for sector in operation.sectors:
            if not partly or self.rng.random() < 0.5:
                self.contents[sector] = operation.tag
                self.kept[sector].add(operation.tag)

    def fail_over(self) -> None:
        for operation in self.under_way:
            if operation.writes:
                self.take_effect(operation, partly=True)
        self.under_way = []
        loss = self.rng.choice([Loss.NONE, Loss.UNFLUSHED])
        if loss is Loss.UNFLUSHED:
            self.contents = [self.rng.choice(sorted(values)) for values in self.kept]
        self.reign = self.story.reign(self.rng.choice("ab"), self.reign, loss)
