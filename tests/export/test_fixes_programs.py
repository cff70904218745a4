"""What no program has, a loss that is not found, what is known to fail: refused with a fix that builds."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.autograd import Function
from torch.nn.functional import scaled_dot_product_attention

from autosp_aot.commands.build.builder import build
from autosp_aot.errors import BuildError
from autosp_aot.export import diagnose
from autosp_aot.export.diagnose import refuse_other_gradients
from tests.architectures import SMALL
from tests.export.mend import BATCH, DIMS, H, Mend, Model, S, V, batch, line, made, trains_as_eager


class Plain(Model):
    def inner(self, x, labels):
        return x * self.gain


# --- what no program has ---


@torch.library.custom_op("autosp_test::tripled", mutates_args=())
def tripled(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


tripled.register_fake(torch.empty_like)


class CustomOperator(Model):
    def inner(self, x, labels):
        return tripled(x.detach()) + x  # here


class TorchOperators(Model):
    def inner(self, x, labels):
        return 3 * x.detach() + x


class SparseEmbedding(Model):
    def set_up(self):
        self.embedding = nn.Embedding(V, H, sparse=True)

    def forward(self, tokens, labels):
        x = self.embedding(tokens)  # here
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class DenseEmbedding(SparseEmbedding):
    def set_up(self):
        self.embedding = nn.Embedding(V, H)


class EightBits(Model):
    def inner(self, x, labels):
        return x + x.to(torch.float8_e4m3fn).to(x.dtype)  # here


class SixteenBits(Model):
    def inner(self, x, labels):
        return x + x.to(torch.bfloat16).to(x.dtype)


class Scores(Model):
    def inner(self, x, labels):
        weights = (x @ x.mT).softmax(-1)  # here
        return weights @ x + weights.square().mean()


class Attention(Model):
    def inner(self, x, labels):
        return scaled_dot_product_attention(x, x, x)


class SummedMask(Model):
    def inner(self, x, labels):
        at = torch.arange(x.shape[1])
        mask = (at[:, None] * at).cumsum(0) < 9
        return scaled_dot_product_attention(x, x, x, attn_mask=mask)  # here


class ComparedMask(Model):
    def inner(self, x, labels):
        at = torch.arange(x.shape[1])
        return scaled_dot_product_attention(x, x, x, attn_mask=at[:, None] >= at)


class ByExperts(Model):
    def inner(self, x, labels):
        ends = torch.tensor([5, 2 * S], dtype=torch.int32)
        weights = torch.stack([self.linear.weight, self.linear.weight.mT])
        return nn.functional.grouped_mm(x.flatten(0, 1), weights, offs=ends).view_as(x)


def by_experts_in_fp32():
    return made(ByExperts).float()


class ByWeights(Model):
    def inner(self, x, labels):
        ids = (torch.arange(2 * S) >= 5).long()
        weights = torch.stack([self.linear.weight, self.linear.weight.mT])
        return (x.flatten(0, 1).unsqueeze(1) @ weights[ids]).view_as(x)


class Misshapen(Model):
    def inner(self, x, labels):
        return x.view(2, 7, -1)  # here


class Shaped(Model):
    def inner(self, x, labels):
        return x.view(2, S, -1)


class Pointer(Model):
    def inner(self, x, labels):
        return x + (0 if x.data_ptr() else 1)  # here


class NoPointer(Model):
    def inner(self, x, labels):
        return x


class ReadsForward(Function):
    @staticmethod
    def forward(ctx, x, model):
        return x * model.gain

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class SavesAll(Function):
    @staticmethod
    def forward(ctx, x, gain):
        ctx.save_for_backward(x)
        return x * gain

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad, (grad * x).sum((0, 1))


class OwnFunction(Model):
    def inner(self, x, labels):
        return ReadsForward.apply(x, self)  # here


class OfItsArguments(Model):
    def inner(self, x, labels):
        return SavesAll.apply(x, self.gain)


class FewHeadsOfV(Model):
    def inner(self, x, labels):
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        return scaled_dot_product_attention(q, q, q[:, :1], enable_gqa=True).transpose(1, 2).flatten(2)  # here


class RepeatedHeads(Model):
    def inner(self, x, labels):
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        return scaled_dot_product_attention(q, q, q[:, :1].expand_as(q)).transpose(1, 2).flatten(2)


class Flash(nn.Module):
    """A stock model, whose attention is called `attention`."""

    def __init__(self, attention: str):
        super().__init__()
        self.inside = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
        self.inside.config._attn_implementation = attention

    def forward(self, tokens, labels):
        return self.inside(tokens, labels=labels).loss


class Lazy(Model):
    def set_up(self):
        self.linear = nn.LazyLinear(H)


def run_once():
    model = made(Lazy)
    model(BATCH["tokens"], BATCH["labels"])
    return model


class Scripted(Model):
    def set_up(self):
        self.linear = torch.jit.script(nn.Linear(H, H))


# --- the loss, and what is known when it is built ---


class TwoScalars(Model):
    def forward(self, tokens, labels):  # here
        x = self.head(self.embedding(tokens))
        return {"main": x.square().mean(), "other": x.mean()}


class LogitsAlone(Model):
    def forward(self, tokens, labels):  # here
        return self.head(self.embedding(tokens))


class LossByPosition(Model):
    def forward(self, tokens, labels):  # here
        logits = self.head(self.embedding(tokens))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")}


class LossOfAll(Model):
    def forward(self, tokens, labels):
        logits = self.head(self.embedding(tokens))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").mean()}


class LossDetached(Plain):
    def forward(self, tokens, labels):  # here
        return super().forward(tokens, labels).detach()


class Doubling(nn.Parameter):
    """What is multiplied by it is multiplied by twice of it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result + result if func is torch.Tensor.mul else result


