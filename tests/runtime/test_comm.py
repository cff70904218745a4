"""dp x sp ranks, as threads of one process."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import autosp_aot
from autosp_aot.errors import ArtifactError
from autosp_aot.runtime.comm import Mesh, check_size
from autosp_aot.targets.table import CPU, TARGETS
from examples import plain
from tests.threads import on_ranks

SIZES = {"vocab_size": 8, "hidden_size": 4, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 8, "dtype": "float64"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("artifact") / "plain.sp2"
    autosp_aot.build(plain.build_model(**SIZES), plain.example_batch(2, 5), 2, path, target="cpu")
    return path


def batch(replica: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(replica)
    return {name: torch.randint(8, (2, 5), generator=rng) for name in ("input_ids", "labels")}


def test_replicas_are_runs_of_neighbouring_ranks():
    places = on_ranks(6, lambda: _place(Mesh.join("cpu", 3)))
    assert places == [(2, 0, 0), (2, 0, 1), (2, 0, 2), (2, 1, 0), (2, 1, 1), (2, 1, 2)]


def _place(mesh):
    return mesh.replicas, mesh.replica, mesh.sequence.rank


def test_summands_of_all_ranks_add_up_to_the_gradients_of_all_replicas(path):
    def rank():
        mesh = Mesh.join("cpu", 2)
        module = autosp_aot.load(path, comm=mesh.sequence, sum_gradients=False)
        module(**batch(mesh.replica)).backward()
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad)
        return module

    model = plain.build_model(**SIZES)
    modules = on_ranks(4, rank)
    model.load_state_dict(modules[0].state_dict())
    (model(**batch(0)) + model(**batch(1))).backward()
    for module in modules:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(module.get_parameter(name).grad, parameter.grad, rtol=1e-12, atol=1e-15)


class Penalised(torch.nn.Module):
    """Every rank has the whole gradient of `scale`: it never meets the sequence."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(8, 4)
        self.scale = torch.nn.Parameter(torch.randn(3))

    def forward(self, input_ids):
        return self.table(input_ids).square().mean() + self.scale.square().sum()


def test_a_gradient_that_every_rank_has_whole_is_a_summand_once(tmp_path):
    torch.manual_seed(0)
    model, ids = Penalised(), torch.arange(8).view(1, 8)
    autosp_aot.build(model, {"input_ids": ids}, 3, tmp_path / "a", target="cpu")

    def rank():
        module = autosp_aot.load(tmp_path / "a", comm=Mesh.join("cpu", 3).sequence, sum_gradients=False)
        module(input_ids=ids).backward()
        return {name: p.grad for name, p in module.named_parameters()}

    found = on_ranks(3, rank)
    model(ids).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sum(gradients[name] for gradients in found), parameter.grad)


@pytest.mark.parametrize("dp, said", [(None, "a number of groups of 4"), (2, "2 groups of 4"), (1, "4")])
def test_ranks_that_are_no_groups_are_refused(dp, said):
    with pytest.raises(ArtifactError) as caught:
        check_size(6, 4, dp)
    assert str(caught.value).startswith(f"error[world-size]: the artifact is for {said} ranks, and here are 6\n")


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_what_a_backend_cannot_send_crosses_as_something_else(dtype, monkeypatch):
    """A threaded group stands for one that lacks i16; what reaches it is noted."""
    monkeypatch.setitem(TARGETS, "cpu", replace(CPU, unsent=("i16",)))
    sent = []
    for name in ("all_to_all_single", "all_reduce"):
        real = getattr(dist, name)
        noted = lambda buffer, *args, real=real, **given: (sent.append(buffer.dtype), real(buffer, *args, **given))[1]  # noqa: E731
        monkeypatch.setattr(dist, name, noted)

    def rank():
        world = Mesh.join("cpu", 2).world
        mine = torch.arange(3, dtype=dtype) - 300 * world.rank
        return world.exchange(mine, [1, 2], [1, 1] if world.rank == 0 else [2, 2]).tolist(), world.sum(mine).tolist()

    assert on_ranks(2, rank) == [([0, -300], [-300, -298, -296]), ([1, 2, -299, -298], [-300, -298, -296])]
    assert len(sent) == 4 and torch.int16 not in sent
