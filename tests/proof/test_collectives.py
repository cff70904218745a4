"""Ranks whose collectives do not fit together: each mismatch is found and named before anything runs."""

from dataclasses import replace

import pytest

from autosp_aot.errors import ArtifactError
from autosp_aot.proof.collectives import check_collectives, collectives_of


@pytest.fixture
def by_rank(tiny):
    return [collectives_of(tiny.program.for_rank(rank), rank) for rank in range(3)]


def mismatch(by_rank) -> str:
    with pytest.raises(ArtifactError) as caught:
        check_collectives(by_rank)
    return str(caught.value)


def test_ranks_of_one_build_agree(by_rank):
    check_collectives(by_rank)
    assert len(by_rank[0]) > 5


def test_a_collective_dropped_on_one_rank(by_rank):
    del by_rank[1][-1]
    assert f"rank 1 has {len(by_rank[1])} collectives, rank 0 {len(by_rank[0])}" in mismatch(by_rank)


def test_collectives_in_another_order_on_one_rank(by_rank):
    by_rank[2][0:2] = by_rank[2][1::-1]
    assert "collective 0 of rank 2 is all_to_all of" in mismatch(by_rank)


def test_another_kind_on_one_rank(by_rank):
    by_rank[1][0] = replace(by_rank[1][0], op="all_gather")
    assert "collective 0 of rank 1 is all_gather of" in mismatch(by_rank)


def test_another_order_inside_a_bucket_on_one_rank(by_rank):
    bucket = by_rank[1][-1]
    names = bucket.value.split(", ")
    by_rank[1][-1] = replace(bucket, value=", ".join([names[1], names[0], *names[2:]]))
    assert f"collective {len(by_rank[0]) - 1} of rank 1 is all_reduce of {names[1]}, {names[0]}" in mismatch(by_rank)


def test_another_dtype_on_one_rank(by_rank):
    by_rank[1][0] = replace(by_rank[1][0], dtype="f32")
    assert "of rank 1 is f32" in mismatch(by_rank)


def test_another_size_on_one_rank(by_rank):
    first = by_rank[1][0]
    by_rank[1][0] = replace(first, send_sizes=(first.send_sizes[0] + 1, *first.send_sizes[1:]))
    assert f"rank 1 sends {first.send_sizes[0] + 1} elements to rank 0" in mismatch(by_rank)