class OfItsClass(Plain):
    def set_up(self):
        self.gain = Doubling(self.gain.data)


class Doubled(Model):
    def inner(self, x, labels):
        return x * (2 * self.gain)


class LossAmong(Model):
    def forward(self, tokens, labels):
        logits = self.head(self.embedding(tokens))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "other": logits.mean()}


class LossInTraining(Model):
    def forward(self, tokens, labels):  # here
        logits = self.head(self.embedding(tokens))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss if self.training else torch.tensor(0.0)


def frozen():
    return made(Plain).requires_grad_(False)


def head_alone():
    model = frozen()
    model.head.requires_grad_(True)
    return model


class ShortTable(Model):
    def set_up(self):
        self.positions = nn.Embedding(S - 1, H)

    def inner(self, x, labels):
        return x + self.positions(torch.arange(x.shape[1]))  # here


class LongTable(ShortTable):
    def set_up(self):
        self.positions = nn.Embedding(S, H)


class Merging(Model):
    """Scales its weights for evaluation, as adapters do that are merged."""

    def train(self, mode: bool = True):  # here
        if not mode:
            self.gain.data.mul_(2)
        return super().train(mode)


EVAL = "; or build without the evaluation program: --no-evaluation (evaluation=False)"
LOSS = (
    "compute the loss in forward, as with cross_entropy(logits.flatten(0, 1), labels.flatten()), and return it: "
    "alone, first, or as .loss or ['loss']"
)
OPERATORS = "correct that line; if forward(**example_batch) runs in Python, write it with torch operators"
MASKS = (
    "make it of comparisons and sums of such vectors (causal, windows, segments, prefixes, padding, ALiBi), "
    "or shorten --seq until it takes less than 256 MiB"
)
SOFTMAX = (
    "use scaled_dot_product_attention, or weights = softmax(scores) and weights @ values alone, or a shorter --seq"
)
MENDS = [
    Mend("operator-unknown", "write it with torch operators", CustomOperator, TorchOperators),
    Mend("operator-unknown", diagnose.GROUPED, by_experts_in_fp32, ByWeights, line(ByExperts.inner, 3)),
    Mend("layout-unsupported", "compute it with dense tensors: sparse=False in an embedding", SparseEmbedding,
         DenseEmbedding),
    Mend("dtype-unsupported", "compute it in real floats or integers", EightBits, SixteenBits),
    Mend("capture-failed", OPERATORS, Misshapen, Shaped),
    Mend("capture-failed", OPERATORS, Pointer, NoPointer),
    Mend("custom-gradient", "give it every tensor as an argument, save those it needs, and write to none", OwnFunction,
         OfItsArguments),
    Mend("attention-shape", "join the leading dims, or repeat the heads of k and v without enable_gqa", FewHeadsOfV,
         RepeatedHeads),
    Mend("attention-not-recognised", SOFTMAX, Scores, Attention, length=20000),
    Mend("mask-not-recognised", MASKS, SummedMask, ComparedMask, length=20000),
    *(Mend("attention-implementation", 'give the model attn_implementation="sdpa" or "eager": the kernel to run with '
           "is chosen for the target", lambda: Flash("flash_attention_2"), lambda name=name: Flash(name))
      for name in ("sdpa", "eager")),
    Mend("lazy-parameter", "give the shape, or run the model once in build_model", Lazy, run_once),
    Mend("scripted-module", "give the module that it was made of", Scripted, Plain),
    Mend("no-loss", "say how its parts make one number, as with .mean() or .sum()", LossByPosition, LossOfAll),
    Mend("nothing-trains", "return the loss itself, not detached: alone, first, or as .loss or ['loss']", LossDetached,
         Plain),
    Mend("parameter-overrides", "make it an nn.Parameter, and compute in forward what its class does", OfItsClass,
         Doubled),
    *(Mend("no-loss", LOSS, kind, LossAmong) for kind in (TwoScalars, LogitsAlone)),
    Mend("no-loss", "return the loss in eval mode as well" + EVAL, LossInTraining, Plain),
    Mend("state-mutated", "let train() and eval() leave parameters and buffers alone" + EVAL, Merging, Plain),
    Mend("nothing-trains", "set requires_grad of what is to be trained", frozen, head_alone, line(Model.forward)),
    Mend("index-out-of-range", "shorten the sequence (--seq), or make the table that long", ShortTable, LongTable),
]  # fmt: skip


