"""Regions of no_grad and autocast: flat in the graph, and left again where something in them fails."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from autosp_aot.errors import BuildError
from autosp_aot.export.regions import MARKS, Flat, flat_regions


class Nested(nn.Module):
    def forward(self, x):
        # With the cache, eager casts x once and adds the gradients of its uses in bf16; captured, in fp32.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            a = x @ x
            with torch.no_grad():
                b = a @ a
                with torch.autocast("cpu", enabled=False), torch.enable_grad():
                    c = b.float() @ x
                d = c * a
            e = a @ d.to(a.dtype)
        return e.float() @ x, e


def test_nested_regions_are_one_graph_that_computes_the_same():
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with flat_regions():
        exported = torch.export.export(Nested(), (x,), strict=False)
    assert set(MARKS) <= {node.target for node in exported.graph.nodes}
    assert not any(node.op == "get_attr" for node in exported.graph.nodes)
    found, expected = Flat(exported.graph_module).run(x), Nested()(x)
    for a, b in zip(found, expected):
        assert a.dtype is b.dtype and torch.equal(a, b)
    gradients = [torch.autograd.grad(sum(y.float().sum() for y in both), x)[0] for both in (found, expected)]
    assert torch.equal(*gradients)


def test_afterwards_torch_export_is_as_it_was():
    with flat_regions():
        pass
    exported = torch.export.export(Nested(), (torch.ones(4, 4),), strict=False)
    assert torch.ops.higher_order.wrap_with_autocast in {node.target for node in exported.graph.nodes}


class Attends(nn.Module):
    """Every query attends to all before it, in a region."""

    def __init__(self, region):
        super().__init__()
        self.region, self.table = region, nn.Embedding(8, 8)

    def forward(self, tokens, labels):
        x = self.table(tokens)[:, None]
        with self.region():
            y = scaled_dot_product_attention(x, x, x, is_causal=True)
        return (x * y).sum()


@pytest.mark.parametrize(
    "region", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["no_grad", "autocast"]
)
def test_attention_in_a_region_is_canonical(captured, region):
    called = [node.target for node in captured(Attends(region)).graph_module.graph.nodes]
    assert called.count(torch.ops.autosp.attention.default) == 1


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 8)

    def forward(self, tokens, labels):
        x = self.table(tokens)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.enable_grad():
            return torch.bernoulli(x, 0.5).sum()


def test_what_fails_in_a_region_leaves_no_trace(captured):
    with pytest.raises(BuildError, match="derivative for aten::bernoulli is not implemented"):
        captured(Fails())
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert torch.autocast_increment_nesting() == 1
    assert torch.autocast_decrement_nesting() == 0
