"""Threads as greenlets under virtual time: one seeded random generator picks who runs next.

A `Task` stands for a thread and belongs to a `Process`. A killed process' tasks never run again; a stopped one's wait
until it goes on. Every lock, wait, disk access and message is a point where another task may be picked, so one seed is
one interleaving, replayed exactly.
"""

import heapq
import random
from collections.abc import Callable
from typing import Any

import greenlet

# Steps without any time passing: more is a task that runs in circles.
STEPS_A_MOMENT_MAX = 20_000


class Stuck(Exception):
    """The life took more steps than any sound one: something runs in circles."""


class Process:
    """A set of tasks that live and die together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.stopped = False
        self.parked: list[Task] = []


class Task:
    """One thread. `waits_for` says to people what it is blocked on."""

    __slots__ = ("done", "error", "greenlet", "joiners", "name", "process", "ready", "timed_out", "turn", "waits_for")

    def __init__(self, process: Process, name: str) -> None:
        self.process = process
        self.name = name
        self.done = False
        self.ready = False
        self.turn = 0
        self.timed_out = False
        self.waits_for = ""
        self.joiners: list[Task] = []
        self.error: BaseException | None = None
        self.greenlet: Any = None

    def __repr__(self) -> str:
        return f"{self.process.name}/{self.name}"


class Scheduler:
    """The hub. `preempt` is the chance that a task is interrupted at a point where it need not wait."""

    def __init__(self, seed: int, preempt: float) -> None:
        self.random = random.Random(seed)
        self.preempt = preempt
        self.now_s = 0.0
        self.steps = 0
        self.steps_max = 300_000
        self.current: Task | None = None
        self.tasks: list[Task] = []
        self.failures: list[tuple[Task, BaseException]] = []
        self._ready: list[Task] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        # Every task's parent, wherever it is spawned: whoever ends gives way to the hub.
        self._hub: Any = greenlet.getcurrent()
        self._ending = False

    # What happens when

    def at(self, delay_s: float, function: Callable[[], None]) -> None:
        """Call `function` (which must not wait) after this time."""
        self._count += 1
        heapq.heappush(self._timers, (self.now_s + delay_s, self._count, function))

    def spawn(self, process: Process, name: str, function: Callable[..., None], *arguments: object) -> Task:
        task = Task(process, name)

        def body() -> None:
            try:
                function(*arguments)
            except greenlet.GreenletExit:
                pass
            except BaseException as error:  # noqa: BLE001  outermost: the thread dies, as it would in production
                task.error = error
                if not self._ending and not process.dead:
                    self.failures.append((task, error))
            task.done = True
            for joiner in task.joiners:
                self.wake(joiner)
            task.joiners.clear()

        task.greenlet = greenlet.greenlet(body, self._hub)
        if len(self.tasks) > 64 and self._count % 64 == 0:
            self.tasks = [one for one in self.tasks if not one.done]
        self.tasks.append(task)
        self.wake(task)
        return task

    def wake(self, task: Task) -> None:
        if not task.ready and not task.done:
            task.ready = True
            self._ready.append(task)

    # For the running task

    def check_alive(self) -> None:
        """A task of a dead process does nothing any more."""
        if self._ending or (self.current is not None and self.current.process.dead):
            raise greenlet.GreenletExit

    def point(self) -> None:
        """Perhaps let others run."""
        self.check_alive()
        if self.current is not None and self.random.random() < self.preempt:
            self.wake(self.current)
            self._switch()

    def pause(self) -> None:
        """Let others run."""
        self.check_alive()
        if self.current is not None:
            self.wake(self.current)
            self._switch()

    def elapse(self, delay_s: float) -> None:
        self.check_alive()
        if self.current is None:
            return
        self.wait([], delay_s, "sleep")

    def wait(self, queue: list[Task], timeout_s: float | None, why: str) -> bool:
        """Block until woken through `queue`; False when the time ran out first."""
        task = self.current
        assert task is not None, f"only a task can wait for {why}"
        self.check_alive()
        task.turn += 1
        task.timed_out = False
        task.waits_for = why
        queue.append(task)
        if timeout_s is not None:
            turn = task.turn

            def expire() -> None:
                if task.turn == turn and not task.ready and not task.done:
                    task.timed_out = True
                    self.wake(task)

            self.at(max(0.0, timeout_s), expire)
        try:
            self._switch()
        finally:
            task.turn += 1
            task.waits_for = ""
            if task in queue:
                queue.remove(task)
        return not task.timed_out

    def _switch(self) -> None:
        self._hub.switch()
        self.check_alive()

    # The hub

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Run until the condition holds (looked at between steps); False when `limit_s` of virtual time is over."""
        deadline_s = self.now_s + limit_s
        moment_s, moment_steps = self.now_s, self.steps
        while not until():
            if not self._ready:
                if not self._timers or self._timers[0][0] > deadline_s:
                    self.now_s = deadline_s
                    return False
                self.now_s = max(self.now_s, self._timers[0][0])
                while self._timers and self._timers[0][0] <= self.now_s:
                    heapq.heappop(self._timers)[2]()
                continue
            self.steps += 1
            if self.now_s != moment_s:
                moment_s, moment_steps = self.now_s, self.steps
            if self.steps > self.steps_max or self.steps - moment_steps > STEPS_A_MOMENT_MAX:
                names = {repr(task) for task in self._ready}
                raise Stuck(
                    f"{self.steps} steps, {self.steps - moment_steps} of them at {self.now_s:.4f} s; ready: {names}"
                )
            index = self.random.randrange(len(self._ready))
            task = self._ready[index]
            self._ready[index] = self._ready[-1]
            self._ready.pop()
            task.ready = False
            if task.process.dead or task.done:
                continue
            if task.process.stopped:
                task.process.parked.append(task)
                continue
            self.current = task
            task.greenlet.switch()
            self.current = None
        return True

    def resume(self, process: Process) -> None:
        """A stopped process goes on."""
        process.stopped = False
        for task in process.parked:
            self.wake(task)
        process.parked.clear()

    def end(self) -> None:
        """Unwind every task, so that nothing of this life is left."""
        self._ending = True
        for task in self.tasks:
            if not task.greenlet.dead:
                if task.greenlet:
                    task.greenlet.throw(greenlet.GreenletExit)
                task.done = True
        self.tasks.clear()
        self._ready.clear()
        self._timers.clear()


