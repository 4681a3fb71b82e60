"""What the processors do: seconds that were scarce are joined, and a process that computes is seen."""

import time

from nbd_server.processor import EVERY_S, Processor, Use, scarce_runs


def use(began_s: float, idle_percent: int, own_cores: float = 0.1, runnable: int = 1) -> Use:
    return Use(began_s, began_s + 1, own_cores, idle_percent, runnable)


def test_scarce_seconds_are_joined_with_the_worst_of_each() -> None:
    uses = [use(0, 50), use(1, 5), use(2, 0, runnable=7), use(3, 6), use(4, 40, own_cores=0.85), use(5, 40)]
    assert scarce_runs(uses) == [Use(1, 3, 0.1, 0, 7), use(4, 40, own_cores=0.85)]
    assert scarce_runs([]) == []


def test_one_that_computes_is_seen_afterwards() -> None:
    processor = Processor()
    assert processor.report()["before"] == []
    processor.start()
    began_s = time.perf_counter()
    # Until two whole looks of it have come; the process's own time counts, however busy the machine is.
    while not (found := scarce_runs(list(processor._uses))) and time.perf_counter() < began_s + 60 * EVERY_S:
        sum(range(100_000))
    assert found
    report = processor.report()
    assert set(report) == {"cores", "own_cores", "idle_percent", "runnable", "before"}
    [*_, last] = report["before"]
    assert last["began_ago_s"] > last["ended_ago_s"] >= 0
    assert last["runnable"] >= 1
