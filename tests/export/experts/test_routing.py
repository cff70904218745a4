import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (defines torch.ops.transformers.grouped_mm_fallback)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from autosp_aot.errors import BuildError
from autosp_aot.export.diagnose import refuse_operators
from autosp_aot.export.experts.routing import canonical_routing
from autosp_aot.export.fake import fake_copy
from autosp_aot.export.regions import flat_regions
from tests.eager import eager
from tests.steps import sharded, worst

# A product of sorted rows in any dtype; torch's own takes bf16 alone when captured.
grouped_mm = torch.ops.transformers.grouped_mm_fallback
TOKENS, CHOSEN, EXPERTS, WIDTH, WIDE = 6, 2, 4, 8, 16


class Experts(nn.Module):
    """`route(self, x [T, 8], ids [2 T], weights [2 T])` mixes experts: `self.mix` are the products of sorted rows."""

    def __init__(self, route):
        super().__init__()
        self.route = route
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDE) / 3)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, WIDE) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDE, WIDTH) / 3)

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(CHOSEN)
        return self.route(self, x, ids.reshape(-1), weights.reshape(-1))

    def mix(self, x, ends):
        return grouped_mm(grouped_mm(x, self.up, offs=ends).relu(), self.down, offs=ends)


class Model(nn.Module):
    def __init__(self, route):
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.experts = Experts(route)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        x = x + self.experts(x.reshape(-1, WIDTH)).reshape(x.shape)
        return cross_entropy((x @ self.embed.weight.T).flatten(0, 1), labels.flatten())


def ends_of(ids, high=EXPERTS - 1):
    return torch.histc(ids.float(), EXPERTS, 0, high).cumsum(0, dtype=torch.int32)


def summed(y):
    return y.view(-1, CHOSEN, WIDTH).sum(1)


