"""The sharded step is the same step: loss and every gradient of every rank against eager, in one process.

The full matrix is `python -m tests.exactness`; here every pair of its values meets in some case.
"""

import pytest

from tests.exactness import BATCHES, HEADS, LENGTHS, LIMITS, RANKS, Case, errors, own_difference

PAIRWISE = [
    Case(
        example, dtype, heads, kv, LENGTHS[at % 2], BATCHES[(at // 2 + (dtype == "float32")) % 2],
        (at + at // 4) % 2 == 0,
    )  # fmt: skip
    for example, dtype in LIMITS
    for at, (heads, kv) in enumerate(HEADS)
]


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_loss_and_gradients_equal_eager_s(case):
    limit = LIMITS[case.example, case.dtype]
    for ranks, error in errors(case, RANKS):
        assert error <= limit, f"{ranks} ranks: {error:.1e}"


@pytest.mark.parametrize(("example", "dtype"), list(LIMITS))
def test_eager_itself_is_within_the_limit_when_rows_are_summed_in_another_order(example, dtype):
    assert 0 < own_difference(Case(example, dtype, 8, 2, 65, 2, False)) <= LIMITS[example, dtype]


def test_sequences_shorter_than_the_ranks_and_odd_numbers_of_ranks():
    for ranks, error in errors(Case("plain", "float64", 6, 2, 5, 2, True), [5, 7, 9]):
        assert error <= 1e-12, f"{ranks} ranks: {error:.1e}"

