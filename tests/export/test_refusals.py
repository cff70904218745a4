"""Models refused before or while their forward runs, with the whole text; and what looks like them and is not."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from autosp_aot.commands.build.builder import build
from autosp_aot.errors import BuildError
from tests.architectures import SMALL
from tests.export.mend import line
from tests.steps import equal_to_eager

H, V, S = 32, 64, 5
BATCH = {name: torch.arange(2 * S).view(2, S) for name in ("input_ids", "labels")}


class Model(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.tokens, self.inner, self.head = nn.Embedding(V, H), inner, nn.Linear(H, V)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.inner(self.tokens(input_ids))).flatten(0, 1), labels.flatten())


class Lambda(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.inner, self.f = nn.Linear(H, H), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.inner(x))


def refusal(model: nn.Module, **options) -> str:
    with pytest.raises(BuildError) as caught:
        build(model, BATCH, 2, weights=False, **options)
    return str(caught.value)


class TwoAttentions(nn.Module):
    """Two stock models, each with attention of its own."""

    def __init__(self, *attentions: str):
        super().__init__()
        self.parts = nn.ModuleList(hf.LlamaModel(hf.LlamaConfig(**SMALL)) for _ in attentions)
        for part, attention in zip(self.parts, attentions):
            part.config._attn_implementation = attention


def test_foreign_attention_kernels_are_refused_by_name_all_at_once():
    block = (
        "error[attention-implementation]: the model's attention is {!r}\n"
        f"  where  {line(TwoAttentions.__init__)} (build_model)\n"
        "  why    that is a kernel of its own: capture cannot see which queries it lets see which keys\n"
        '  fix    give the model attn_implementation="sdpa" or "eager": the kernel to run with is chosen for the target'
    )
    names = "flash_attention_2", "flex_attention"
    assert refusal(TwoAttentions(*names)) == "\n".join(map(block.format, names))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_outside_of_forward_is_refused():
    assert refusal(Model(nn.utils.weight_norm(nn.Linear(H, H)))) == (
        "error[state-mutated]: the model keeps what a step computed in inner.weight\n"
        f"  where  {line(Model.__init__)} (build_model)\n"
        "  why    state that outlives a step is not part of the program\n"
        "  fix    give a model that has not run, and keeps nothing; for torch.nn.utils.weight_norm take "
        "torch.nn.utils.parametrizations.weight_norm"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_that_are_scripted_or_not_finished_are_refused_all_at_once():
    parts = torch.jit.script(nn.Linear(H, H)), nn.LazyLinear(H, bias=False)
    assert refusal(nn.Sequential(*parts)) == (
        "error[scripted-module]: module '0' is compiled by torch.jit\n"
        "  where  build_model\n"
        "  why    its code is no Python that could be captured\n"
        "  fix    give the module that it was made of\n"
        "error[lazy-parameter]: parameter 'weight' of module '1' has no shape yet\n"
        "  where  build_model\n"
        "  why    it gets one when the model runs for the first time\n"
        "  fix    give the shape, or run the model once in build_model"
    )


def vmapped(x: Tensor) -> Tensor:
    return torch.vmap(torch.tanh)(x)


def sparse(x: Tensor) -> Tensor:
    return torch.sparse.mm(torch.eye(S).to_sparse(), x[0]).expand_as(x)


def test_function_transforms_are_refused_by_name():
    block = (
        "error[operator-unknown]: {} is not an operator we can see into\n"
        f"  where  {line(vmapped, 1)}\n"
        "  why    its effect on a part of the sequence is unknown\n"
        "  fix    write it with torch operators"
    )
    assert refusal(Model(Lambda(vmapped))) == "\n".join(map(block.format, ("_add_batch_dim", "_remove_batch_dim")))


def test_sparse_tensors_are_refused():
    assert refusal(Model(Lambda(sparse))) == (
        "error[layout-unsupported]: aten._to_sparse.default makes a sparse tensor\n"
        f"  where  {line(sparse, 1)}\n"
        "  why    programs have dense tensors only\n"
        "  fix    compute it with dense tensors: sparse=False in an embedding"
    )


def narrowed(x: Tensor) -> Tensor:
    return x + x.to(torch.float8_e4m3fn).to(x.dtype)


def test_floats_of_eight_bits_are_refused():
    assert refusal(Model(Lambda(narrowed))) == (
        "error[dtype-unsupported]: aten._to_copy.default makes or takes torch.float8_e4m3fn\n"
        f"  where  {line(narrowed, 1)}\n"
        "  why    programs have no such dtype\n"
        "  fix    compute it in real floats or integers"
    )


@pytest.mark.parametrize(("dims", "what"), [
    ({}, "no input has a sequence dim"),
    ({"tokens": 1}, "the batch has no dim 1 of 'tokens'"),
    ({"input_ids": 2}, "the batch has no dim 2 of 'input_ids'"),
    ({"input_ids": 1, "labels": 0}, "the sequence is {'input_ids': 5, 'labels': 2} long"),
])  # fmt: skip
def test_sequence_dims_that_the_batch_does_not_have_are_refused(dims, what):
    assert refusal(Model(nn.Linear(H, H)), sequence_dims=dims) == (
        f"error[sequence-dim-unknown]: {what}\n"
        "  where  sequence_dims\n"
        "  why    the ranks share one sequence, which is a dim of at least one input\n"
        '  fix    say which it is: sequence_dims={"input_ids": 1, ...}'
    )


def test_a_sequence_dim_may_be_counted_from_the_end():
    dims = {"input_ids": -1, "labels": 1}
    assert build(Model(nn.Linear(H, H)), BATCH, 2, sequence_dims=dims).manifest.sequence_dims["input_ids"] == 1


class Masked(nn.Module):
    """Asks torch to find out whether its mask is causal, once of one that is and once of one that is not."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(H, 4, 48, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(S, dtype=x.dtype)
        return self.layers(self.layers(x, mask=causal), mask=causal.T)


@pytest.mark.parametrize("make", [
    lambda: Model(Masked()),
    lambda: Model(torch.compile(nn.Linear(H, H))),
    lambda: torch.compile(Model(nn.Linear(H, H))),
    lambda: Model(Lambda(torch.compile(torch.tanh))),
], ids=["masks of encoders", "compiled module", "compiled model", "compiled function"])  # fmt: skip
def test_what_torch_decides_while_forward_runs_is_settled(make):
    torch.manual_seed(0)
    model = make().double()
    with torch.compiler.set_stance("force_eager"):
        equal_to_eager(model, BATCH, 2)