class Lock:
    """threading.Lock on tasks; who gets it next is drawn."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._owner: Task | None = None
        self._held = False
        self._waiting: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        scheduler = self._scheduler
        scheduler.point()
        if not self._held:
            self._held = True
            self._owner = scheduler.current
            return True
        if not blocking:
            return False
        deadline_s = None if timeout < 0 else scheduler.now_s + timeout
        while self._held:
            left_s = None if deadline_s is None else deadline_s - scheduler.now_s
            if left_s is not None and left_s <= 0:
                return False
            scheduler.wait(self._waiting, left_s, f"a lock held by {self._owner}")
        self._held = True
        self._owner = scheduler.current
        return True

    def release(self) -> None:
        self._held = False
        self._owner = None
        for task in self._waiting:
            self._scheduler.wake(task)
        self._waiting.clear()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *arguments: object) -> None:
        self.release()


class Condition:
    """threading.Condition on tasks."""

    def __init__(self, scheduler: Scheduler, lock: Lock | None = None) -> None:
        self._scheduler = scheduler
        self._lock = lock if lock is not None else Lock(scheduler)
        self._waiting: list[Task] = []

    def acquire(self) -> bool:
        return self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *arguments: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        self._lock.release()
        try:
            return self._scheduler.wait(self._waiting, timeout, "a condition")
        finally:
            # A task that is unwound must not wait for anything any more.
            try:
                self._lock.acquire()
            except greenlet.GreenletExit:
                pass

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        deadline_s = None if timeout is None else self._scheduler.now_s + timeout
        while not (result := predicate()):
            left_s = None if deadline_s is None else deadline_s - self._scheduler.now_s
            if left_s is not None and left_s <= 0:
                return result
            self.wait(left_s)
        return result

    def notify_all(self) -> None:
        for task in self._waiting:
            self._scheduler.wake(task)
        self._waiting.clear()


class Thread:
    """What `spawn` of the simulated runtime returns."""

    def __init__(self, scheduler: Scheduler, task: Task) -> None:
        self._scheduler = scheduler
        self.task = task

    def join(self, timeout: float | None = None) -> None:
        deadline_s = None if timeout is None else self._scheduler.now_s + timeout
        while not self.task.done:
            left_s = None if deadline_s is None else deadline_s - self._scheduler.now_s
            if left_s is not None and left_s <= 0:
                return
            self._scheduler.wait(self.task.joiners, left_s, f"the end of {self.task}")

    def is_alive(self) -> bool:
        return not self.task.done


class Runtime:
    """mirror.runtime.Runtime for one process of the simulated world."""

    def __init__(self, scheduler: Scheduler, process: Process, boot_id: bytes) -> None:
        self.scheduler = scheduler
        self.process = process
        self._boot_id = boot_id

    def lock(self) -> Lock:
        return Lock(self.scheduler)

    def condition(self, lock: Lock | None = None) -> Condition:
        return Condition(self.scheduler, lock)

    def spawn(self, name: str, function: Callable[..., None], *arguments: object) -> Thread:
        return Thread(self.scheduler, self.scheduler.spawn(self.process, name, function, *arguments))

    def is_current(self, thread: Thread | None) -> bool:
        return thread is not None and thread.task is self.scheduler.current

    def now_s(self) -> float:
        return 1000.0 + self.scheduler.now_s

    def wall_time_s(self) -> float:
        return 1.7e9 + self.scheduler.now_s

    def boot_id(self) -> bytes:
        return self._boot_id

    def random_number(self) -> int:
        return self.scheduler.random.getrandbits(64) | 2

    def random_bytes(self, count: int) -> bytes:
        return self.scheduler.random.randbytes(count)
