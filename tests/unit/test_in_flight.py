"""The window's bounds, beside a list of what is in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.core.in_flight import InFlight


@given(st.lists(st.one_of(st.integers(0, 120), st.none()), max_size=60))
def test_the_window_never_holds_more_than_its_bounds(moves: list[int | None]) -> None:
    """A number asks for that many bytes, None ends the oldest request."""
    window = InFlight(count_max=4, bytes_max=100)
    inside: list[int] = []
    for size in moves:
        if size is None:
            if inside:
                window.done(inside.pop(0))
        else:
            fits = not inside or (len(inside) < 4 and sum(inside) + size <= 100)
            assert window.admit(size) is fits
            inside += [size] if fits else []
        assert (window.count, window.bytes) == (len(inside), sum(inside))
        assert window.idle is (not inside)
        assert window.count <= 4
        assert window.bytes <= 100 or window.count == 1


def test_many_small_requests_are_bounded_by_their_number() -> None:
    window = InFlight(count_max=4, bytes_max=100)
    assert [window.admit(1) for _ in range(5)] == [True] * 4 + [False]
    window.done(1)
    assert window.admit(1)


def test_a_request_larger_than_the_window_goes_alone() -> None:
    window = InFlight(count_max=4, bytes_max=100)
    assert window.admit(1000)
    assert not window.admit(0)
    window.done(1000)
    assert window.admit(10)
    assert not window.admit(1000)


def test_more_done_than_admitted_is_our_own_bug() -> None:
    window = InFlight(count_max=4, bytes_max=100)
    window.admit(10)
    with pytest.raises(AssertionError, match="bytes"):
        window.done(11)
    with pytest.raises(AssertionError, match="requests"):
        InFlight(1, 1).done(0)