def by_the_inverse(self, x, ids, weights):
    ids, order = ids.sort()
    y = self.mix(x[order // CHOSEN], ends_of(ids)) * weights[order][:, None]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return summed(y[inverse])


def by_a_second_argsort(self, x, ids, weights):
    order = ids.argsort(stable=True)
    y = self.mix(x.repeat_interleave(CHOSEN, 0)[order], ends_of(ids))
    return summed(y[order.argsort()] * weights[:, None])


def by_writing_back(self, x, ids, weights):
    order = ids.argsort()
    y = self.mix(x[torch.div(order, CHOSEN, rounding_mode="floor")], ends_of(ids[order]))
    back = torch.empty_like(y)
    back[order] = y
    return summed(back * weights.unsqueeze(-1))


def by_adding_up(self, x, ids, weights):
    ids, order = ids.sort(stable=True)
    token = order // CHOSEN
    y = self.mix(x.index_select(0, token), ends_of(ids)) * weights[order].view(-1, 1)
    return torch.zeros_like(x).index_add_(0, token, y)


def by_scattering(self, x, ids, weights):
    ids, order = ids.sort()
    token = (order // CHOSEN).reshape(-1, 1).expand(-1, WIDTH)
    y = self.mix(x[order // CHOSEN], ends_of(ids, EXPERTS)) * weights[order].reshape(-1, 1)
    return x.new_ones(x.shape).scatter_add(0, token, y)


def with_what_experts_add(self, x, ids, weights):
    ids, order = ids.sort()
    ends = ends_of(ids)
    y = grouped_mm(x[order // CHOSEN], self.up, offs=ends)
    y.add_(self.up_bias[ids])
    gate, up = y.chunk(2, -1)
    y = torch.cat([gate.sigmoid(), up], -1).softmax(1)
    y = grouped_mm(y, self.down, offs=ends)
    return summed((nn.functional.layer_norm(y, (WIDTH,)) * weights[order][:, None])[order.argsort()])


def of_one_expert_each(self, x, ids, weights):
    ids = ids.view(-1, CHOSEN)[:, 0]
    ids, order = ids.sort()
    return self.mix(x[order], ends_of(ids))[order.argsort()] * weights.view(-1, CHOSEN)[:, :1]


def of_copied_weights(self, x, ids, weights):
    x = x.repeat_interleave(CHOSEN, 0)
    y = torch.bmm(self.up.transpose(1, 2)[ids], x.unsqueeze(-1)).squeeze(-1)
    return summed(torch.bmm(y.unsqueeze(1), self.down[ids]).squeeze(1) * weights[:, None])


def partly_without_gradient(self, x, ids, weights):
    ids, order = ids.sort()
    y = self.mix(x[order // CHOSEN], ends_of(ids))
    with torch.no_grad():
        scale, back = y.abs().sum(1, keepdim=True), order.argsort()
    return summed((y / scale)[back] * weights[:, None])


def by_a_table_of_ids(self, x, ids, weights):
    """Ids of any origin: the weights are looked up at them among those of all experts."""
    ids = (torch.arange(len(ids)) * 3 % EXPERTS).int().long()
    weights = self.router(x).sigmoid().gather(1, ids.view(-1, CHOSEN))
    ids, order = ids.sort()
    y = self.mix(x[order // CHOSEN], ends_of(ids)) * weights.reshape(-1)[order][:, None]
    return summed(y[order.argsort()])


REWRITTEN = [
    by_the_inverse, by_a_second_argsort, by_writing_back, by_adding_up, by_scattering, with_what_experts_add,
    of_one_expert_each, of_copied_weights, partly_without_gradient, by_a_table_of_ids,
]  # fmt: skip


def exported(route):
    mode = FakeTensorMode()
    model, x = fake_copy(Experts(route).double(), mode), mode.from_tensor(torch.empty(TOKENS, WIDTH).double())
    with mode, flat_regions():
        return torch.export.export(model, (x,), strict=False)


def text(program) -> str:
    calls = (node for node in program.graph.nodes if node.op == "call_function")
    return "\n".join(f"{node.name} = {node.target}{node.args}" for node in calls)


@pytest.mark.parametrize("route", REWRITTEN)
def test_each_rank_routes_its_own_tokens(route):
    torch.manual_seed(0)
    model = Model(route).double()
    batch = {"input_ids": torch.randint(64, (2, 13)), "labels": torch.randint(64, (2, 13))}
    compiled, results = sharded(model, batch, 3)
    assert not compiled.fallbacks
    assert worst(eager(model, batch), results) <= 1e-12


@pytest.mark.parametrize("route", REWRITTEN)
def test_nothing_of_the_sort_is_left(route):
    program = exported(route)
    canonical_routing(program)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("autosp.expert_mm.default") == 2
    assert not {str(grouped_mm.default), "aten.bmm.default", "aten.sort.default", "aten.histc.default"} & set(targets)


def test_the_region_in_token_order():
    program = exported(by_the_inverse)
    canonical_routing(program)
    assert text(program) == """\
linear = aten.linear.default(x, p_router_weight, p_router_bias)
softmax = aten.softmax.int(linear, -1)
topk = aten.topk.default(softmax, 2)
getitem = <built-in function getitem>(topk, 0)
getitem_1 = <built-in function getitem>(topk, 1)
reshape = aten.reshape.default(getitem_1, [-1])
reshape_1 = aten.reshape.default(getitem, [-1])
clone_default = aten.clone.default(reshape,)
clone_default_1 = aten.clone.default(x,)
unsqueeze_default = aten.unsqueeze.default(clone_default_1, 1)
expand_default = aten.expand.default(unsqueeze_default, [6, 2, 8])
reshape_default = aten.reshape.default(expand_default, [12, 8])
expert_mm_default = autosp.expert_mm.default(clone_default, reshape_default, p_up)
relu_default = aten.relu.default(expert_mm_default,)
expert_mm_default_1 = autosp.expert_mm.default(clone_default, relu_default, p_down)
clone_default_2 = aten.clone.default(reshape_1,)
unsqueeze_default_1 = aten.unsqueeze.default(clone_default_2, 1)
mul_tensor = aten.mul.Tensor(expert_mm_default_1, unsqueeze_default_1)
clone_default_3 = aten.clone.default(mul_tensor,)
view = aten.view.default(clone_default_3, [-1, 2, 8])
sum_1 = aten.sum.dim_IntList(view, [1])"""


def changed(**options):
    """`by_the_inverse`, with something else in one place of it."""
    use = {
        "ids": lambda ids: ids, "sort": torch.sort, "rows": lambda x, order: x[order // CHOSEN], "ends": ends_of,
        "mixed": lambda y: y, "back": lambda y, order: y[order.argsort()],
    } | options  # fmt: skip

    def route(self, x, ids, weights):
        ids, order = use["sort"](use["ids"](ids))
        y = use["mixed"](self.mix(use["rows"](x, order), use["ends"](ids)))
        return summed(use["back"](y, order) * weights[:, None])

    return route


def written_under_another_name(y):
    y.view(-1)[::2].mul_(2)
    return y


def ends_changed_later(ids):
    counts = torch.histc(ids.float(), EXPERTS, 0, EXPERTS - 1)
    counts.view(2, 2)[0].zero_()
    return counts.cumsum(0, dtype=torch.int32)


def weights_without_gradient(self, x, ids, weights):
    with torch.no_grad():
        up = self.up[ids]
    return summed(torch.bmm(torch.bmm(x.repeat_interleave(CHOSEN, 0).unsqueeze(1), up), self.down[ids]).squeeze(1))


LEFT = {
    "ids that data could hold": changed(ids=lambda ids: ids * ids),
    "ids written later": changed(ids=lambda ids: ids.view(-1)[:0].zero_().new_zeros(12) + ids),
    "the last expert first": changed(sort=lambda ids: ids.sort(descending=True)),
    "rows of others": changed(rows=lambda x, order: x.repeat_interleave(CHOSEN, 0)),
    "rows at other places": changed(rows=lambda x, order: x[(order // CHOSEN).flip(0)]),
    "bins of other widths": changed(ends=lambda ids: ends_of(ids, 2 * EXPERTS)),
    "bins of the data": changed(ends=lambda ids: ends_of(ids, 0)),
    "counts of other ids": changed(ends=lambda ids: ends_of(ids // 2)),
    "counts that wrap": changed(ends=lambda ids: ends_of(ids.to(torch.uint8)).to(torch.uint8).int()),
    "counts written later": changed(ends=ends_changed_later),
    "rows that see each other": changed(mixed=lambda y: y.softmax(0)),
    "rows that see those before": changed(mixed=lambda y: y.cumsum(0)),
    "rows moved on": changed(mixed=lambda y: y.roll(1, 0)),
    "rows as columns": changed(mixed=lambda y: y.t().reshape(12, WIDTH)),
    "a row's own number": changed(mixed=lambda y: y * torch.arange(12)[:, None]),
    "rows drawn": changed(mixed=lambda y: nn.functional.dropout(y, 0.5)),
    "rows written under another name": changed(mixed=written_under_another_name),
    "the order left": changed(back=lambda y, order: y),
    "the order back to front": changed(back=lambda y, order: y[order.argsort(descending=True)]),
    "the order again": changed(back=lambda y, order: y[order]),
    "some rows in their order": changed(back=lambda y, order: y[order.argsort()] + y[:1]),
    "half of the rows put back": changed(back=lambda y, order: torch.zeros_like(y).index_put((order // 2,), y)),
}  # fmt: skip


def test_the_region_that_is_changed_is_rewritten():
    program = exported(changed())
    canonical_routing(program)
    assert "expert_mm" in text(program)


@pytest.mark.parametrize("route", LEFT.values(), ids=LEFT)
def test_what_is_not_certain_stays_as_it_is(route):
    program = exported(route)
    before = text(program)
    canonical_routing(program)
    assert text(program) == before


def test_weights_looked_up_without_gradient_get_none():
    model = Model(weights_without_gradient).double()
    batch = {"input_ids": torch.randint(64, (2, 13)), "labels": torch.randint(64, (2, 13))}
    _, results = sharded(model, batch, 3)
    assert worst(eager(model, batch), results) <= 1e-12


def test_a_product_that_stays_is_refused_with_what_to_do():
    program = exported(LEFT["the last expert first"])
    canonical_routing(program)
    with pytest.raises(BuildError) as caught:
        refuse_operators(program, nn.Module())
    line = Experts.forward.__code__.co_firstlineno + 2
    assert str(caught.value) == (
        "error[operator-unknown]: transformers.grouped_mm_fallback.default is not an operator we can see into\n"
        f"  where  test_routing.py:{line}\n"
        "  why    its effect on a part of the sequence is unknown\n"
        "  fix    sort topk's indices, count them with torch.histc, let nothing see that order but its inverse; or\n"
        '         multiply with weight[ids] in torch operators (transformers: experts_implementation="batched_mm")'
    )
