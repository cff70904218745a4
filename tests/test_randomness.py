"""Steps that draw: exact against eager with the program's draws put in, the same at every number of ranks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.read import read_manifest, read_rank
from autosp_aot.commands.build.builder import build, model_values
from autosp_aot.commands.check.proof import check
from autosp_aot.errors import ArtifactError
from autosp_aot.export.canonical.canonical import canonical_program
from autosp_aot.export.joint import capture
from autosp_aot.export.subject import Subject
from autosp_aot.ir.program import PerRank
from autosp_aot.ops.random import step_seed
from autosp_aot.passes.pipeline import compile_program
from autosp_aot.passes.step import Step
from autosp_aot.proof.derive import derive
from autosp_aot.runtime.execute import DTYPES
from autosp_aot.runtime.simulate import simulate
from tests.architectures import GPT2
from tests.draws import Draws
from tests.eager import difference, eager
from tests.edits import edit, named

BLOOM = dict(
    vocab_size=64, hidden_size=32, n_layer=1, n_head=4, attention_dropout=0.1, hidden_dropout=0.2, use_cache=False,
)  # fmt: skip
BATCH = {name: torch.arange(26).reshape(2, 13) * 7 % 31 for name in ("input_ids", "labels")}
SEED = step_seed(3, 5)


class Model(nn.Module):
    """An embedding and a head, and between them a function of [B, S, H]."""

    def __init__(self, inner):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.inner = inner

    def forward(self, input_ids, labels):
        return F.cross_entropy(self.head(self.inner(self.embed(input_ids))).flatten(0, 1), labels.flatten())


class Attention(nn.Module):
    """Drops weights; they are spelled out where it gives them."""

    def __init__(self, gives_weights: bool):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, 0.2, batch_first=True)
        self.gives_weights = gives_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.gives_weights)[0]


class Masked(Model):
    """Some tokens are masked, others swapped for random ones, and the model is asked for those alone."""

    def forward(self, input_ids, labels):
        drawn = torch.rand(input_ids.shape)
        ids = input_ids.masked_fill(drawn < 0.3, 31).where(drawn < 0.5, torch.randint_like(input_ids, 31))
        return super().forward(ids, labels.masked_fill(drawn > 0.6, -100))


def noisy(x):
    """Whatever draws a tensor by itself."""
    x = x + torch.randn_like(x) * torch.rand(8, dtype=x.dtype) + torch.randn(13, 1, dtype=x.dtype)
    x = x + torch.empty_like(x).uniform_(-1, 2) * torch.empty_like(x).normal_(0.5, 2) + torch.rand_like(x)
    return x * (torch.randint(3, (2, 13, 1)) + 1)


MODELS = {
    "alpha dropout": lambda: Model(nn.AlphaDropout(0.3)),
    "bernoulli": lambda: Model(lambda x: x * torch.bernoulli(x.detach().sigmoid()) + torch.bernoulli(x.sigmoid())),
    "dropout": lambda: Model(nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 8), nn.Dropout(0.4), nn.Dropout(0.4))),
    "dropout in place": lambda: Model(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2, inplace=True))),
    "dropout over batch and sequence": lambda: Model(lambda x: F.dropout(x.reshape(-1, 8), 0.3).view(x.shape)),
    "dropout sequence first": lambda: Model(lambda x: F.dropout(x.transpose(0, 1), 0.3).transpose(0, 1)),
    "feature dropout": lambda: Model(lambda x: nn.Dropout1d(0.3)(x.transpose(1, 2)).transpose(1, 2)),
    "gumbel softmax": lambda: Model(lambda x: F.gumbel_softmax(x, tau=0.7)),
    "mlp": lambda: Model(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8), nn.Dropout())),
    "noise": lambda: Model(noisy),
    "nothing kept": lambda: Model(nn.Sequential(nn.Linear(8, 8), nn.Dropout(1.0))),
    "stochastic depth": lambda: Model(lambda x: x + x.sin() * x.new_empty(2, 1, 1).bernoulli_(0.5) / 0.5),
    "attention spelled out": lambda: Model(Attention(True)),
    "attention": lambda: Model(Attention(False)),
    "masked tokens": lambda: Masked(lambda x: x),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**BLOOM)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2 | dict(resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3))),
}  # fmt: skip


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double().train()


def compiled(model: nn.Module, ranks: int, recompute: str = "sac") -> tuple[Step, dict[str, torch.Tensor]]:
    """The programs, and values of the graph's constants."""
    whole, constants = canonical_program(capture(Subject(model, BATCH, "cpu")))
    return compile_program(whole, dict.fromkeys(BATCH, 1), BuildConfig(ranks, recompute=recompute)), constants


