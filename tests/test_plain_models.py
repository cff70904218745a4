"""Plain PyTorch as people write it: loss and every gradient against eager."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.steps import equal_to_eager, gathers

V, H, N, S = 64, 32, 4, 13
D = H // N
PADDED = torch.zeros(2, S, dtype=torch.bool)
PADDED[1, -4:] = True


class Model(nn.Module):
    """A residual block around `f(parts, x)` between an embedding and a head."""

    def __init__(self, f, parts: nn.Module | None = None):
        super().__init__()
        self.tokens, self.head, self.f = nn.Embedding(V, H), nn.Linear(H, V), f
        self.parts = parts or nn.ModuleDict({name: nn.Linear(H, H) for name in "qkvo"})

    def forward(self, input_ids: Tensor, labels: Tensor, **more: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        x = x + self.f(self.parts, x, **more)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def built(f, parts: nn.Module | None = None, ranks: int = 3, **more: Tensor):
    draw = torch.Generator().manual_seed(0)
    batch = {
        name: torch.stack([torch.randperm(V, generator=draw)[:S] for _ in range(2)]) for name in ("input_ids", "labels")
    }
    torch.manual_seed(0)
    for parameter in parts.parameters() if parts is not None else ():
        nn.init.normal_(parameter, std=0.2)
    return equal_to_eager(Model(f, parts).double(), batch | more, ranks)


def squares(program) -> list[str]:
    """Names of floating values with rows and keys."""
    return [name for name, value in program.values().items() if value.shape.count(S) > 1 and value.dtype == "f64"]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, D)).transpose(1, 2)


def qkv(parts, x: Tensor) -> list[Tensor]:
    return [heads(parts[name](x)) for name in "qkv"]


def joined(parts, x: Tensor) -> Tensor:
    return parts["o"](x.transpose(1, 2).flatten(2))


def causal(scores: Tensor) -> Tensor:
    at = torch.arange(S)
    return scores.masked_fill(at > at[:, None], -torch.inf)


def grouped_by_einsum(parts, x: Tensor) -> Tensor:
    q, k, v = qkv(parts, x)
    scores = causal(torch.einsum("bkgid,bkjd->bkgij", q.unflatten(1, (2, 2)), k[:, :2]) * D**-0.5)
    return joined(parts, torch.einsum("bkgij,bkjd->bkgid", scores.softmax(-1), v[:, :2]).flatten(1, 2))


def grouped_by_broadcasting(parts, x: Tensor) -> Tensor:
    q, k, v = qkv(parts, x)
    weights = causal(q.unflatten(1, (2, 2)) @ k[:, :2, None].mT * D**-0.5).softmax(-1)
    return joined(parts, (weights @ v[:, :2, None]).flatten(1, 2))


def one_key_head(parts, x: Tensor) -> Tensor:
    q, k, v = heads(parts["q"](x)), parts["k"](x)[..., :D], parts["v"](x)[..., :D]
    weights = causal(torch.einsum("bhid,bjd->bhij", q, k) * D**-0.5).softmax(-1)
    return joined(parts, torch.einsum("bhij,bjd->bhid", weights, v))


def ellipsis(parts, x: Tensor) -> Tensor:
    q, k, v = qkv(parts, x)
    scores = causal(torch.einsum("...id,...jd->...ij", q, k) * D**-0.5)
    return joined(parts, torch.einsum("...ij,...jd->...id", scores.softmax(-1), v))


def heads_in_the_batch(parts, x: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in qkv(parts, x))
    scores = (q @ k.mT * D**-0.5).view(2, N, S, S) + torch.full((S, S), -torch.inf).triu(1)
    return joined(parts, (scores.view(2 * N, S, S).softmax(-1) @ v).view(2, N, S, D))


def padded_in_the_batch(parts, x: Tensor, padded: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in qkv(parts, x))
    scores = (q @ k.mT).view(2, N, S, S).masked_fill(padded[:, None, None], -torch.inf)
    return joined(parts, (scores.flatten(0, 1).softmax(-1) @ v).view(2, N, S, D))


def blocks(parts, x: Tensor) -> Tensor:
    """Tokens see their own block of four."""
    q, k, v = (heads(parts[n](F.pad(x, (0, 0, 0, 3))).view(-1, 4, H)).unflatten(0, (2, 4)) for n in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return parts["o"](out.transpose(2, 3).reshape(2, 16, H)[:, :S])


def latents(parts, x: Tensor) -> Tensor:
    """Keys and values that are the same in every row of the batch."""
    k, v = (heads(parts[name](torch.linspace(-1, 1, 6 * H, dtype=x.dtype).view(1, 6, H))) for name in "kv")
    return joined(parts, F.scaled_dot_product_attention(heads(parts["q"](x)), k, v))


@pytest.mark.parametrize("ranks", [3, 8])
@pytest.mark.parametrize("attend", [
    grouped_by_einsum, grouped_by_broadcasting, one_key_head, ellipsis, heads_in_the_batch, blocks, latents,
])  # fmt: skip
def test_attention_however_it_is_spelled_makes_no_square_of_the_sequence(attend, ranks):
    compiled = built(attend, ranks=ranks)
    assert not compiled.fallbacks and not squares(compiled.whole)


def test_padding_of_heads_joined_with_the_batch_makes_no_square_of_the_sequence():
    assert not squares(built(padded_in_the_batch, padded=PADDED).whole)


def test_summands_of_gradients_cut_unevenly_are_exchanged():
    attention = nn.MultiheadAttention(H, N, batch_first=True)
    built(lambda m, x: m(x, x[:, ::2], x[:, ::2], need_weights=False)[0], attention)


LAYER = dict(d_model=H, nhead=N, dim_feedforward=48, dropout=0.0, batch_first=True)
MODULES = {
    "batch norm in eval": (lambda: nn.BatchNorm1d(H), lambda m, x: m.eval()(x.mT).mT),
    "bias for keys": (
        lambda: nn.MultiheadAttention(H, N, add_bias_kv=True, batch_first=True),
        lambda m, x: m(x, x, x, need_weights=False)[0],
    ),
    "a key of zeros": (
        lambda: nn.MultiheadAttention(H, N, add_zero_attn=True, batch_first=True),
        lambda m, x: m(x, x, x, need_weights=False)[0],
    ),
    "keys of another width": (
        lambda: nn.MultiheadAttention(H, N, kdim=8, vdim=16, batch_first=True),
        lambda m, x: m(x, x[..., :8], x[..., :16])[0],
    ),
    "decoder with memory": (
        lambda: nn.TransformerDecoderLayer(**LAYER),
        lambda m, x: m(x, x[:, :7], tgt_mask=nn.Transformer.generate_square_subsequent_mask(S, dtype=x.dtype)),
    ),
    "identity matrix": (lambda: nn.Linear(H, H), lambda m, x: m(x) @ torch.eye(H, dtype=x.dtype)),
    "linear attention": (
        lambda: nn.Linear(H, 2 * D),
        lambda m, x: (lambda k, v: ((k[..., None] * v[..., None, :]).cumsum(1) * k[..., None]).sum(2).repeat(1, 1, N))(
            *m(x).split(D, -1)
        ),
    ),
    "positions by linspace": (
        lambda: nn.Linear(H, H), lambda m, x: m(x) + torch.linspace(0, 1, S, dtype=x.dtype)[:, None],
    ),
    "windows by unfold": (
        lambda: nn.Linear(H, H),
        lambda m, x: (lambda w: (w * (x[..., None] * w).sum(2, keepdim=True).softmax(-1)).sum(-1))(
            F.pad(m(x), (0, 0, 3, 0)).unfold(1, 4, 1)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_functions_of_torch_gather_no_hidden_state(name):
    make, f = MODULES[name]
    compiled = built(f, make())
    assert not compiled.fallbacks
    assert gathers(compiled.program, 2 * S * H) == []


def test_a_recurrent_network_is_exact():
    assert not built(lambda m, x: m(x)[0].repeat(1, 1, 4), nn.GRU(H, 8, batch_first=True)).fallbacks


class Scaled(nn.Module):
    """A product with a parameter and buffers, one of them in no checkpoint."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(H, H))
        self.register_buffer("scale", torch.rand(H))
        self.register_buffer("shift", torch.rand(H), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight * self.scale + self.shift


@pytest.mark.parametrize("called", [("a", "b"), ("b",), ("b", "a", "b")])
def test_a_module_that_has_two_names(called):
    parts = nn.ModuleDict({"a": Scaled()})
    parts["b"] = parts["a"]

    def f(parts, x):
        for name in called:
            x = x + parts[name](x)
        return x

    whole = built(f, parts).whole
    names = {entry.value.name for entry in whole.inputs if "parts" in entry.value.name}
    assert names == {"parts.a.weight", "parts.a.scale", "parts.a.shift"}


def heads_by_convolutions(parts, x: Tensor) -> Tensor:
    """Attention between convolutions over [B, H, S]: the head dim of q, k, v and of the output has a stride of S."""
    q, k, v = (parts[name](x.mT).unflatten(1, (N, D)).mT for name in "qkv")
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return parts["o"](o.mT.flatten(1, 2)).mT


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_head_dim_need_not_be_the_innermost_in_memory(ranks):
    parts = nn.ModuleDict({name: nn.Conv1d(H, H, 1, bias=False) for name in "qkvo"})
    built(heads_by_convolutions, parts, ranks)
