"""The sharded step is the same step: loss and every gradient of every rank against eager, in one process.

The full matrix is `python -m tests.exactness`; here every pair of its values meets in some case.
"""

import pytest

from tests.exactness import BATCHES, HEADS, LENGTHS, LIMITS, RANKS, Case, errors, own_difference

# Heads meet each number of ranks in both examples, in fp64 in one of them and in fp32 in the other.
PAIRWISE = [
    (
        Case(
            example, dtype, heads, kv, LENGTHS[(at // 2 + narrow) % 2], BATCHES[(at // 2 + llama) % 2],
            (at // 2 + llama + narrow) % 2 == 1,
        ),
        [ranks for number, ranks in enumerate(RANKS) if (number + at + (llama == narrow)) % 2],
    )
    for example, dtype in LIMITS
    for llama, narrow in [(example == "llama", dtype == "float32")]
    for at, (heads, kv) in enumerate(HEADS)
]  # fmt: skip


@pytest.mark.parametrize(("case", "several"), PAIRWISE, ids=str)
def test_loss_and_gradients_equal_eager_s(case, several):
    limit = LIMITS[case.example, case.dtype]
    for ranks, error in errors(case, several):
        assert error <= limit, f"{ranks} ranks: {error:.1e}"


@pytest.mark.parametrize(("example", "dtype"), list(LIMITS))
def test_eager_itself_is_within_the_limit_when_rows_are_summed_in_another_order(example, dtype):
    assert 0 < own_difference(Case(example, dtype, 8, 2, 65, 2, False)) <= LIMITS[example, dtype]


def test_sequences_shorter_than_the_ranks_and_odd_numbers_of_ranks():
    for ranks, error in errors(Case("plain", "float64", 6, 2, 5, 2, True), [5, 7, 9]):
        assert error <= 1e-12, f"{ranks} ranks: {error:.1e}"

