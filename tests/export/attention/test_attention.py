import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from autosp_aot.errors import BuildError
from autosp_aot.export.attention.attention import canonical_attention

HEADS, LENGTH, WIDTH = 6, 5, 4


class Attention(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, q, k, v):
        return self.attend(q, k, v)


def canonical(attend, kv_heads: int, batch: int = 2):
    """The one autosp.attention in the graph of a function or module of q, k, v."""
    with FakeTensorMode():
        q, *kv = (torch.empty(batch, heads, LENGTH, WIDTH) for heads in (HEADS, kv_heads, kv_heads))
        module = attend if isinstance(attend, nn.Module) else Attention(attend)
        program = torch.export.export(module, (q, *kv), strict=False)
    canonical_attention(program)
    return next(node for node in program.graph.nodes if node.target is torch.ops.autosp.attention.default)


def scoring(attention) -> dict:
    return json.loads(attention.args[4])


def repeat_kv(x, times: int):
    """As transformers has it."""
    batch, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, times, length, width)
    return x.reshape(batch, heads * times, length, width)


def repeat_interleave(x, times: int):
    return x.repeat_interleave(times, dim=1)


def repeat_negative_dim(x, times: int):
    return x.repeat_interleave(times, dim=-3)


def expand_flatten(x, times: int):
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).contiguous().flatten(1, 2)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("repeat", [repeat_kv, repeat_interleave, repeat_negative_dim, expand_flatten])
def test_repeated_key_value_heads_are_read_before_their_repetition(repeat, kv_heads, batch):
    group = HEADS // kv_heads
    attention = canonical(
        lambda q, k, v: scaled_dot_product_attention(q, repeat(k, group), repeat(v, group)), kv_heads, batch
    )
    assert [node.name for node in attention.args[:3]] == ["q", "k", "v"]


def test_enable_gqa_reads_the_key_value_heads_as_they_are():
    attention = canonical(lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True), 2)
    assert [node.name for node in attention.args[:3]] == ["q", "k", "v"]


def all_heads_in_turn(x, times: int):
    return x.repeat(1, times, 1, 1)


def all_heads_in_turn_by_expand(x, times: int):
    batch, heads, length, width = x.shape
    return x[:, None].expand(batch, times, heads, length, width).reshape(batch, times * heads, length, width)


def positions_among_the_heads(x, times: int):
    batch, heads, length, width = x.shape
    x = x.transpose(1, 2)[:, :, :, None].expand(batch, length, heads, times, width)
    return x.reshape(batch, heads * times, length, width)


def written_after(x, times: int):
    x = repeat_kv(x, times)
    x[:, :, 0] = 0
    return x


@pytest.mark.parametrize(
    "repeat", [all_heads_in_turn, all_heads_in_turn_by_expand, positions_among_the_heads, written_after]
)
def test_a_look_alike_of_the_repetition_is_left_expanded(repeat):
    attention = canonical(lambda q, k, v: scaled_dot_product_attention(q, repeat(k, 3), repeat(v, 3)), 2)
    assert [node.meta["val"].shape[1] for node in attention.args[1:3]] == [HEADS, HEADS]


def test_keys_and_values_repeated_differently_are_left_expanded():
    attention = canonical(lambda q, k, v: scaled_dot_product_attention(q, repeat_kv(k, 3), all_heads_in_turn(v, 3)), 2)
    assert [node.meta["val"].shape[1] for node in attention.args[1:3]] == [HEADS, HEADS]


@pytest.mark.parametrize(("given", "expected"), [({}, 0.5), ({"scale": 2.0}, 2.0)])
def test_the_scale_is_the_given_one_or_that_of_the_width(given, expected):
    attention = canonical(lambda q, k, v: scaled_dot_product_attention(q, k, v, **given), HEADS)
    assert scoring(attention)["scale"] == expected


@pytest.mark.parametrize("causal", [False, True])
def test_is_causal_is_kept(causal):
    attention = canonical(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal), HEADS)
    assert scoring(attention).get("causal", False) is causal


