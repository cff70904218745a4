"""Sequences of any length, on any dim, longer and shorter on the way: loss and every gradient against eager."""

from collections import Counter
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosp_aot.memory.costs import moved
from autosp_aot.passes.step import Step
from examples import plain
from tests.steps import equal_to_eager, gathers

B, H, V = 2, 8, 11


def tokens(*shape: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randint(V, shape, generator=draw) for name in ("input_ids", "labels")}


class Body(nn.Module):
    """Token embeddings through `mix`, and cross entropy at every position that is left."""

    def __init__(self, mix, width: int = H):
        super().__init__()
        self.tokens, self.mix = nn.Embedding(V, H), mix
        self.inner, self.norm, self.head = nn.Linear(H, width), nn.LayerNorm(width), nn.Linear(width, V)

    def forward(self, input_ids: Tensor, labels: Tensor, **more) -> Tensor:
        logits = self.head(self.norm(self.mix(self.inner(self.tokens(input_ids)), **more)))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten()[: logits[..., 0].numel()])


def built(mix, length: int = 13, ranks: int = 3, batch: dict | None = None, **more) -> Step:
    torch.manual_seed(0)
    return equal_to_eager(Body(mix).double(), batch or tokens(B, length), ranks, **more)


def largest_moved(compiled: Step) -> Counter:
    """Elements of the largest value of each kind of collective in the forward pass."""
    values, found = compiled.program.values(), Counter()
    for instr in compiled.program.section("forward").instrs:
        for name in instr.refs():
            if instr.op in ("all_to_all", "all_gather"):
                found[instr.op] = max(found[instr.op], prod(values[name].whole_shape))
    return found


