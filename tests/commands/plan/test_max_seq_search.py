import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp_aot.commands.plan.max_seq_search import LONGEST, longest


def search(need, room, fixed=0, start=4096):
    """What is found, and the lengths asked for."""
    asked = []
    found = longest(lambda length: asked.append(length) or need(length), room, fixed, start)
    return found, asked


@given(st.integers(32, LONGEST // 2), st.integers(0, 10**6), st.integers(32, 2**22))
def test_what_is_found_fits_and_a_32nd_more_does_not(longest_length, fixed, start):
    room = fixed + 3 * longest_length
    found, _ = search(lambda length: fixed + 3 * length, room, fixed, start)
    assert found <= longest_length < found + max(found // 32, 1)


@given(st.integers(32, LONGEST // 2), st.integers(32, 2**22))
def test_a_line_takes_few_questions(longest_length, start):
    _, asked = search(lambda length: 7 * length + 1000, 7 * longest_length + 1000, 1000, start)
    assert len(asked) == len(set(asked)) <= 9


def test_where_the_shortest_does_not_fit_nothing_does():
    assert search(lambda length: 100 * length, 100)[0] == 0


def test_where_everything_fits_the_search_ends():
    assert LONGEST / 2 < search(lambda length: 1, 100)[0] < LONGEST


@pytest.mark.parametrize("need", [lambda n: n**2 // 1000, lambda n: 1000 if n <= 100_000 else 2000])
def test_what_is_no_line_is_found_too(need):
    found, _ = search(need, 1500)
    assert need(found) <= 1500 < need(found + found // 32)