class Refused(nn.Module):
    def forward(self, q, k, v):
        for _ in range(2):
            q = scaled_dot_product_attention(q, k, v[:, :1], enable_gqa=True)
        return scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)


def test_every_attention_that_cannot_be_made_canonical_is_refused_at_once_and_each_line_once():
    with pytest.raises(BuildError) as caught:
        canonical(Refused(), HEADS)
    refusal = (
        "error[attention-shape]: grouped attention over q {}, k {}, v {} is not supported\n"
        "  where  test_attention.py:{}\n"
        "  why    with enable_gqa the operator is [batch, heads, sequence, head dim], with as many heads in k as in v\n"
        "  fix    join the leading dims, or repeat the heads of k and v without enable_gqa"
    )
    first = Refused.forward.__code__.co_firstlineno
    whole = [1, 2, 6, 5, 4]
    assert str(caught.value) == "\n".join(
        [
            refusal.format([2, 6, 5, 4], [2, 6, 5, 4], [2, 1, 5, 4], first + 2),
            refusal.format(whole, whole, whole, first + 3),
        ]
    )


def test_a_batch_of_one_is_read_by_all():
    attention = canonical(lambda q, k, v: scaled_dot_product_attention(q, k[:1], v[:1]), HEADS)
    assert [list(node.meta["val"].shape[:2]) for node in attention.args[:3]] == [[2, HEADS]] * 3


def test_dims_before_the_heads_become_heads():
    attention = canonical(lambda q, k, v: scaled_dot_product_attention(*(x.unflatten(0, (1, 2)) for x in (q, k, v))), 6)
    assert [list(node.meta["val"].shape) for node in attention.args[:3]] == [[1, 2 * HEADS, LENGTH, WIDTH]] * 3


SPELLED = {
    "einsum with an ellipsis": lambda q, k, v: softmaxed("...id,...jd->...ij", "...ij,...jd->...id", q, k, v),
    "einsum without the keys' heads": lambda q, k, v: softmaxed(
        "bhid,bjd->bhij", "bhij,bjd->bihd", q, k[:, 0], v[:, 0]
    ),
    "einsum over groups": lambda q, k, v: softmaxed(
        "bkgid,bkjd->bkgij", "bkgij,bkjd->bikgd", q.unflatten(1, (2, 3)), k[:, :2], v[:, :2]
    ),
    "einsum over groups, rows before them": lambda q, k, v: softmaxed(
        "bikgd,bjkd->bkgij", "bkgij,bjkd->bikgd",
        q.unflatten(1, (2, 3)).permute(0, 3, 1, 2, 4), k[:, :2].transpose(1, 2), v[:, :2].transpose(1, 2),
    ),
    "groups by broadcasting": lambda q, k, v: (
        (q.unflatten(1, (2, 3)) @ k[:, :2, None].mT).softmax(-1) @ v[:, :2, None]
    ),
    "less the highest score": lambda q, k, v: (
        (lambda s: s - s.max(-1, keepdim=True).values)(q @ k.mT).softmax(-1) @ v
    ),
    "heads joined with the batch": lambda q, k, v: (
        (q.flatten(0, 1) @ k.flatten(0, 1).mT).view(2, HEADS, LENGTH, LENGTH).add(v[:, :1, :, :1]).flatten(0, 1)
        .softmax(-1) @ v.flatten(0, 1)
    ),
}  # fmt: skip


def softmaxed(scores: str, sums: str, q, k, v):
    return torch.einsum(sums, torch.einsum(scores, q, k).softmax(-1), v)


@pytest.mark.parametrize("spelling", SPELLED)
def test_products_of_every_spelling_are_attention_over_the_heads_there_are(spelling):
    attention = canonical(SPELLED[spelling], HEADS)
    heads = 1 if "without" in spelling else 2 if "groups" in spelling else HEADS
    assert [list(node.meta["val"].shape[:2]) for node in attention.args[:3]] == [[2, HEADS], [2, heads], [2, heads]]
