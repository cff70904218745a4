import pytest
import torch

from autosp_aot.errors import ArtifactError
from autosp_aot.runtime import same_batch
from autosp_aot.runtime.comm import Mesh
from autosp_aot.runtime.same_batch import check_same_batch
from tests.threads import on_ranks


def test_no_place_weighs_nothing():
    for places in ((65520,), (65519,), (131041,), (0, 65521), (0, 65520)):
        changed = torch.zeros(140000, dtype=torch.int64)
        changed[list(places)] = torch.arange(1, len(places) + 1)
        swapped = changed.clone()
        swapped[list(places)] = changed[list(places)].flip(0) if len(places) > 1 else 0
        assert same_batch._mark(changed) != same_batch._mark(swapped)


KINDS = [torch.int64, torch.int32, torch.bool, torch.float32, torch.bfloat16, torch.float64]


def verdicts(batches: list[dict]) -> list[str]:
    """What each rank says of its batch."""

    def rank():
        group = Mesh.join("cpu", len(batches)).sequence
        try:
            return check_same_batch(batches[group.rank], group) or ""
        except ArtifactError as error:
            return str(error)

    return on_ranks(len(batches), rank)


def batch(*numbers: int, dtype: torch.dtype = torch.int64) -> dict:
    return {"ids": torch.tensor([numbers]).to(dtype), "scale": torch.tensor(2.5)}


@pytest.mark.parametrize("dtype", KINDS)
def test_the_same_batch_on_all_ranks_is_taken(dtype):
    assert verdicts([batch(1, 0, 1, dtype=dtype)] * 3) == [""] * 3


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("other", [(0, 1, 1), (1, 0, 0)])
def test_every_rank_refuses_where_one_has_another(dtype, other):
    said = verdicts([batch(1, 0, 1, dtype=dtype), batch(1, 0, 1, dtype=dtype), batch(*other, dtype=dtype)])
    assert len(set(said)) == 1
    assert said[0].startswith("error[batches-differ]: ranks that share a sequence were given different ids\n")


def test_a_rank_whose_mark_is_the_mean_of_the_others_refuses_too():
    assert all(verdicts([batch(0), batch(1), batch(2)]))


def test_all_inputs_that_differ_are_named():
    ones = {"a": torch.ones(2), "b": torch.ones(()), "c": torch.ones(1)}
    said = verdicts([ones, ones | {"a": torch.zeros(2), "b": torch.zeros(())}])
    assert "different a, b\n" in said[0]


def test_the_order_of_inputs_is_each_ranks_own():
    ones = {"a": torch.ones(2), "b": torch.zeros(3)}
    assert verdicts([ones, dict(reversed(ones.items()))]) == ["", ""]


def test_a_place_counts_from_the_start_of_the_tensor(monkeypatch):
    monkeypatch.setattr(same_batch, "BLOCK", 2)
    assert all(verdicts([batch(1, 0, 0, 0, 0), batch(0, 0, 1, 0, 0)]))


def test_tensors_without_elements_are_alike():
    assert verdicts([{"a": torch.zeros(0, 3), "b": torch.zeros(2, 2).t()}] * 2) == ["", ""]