def results(model: nn.Module, ranks: int, recompute: str = "sac", seed: torch.Tensor = SEED) -> list[dict]:
    """What every rank's program gives."""
    built, constants = compiled(model, ranks, recompute)
    assert not built.fallbacks
    inputs = model_values(model) | dict(model.named_buffers()) | constants | BATCH | {"seed": seed}
    grad_loss = torch.ones((), dtype=DTYPES[built.whole.values()["grad_loss"].dtype])
    return simulate([built.program.for_rank(rank) for rank in range(ranks)], inputs, grad_loss)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_loss_and_gradients_are_eager_s_with_the_same_draws_at_any_number_of_ranks(name):
    model = model_of(name)
    with Draws(SEED):
        reference = eager(model, BATCH)
    limit = 1e-6 if name in ("bloom", "gpt2") else 1e-12
    for ranks in (1, 2, 3, 4):
        for result in results(model, ranks):
            gradients = {label.removeprefix("grad."): g for label, g in result.items() if label != "loss"}
            assert difference(reference, result["loss"], gradients) <= limit


class Drawn(nn.Module):
    """What is drawn for [2, 13, H] is the gradient of `weight`."""

    def __init__(self, draw):
        super().__init__()
        self.weight, self.draw = nn.Parameter(torch.ones(2, 13, 1000)), draw

    def forward(self, input_ids, labels):
        return (self.weight * self.draw(torch.empty_like(self.weight))).sum() + 0 * (input_ids + labels).sum()


DISTRIBUTIONS = {
    "bernoulli": lambda x: x.bernoulli_(0.3),
    "bernoulli of a tensor": lambda x: torch.bernoulli(torch.full_like(x, 0.3)),
    "dropout": lambda x: F.dropout(torch.ones_like(x), 0.3),
    "exponential": lambda x: x.exponential_(2.0),
    "normal": lambda x: x.normal_(0.5, 2.0),
    "normal of tensors": lambda x: torch.normal(torch.full_like(x, 0.5), torch.full_like(x, 2.0)),
    "rand": torch.rand_like,
    "rand in bf16": lambda x: torch.rand_like(x, dtype=torch.bfloat16),
    "randint": lambda x: torch.randint_like(x, -2, 5),
    "randn": torch.randn_like,
    "randn in fp64": lambda x: torch.randn_like(x, dtype=torch.float64),
    "uniform": lambda x: x.uniform_(-1.0, 2.0),
}


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
def test_what_is_drawn_has_torchs_distribution(name):
    """Kolmogorov and Smirnov's distance of two samples; one in a thousand pairs alike is further apart."""
    model = Drawn(DISTRIBUTIONS[name])
    torch.manual_seed(0)
    ours, theirs = results(model, 2)[0]["grad.weight"].flatten(), eager(model, BATCH)[1]["weight"].flatten()
    at = torch.cat([ours, theirs]).unique()
    below = [torch.searchsorted(sample.sort().values, at, right=True) / len(sample) for sample in (ours, theirs)]
    assert (below[0] - below[1]).abs().max() < 1.95 * (2 / len(ours)) ** 0.5


def test_what_is_computed_again_draws_the_same():
    model = model_of("gpt2")
    for once, again in zip(results(model, 3, "none"), results(model, 3, "sac")):
        assert all(torch.equal(again[label], value) for label, value in once.items())


def test_gradient_checkpointing_draws_once():
    model = model_of("gpt2")
    plain = results(model, 2)
    model.gradient_checkpointing_enable()
    for once, again in zip(plain, results(model, 2)):
        assert all(torch.equal(again[label], value) for label, value in once.items())


@pytest.mark.parametrize("seed", [step_seed(3, 6), step_seed(4, 5)], ids=["step", "seed"])
def test_another_step_or_seed_gives_another_loss(seed):
    model = model_of("dropout")
    assert results(model, 2, seed=seed)[0]["loss"] != results(model, 2)[0]["loss"]


def test_an_artifact_that_draws_is_proved_and_runs_as_built(tmp_path):
    path = build(model_of("dropout"), BATCH, 3, target="cpu").save(tmp_path / "dropout.sp3")
    check(path)
    built, _ = compiled(model_of("dropout"), 3)
    manifest = read_manifest(path)
    assert [read_rank(path, manifest, rank) for rank in range(3)] == [built.program.for_rank(rank) for rank in range(3)]


def test_every_rank_draws_its_own_box_once_and_the_seed_lives_through_the_step():
    built, _ = compiled(model_of("dropout"), 3)
    drawn = [(instr.args[1], instr.args[3]) for instr in built.program.instrs() if instr.op == "autosp.uniform"]
    box = (1, 1, PerRank((0, 5, 9)), PerRank((5, 9, 13)))
    assert sorted(set(drawn)) == [(0, box), (1, box), (2, box)]
    assert not any(instr.op == "free" and "seed" in instr.refs() for instr in built.program.instrs())


@pytest.mark.parametrize("wrong", [{1: 3}, {3: (1, 1, 0, 5)}, {3: ()}], ids=["site", "box", "whole"])
def test_a_rank_that_draws_at_another_site_or_position_is_found(wrong):
    built, _ = compiled(model_of("dropout"), 3)
    change = lambda instr: [replace(instr, args=tuple(wrong.get(at, arg) for at, arg in enumerate(instr.args)))]  # noqa: E731
    with pytest.raises(ArtifactError, match=r"an argument of autosp\.uniform is wrong"):
        derive(edit(built.program, named("autosp.uniform"), change), built.whole)
