"""The solver against every plan there is, on problems small enough for that."""

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from autosp_aot.passes.keep.knapsack import Option, cheapest, tightest


@st.composite
def problems(draw) -> list[list[Option]]:
    count = draw(st.integers(1, 5))
    small = st.integers(0, 30)
    option = lambda longest: Option(draw(st.integers(1, longest)), draw(small), draw(small), draw(small))  # noqa: E731
    return [[option(1), *(option(count - at) for _ in range(draw(st.integers(0, 4))))] for at in range(count)]


def plans(options: list[list[Option]], at: int = 0) -> Iterator[list[Option]]:
    if at == len(options):
        yield []
    else:
        yield from ([option, *rest] for option in options[at] for rest in plans(options, at + option.length))


def needed(plan: list[Option]) -> int:
    before, most = 0, 0
    for option in plan:
        most = max(most, before + option.needed_bytes)
        before += option.kept_bytes
    return most


def seconds(plan: list[Option]) -> float:
    return sum(option.seconds for option in plan)


@given(problems(), st.integers(0, 120))
@settings(max_examples=300, deadline=None)
def test_no_plan_within_the_budget_takes_less_time(options, budget):
    fitting = [plan for plan in plans(options) if needed(plan) <= budget]
    found = cheapest(options, budget)
    assert (found is None) == (not fitting)
    if found is not None:
        assert needed(found) <= budget and seconds(found) == min(map(seconds, fitting))


@given(problems())
@settings(max_examples=200, deadline=None)
def test_the_tightest_plan_needs_the_least_and_is_found_within_just_that(options):
    least = needed(tightest(options))
    assert least == min(map(needed, plans(options)))
    assert cheapest(options, least) is not None and cheapest(options, least - 1) is None


@given(problems(), st.integers(0, 120), st.integers(0, 120))
@settings(max_examples=200, deadline=None)
def test_a_larger_budget_never_takes_more_time(options, a, b):
    small, large = cheapest(options, min(a, b)), cheapest(options, max(a, b))
    assert small is None or seconds(large) <= seconds(small)


@given(problems(), st.integers(0, 120))
@settings(max_examples=100, deadline=None)
def test_bytes_too_many_to_count_one_by_one_keep_the_budget_all_the_same(options, budget):
    scale = 10**9 + 7
    scaled = [[Option(o.length, o.kept_bytes * scale, o.needed_bytes * scale, o.seconds) for o in c] for c in options]
    found = cheapest(scaled, budget * scale)
    assert found is None or needed(found) <= budget * scale


def test_equal_layers_by_the_hundred_are_quick():
    layer = [Option(1, kept, kept + 10, 100 - kept) for kept in (1, 20, 35, 60, 90)]
    options = [layer + [Option(n, 1, 10 * n, 120.0 * n) for n in (2, 4, 8) if at + n <= 100] for at in range(100)]
    assert needed(cheapest(options, 1000)) <= 1000