@pytest.mark.parametrize(("length", "ranks"), [(1, 3), (2, 5), (4, 4), (5, 4), (7, 8), (33, 8)])
def test_a_decoder_of_any_length_on_any_number_of_ranks(length, ranks):
    torch.manual_seed(0)
    model = plain.build_model(V, H, 1, 2, 1, 64, dtype="float64")
    equal_to_eager(model, tokens(B, length), ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sequence_as_long_as_every_other_dim(ranks):
    torch.manual_seed(0)
    model = plain.build_model(8, 8, 1, 8, 4, 8, dtype="float64")
    batch = {name: ids % 8 for name, ids in tokens(8, 8).items()}
    compiled = equal_to_eager(model, batch, ranks)
    assert gathers(compiled.program, 8 * 8 * 8) == []


class SequenceFirst(nn.Module):
    """[S, B] tokens and [S, B, H] hidden states throughout."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, H), nn.Embedding(64, H)
        self.qkv, self.out, self.norm, self.head = (nn.Linear(*s) for s in ((H, 3 * H), (H, H), (H, H), (H, V)))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        S = input_ids.shape[0]
        x = self.tokens(input_ids) + self.places(torch.arange(S))[:, None]
        q, k, v = (part.view(S, -1, 2, H // 2).permute(1, 2, 0, 3) for part in self.qkv(x).chunk(3, -1))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.permute(2, 0, 1, 3).reshape(S, -1, H))
        return F.cross_entropy(self.head(x)[:-1].flatten(0, 1), labels[1:].flatten())


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_sequence_first(ranks):
    torch.manual_seed(0)
    compiled = equal_to_eager(SequenceFirst().double(), tokens(13, B), ranks, dims={"input_ids": 0, "labels": 0})
    assert not compiled.fallbacks
    assert gathers(compiled.program, 13 * B * H) == []


def test_a_sequence_without_a_batch():
    torch.manual_seed(0)
    batch = tokens(13)
    compiled = equal_to_eager(Body(lambda x: x * 2).double(), batch, 3, dims={"input_ids": 0, "labels": 0})
    assert gathers(compiled.program, 13 * H) == []


def test_an_input_without_the_sequence():
    batch = tokens(B, 13) | {"style": torch.linspace(-1, 1, B * H, dtype=torch.float64).view(B, H)}
    compiled = built(lambda x, style: x * style[:, None], batch=batch, dims={"input_ids": 1, "labels": 1})
    assert gathers(compiled.program, B * H) == []


def shifted_by_cat(x: Tensor) -> Tensor:
    return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def shifted_by_pad(x: Tensor) -> Tensor:
    return x + F.pad(x, (0, 0, 1, -1))


def shifted_in_place(x: Tensor) -> Tensor:
    before = x.clone()
    before[:, 0] = 0
    before[:, 1:] = x[:, :-1]
    return x + before


@pytest.mark.parametrize("shift", [shifted_by_cat, shifted_by_pad, shifted_in_place])
def test_a_shift_by_one_token_gathers_nothing(shift):
    compiled = built(shift)
    assert not compiled.fallbacks
    assert not largest_moved(compiled)["all_gather"]


class Prefixed(nn.Module):
    def __init__(self, length: int):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(1, length, H))

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.prompt.expand(len(x), -1, -1), x], 1)
        return joined.tanh()[:, self.prompt.shape[1] :] * joined[:, :1]


@pytest.mark.parametrize("length", [1, 5, 20])
def test_learned_tokens_before_the_sequence(length):
    compiled = built(Prefixed(length))
    assert not compiled.fallbacks
    assert gathers(compiled.program, B * 13 * H) == []


def test_hidden_states_one_after_another_are_cut_evenly():
    compiled = built(lambda x: torch.cat([x, x.tanh()], 1)[:, 13:])
    cuts = {value.placement.cut.bounds for value in compiled.program.values().values() if value.placement.cut}
    assert ((0, 9), (9, 18), (18, 26)) in cuts


@pytest.mark.parametrize("mix", [
    lambda x: x + x.mean(1, keepdim=True),
    lambda x: x * x.mean((0, 1)),
    lambda x: x / x.std(1, keepdim=True),
    lambda x: x / x.norm(),
    lambda x: x - x.amax((1, 2), keepdim=True),
    lambda x: x * (x > 0).any(1, keepdim=True),
    lambda x: x + F.instance_norm(x.transpose(1, 2)).transpose(1, 2),
    lambda x: x + F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
], ids=["mean", "mean of all", "std", "norm", "amax", "any", "instance norm", "group norm"])  # fmt: skip
def test_statistics_over_the_sequence_gather_no_hidden_state(mix):
    compiled = built(mix)
    assert not compiled.fallbacks
    assert gathers(compiled.program, B * 13 * H) == []


@pytest.mark.parametrize("mix", [
    lambda x: x.cumsum(1),
    lambda x: x.flip(1),
    lambda x: x.roll(2, 1),
    lambda x: x.sort(1).values,
    lambda x: x[:, torch.arange(12, -1, -1)],
], ids=["cumsum", "flip", "roll", "sort", "index"])  # fmt: skip
def test_what_runs_along_the_sequence_exchanges_it_for_the_hidden_dim(mix):
    compiled = built(mix)
    assert not compiled.fallbacks
    assert gathers(compiled.program, B * 13 * H) == []
    assert largest_moved(compiled)["all_to_all"] == B * 13 * H


class Convolved(nn.Module):
    """A convolution along the sequence, of which as many places are kept as there were, if there are."""

    def __init__(self, groups: int = 1, **options):
        super().__init__()
        self.convolution = nn.Conv1d(H, H, 4, groups=groups, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


@pytest.mark.parametrize("options", [
    {"padding": 3}, {"padding": 3, "groups": H}, {"padding": 3, "groups": 2}, {"stride": 2}, {"dilation": 2},
    {"stride": 5, "padding": 1},
], ids=str)  # fmt: skip
def test_a_convolution_along_the_sequence_reads_its_neighbours_places(options):
    compiled = built(Convolved(**options), 64, 4)
    assert not compiled.fallbacks
    assert gathers(compiled.program, 16 * B * H) == []
    received = {m.op: m.received_bytes for m in moved(compiled.program) if m.section == "forward"}
    assert received["all_to_all"] <= 8 * B * H * 8, "more than a kernel's reach and the sequence's change of length"


@pytest.mark.parametrize("options", [{"padding": 3}, {"groups": H}, {"stride": 2, "padding": 2}], ids=str)
def test_a_convolution_of_a_sequence_shorter_than_the_ranks(options):
    assert not built(Convolved(**options), 5, 6).fallbacks


@pytest.mark.parametrize("pool", [
    lambda x: x[:, 0],
    lambda x: x[:, -1],
    lambda x: x[:, -1:] + x[:, -3:-1].sum(1, keepdim=True),
    lambda x: x.mean(1),
    lambda x: x[torch.arange(B), torch.tensor([4, 11])],
    lambda x: x[:, ::3].flatten(1)[:, :H],
], ids=["first", "last", "last ones", "mean", "chosen", "every third"])  # fmt: skip
def test_one_place_for_the_whole_sequence(pool):
    compiled = built(pool)
    assert not compiled.fallbacks
    assert gathers(compiled.program, B * 13 * H) == []