class Named(Model):
    """Takes a dict of inputs of this name."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, tokens, labels, **more):
        x = self.embedding(tokens) + more[self.name]["weight"]
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_an_input_that_is_called_as_a_parameter_is_one_that_is_renamed():
    given = {**batch(S), "head": {"weight": BATCH["memory"]}}
    with pytest.raises(BuildError) as caught:
        build(made(lambda: Named("head")), given, 2, sequence_dims=DIMS, target="cpu")
    assert str(caught.value) == (
        "error[name-taken]: two inputs of the step are called 'head.weight'\n"
        "  where  example_batch\n"
        "  why    every value needs its own name\n"
        "  fix    rename one of them"
    )
    assert caught.value.problems[0].fix == "rename one of them"
    given["memory"] = given.pop("head")
    artifact = build(made(lambda: Named("memory")), given, 2, sequence_dims=DIMS, target="cpu")
    assert artifact.manifest.compared.startswith("2 steps of SGD")


def test_a_gradient_that_capture_would_lose_is_refused():
    """No model is known that capture does this to; what is captured of this one is made up."""
    model = made(Plain)
    captured = {name for name, _ in model.named_parameters()} - {"gain"}
    with pytest.raises(BuildError) as caught:
        refuse_other_gradients(model(**batch(S)), model, captured, "here")
    assert caught.value.problems[0].fix == "compute the loss with torch operators on tensors"
    trains_as_eager(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mend", MENDS, ids=lambda mend: f"{mend.code}-{mend.refused.__name__}")
def test_the_fix_builds(mend, capfd):
    mend.holds(capfd)
