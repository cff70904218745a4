"""Wrong rewrites, planted one at a time: what the proof finds without numbers, and numbers without the proof."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import compile_model
from autosp_aot.commands.check.numeric import difference
from autosp_aot.commands.check.random_inputs import made_up
from autosp_aot.errors import ArtifactError
from autosp_aot.ir.program import PerRank
from autosp_aot.ir.verify import verify
from autosp_aot.runtime.prove import prove
from examples import llama, plain
from tests import mutants as m
from tests.edits import named


class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, input_ids, labels):
        x = nn.functional.dropout(self.embedding(input_ids), 0.5)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Masked(nn.Module):
    """Packed documents, then a window with dropout; four heads over three ranks."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)

    def forward(self, input_ids, labels):
        x, at = self.embedding(input_ids), torch.arange(input_ids.shape[1])
        document, distance = (input_ids < 12).cumsum(1), at[:, None] - at
        same = (document[:, :, None] == document[:, None])[:, None]
        x = x + self.attend(x, same & (distance >= 0), 0.0)
        x = x + self.attend(x, (distance >= 0) & (distance < 4), 0.3)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    def attend(self, x, mask, dropout):
        heads = x.unflatten(2, (4, 8)).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(heads, heads * 2, heads, mask, dropout)
        return out.transpose(1, 2).flatten(2)


DIMS = {"input_ids": 1, "labels": 1}
LLAMA = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip
PLAIN = dict(vocab_size=64, hidden_size=48, layers=1, kv_heads=2, max_length=16)
MODELS = {
    "llama": lambda: llama.build_model("float64", **LLAMA),  # rank 0 has two heads of four; a key/value head has copies
    "plain": lambda: plain.build_model(**PLAIN, heads=6, dtype="float64"),  # rank 1 has heads of both groups
    "dropout": lambda: Dropout().double(),
    "masked": lambda: Masked().double(),
    "stowed": lambda: llama.build_model("float64", **LLAMA),  # in tiles, backward begun early, kept values on the host
    "rows": lambda: plain.build_model(**PLAIN, heads=2, dtype="float64"),  # fewer heads than ranks
}
L = "model.layers.0"
LOSS = "div.all_reduce"
ATTENTION, ROWS = named("autosp.attention"), named("autosp.attention_rows")
AS_IT_IS = (m.released_too_early, m.written_too_early)  # not released anew
FIRST_TWO_LAST = m.bounds(lambda b: (b[0], b[2], b[1]))
ILLEGAL, MEETING, WRONG = "program-illegal", "collective-mismatch", "placement-wrong"


@dataclass(frozen=True)
class Mutant:
    """`proof` is the code that `check` refuses it with; `numbers`: they differ, or (`runs` False) it cannot run."""

    what: str
    model: str
    plant: m.Plant
    proof: str
    runs: bool = True
    ranks: tuple[int, ...] = (0, 1, 2)


MUTANTS = [
    # reductions
    Mutant("missing sum of the loss", "llama", m.without(LOSS), WRONG),
    Mutant("doubled sum of the loss", "llama", m.twice(m.made(LOSS)), WRONG),
    Mutant("gradients summed twice", "llama", m.twice(m.made("grad.add.12.all_reduce")), WRONG),
    Mutant("one gradient not summed", "plain", m.left_out_of_the_sum, WRONG),
    Mutant("gradient of a key/value copy not summed", "llama", m.copies_not_summed, WRONG),
    Mutant("mean over a rank's own tokens", "llama", m.argument(m.made("nll_loss_forward_0"), 3, lambda _: 1), WRONG),
    Mutant("tied weight's gradient counted once", "llama",
           m.call("grad.add.12", "aten.mul.Scalar", "%grad.lm_head.mm", 1), WRONG),
    # moves
    Mutant("swapped dims of an all_to_all", "llama", m.to(f"{L}.self_attn.add.all_to_all", m.swapped_dims), WRONG,
           runs=False),
    Mutant("wrong bounds", "llama", m.to("reshape.1.shard", FIRST_TWO_LAST), WRONG),
    Mutant("wrong slice of a table", "llama", m.to("model.rotary_emb.reshape.shard", FIRST_TWO_LAST), WRONG),
    Mutant("wrong sizes for a peer", "llama",
           m.to(f"{L}.self_attn.add.all_to_all", m.bounds(lambda _: ((0, 1), (1, 2), (2, 4)))), MEETING, runs=False,
           ranks=(1,)),
    Mutant("a collective dropped on one rank", "llama", m.without(LOSS), MEETING, runs=False, ranks=(1,)),
    Mutant("a collective of another kind on one rank", "llama", m.to(LOSS, lambda p: p, "all_gather"), MEETING,
           runs=False, ranks=(1,)),
    Mutant("collectives reordered on one rank", "llama",
           m.reordered(f"{L}.self_attn.add.1.all_to_all", f"{L}.self_attn.permute.2.all_to_all"), MEETING, ranks=(1,)),
    # positions, masks, labels
    Mutant("position offset of 0 on every rank", "plain",
           m.call("arange.shard", "aten.slice.Tensor", "%arange", 0, 0, PerRank((5, 4, 4)), 1), WRONG),
    Mutant("positions from 1", "plain",
           lambda program: m.argument(m.made("arange"), 0, lambda _: 1)(m.argument(m.made("arange"), 1, lambda _: 14)(
               program)), WRONG),
    Mutant("label shift skipped", "llama",
           lambda program: m.argument(m.made("slice"), 2, lambda _: 0)(m.argument(m.made("slice"), 3, lambda _: 13)(
               program)), WRONG),
    Mutant("another ignore_index", "plain", m.argument(m.made("nll_loss_forward_0"), 4, lambda _: -1), WRONG,
           runs=False),
    Mutant("mask from local rows", "rows", m.argument(ROWS, 7, lambda start: 0), WRONG),
    Mutant("one rank's rows begin one later", "rows", m.argument(ROWS, 7, m.on_rank(1, 1)), WRONG),
    Mutant("every rank draws the same", "dropout",
           m.argument(named("autosp.uniform"), -1, lambda box: (*box[:2], 0, PerRank((5, 4, 4)))), WRONG),
    Mutant("one rank draws other numbers", "dropout", m.argument(named("autosp.uniform"), 1, lambda site: site + 1),
           WRONG, ranks=(1,)),
    Mutant("causal mask dropped", "llama", m.option(ATTENTION, "causal", lambda _: False), WRONG),
    Mutant("window one longer", "masked",
           m.option(m.made("attention_0.1"), "window", lambda window: window + 1), WRONG),
    Mutant("documents see each other", "masked", m.option(ATTENTION, "score", lambda _: None), WRONG),
    Mutant("other documents", "masked",
           m.option(ATTENTION, "score", lambda score: (*score[:1], ("aten.ge.Tensor", "v0", "v1"), *score[2:])), WRONG),
    Mutant("other weights dropped in backward", "masked",
           m.option(named("autosp.attention_backward"), "site", lambda site: site + 1), WRONG),
    # attention
    Mutant("scale applied twice", "llama", m.option(ATTENTION, "scale", lambda scale: scale**2), WRONG),
    Mutant("first head off by one on one rank", "plain", m.argument(ATTENTION, 6, m.on_rank(1, 1)), WRONG),
    Mutant("another size of a group of heads", "plain", m.argument(ATTENTION, 5, lambda _: 2), WRONG),
    Mutant("key and value swapped", "llama",
           m.operand(f"{L}.self_attn.attention_0", 1, f"{L}.self_attn.permute.2.all_to_all"), WRONG),
    Mutant("backward of another output", "llama",
           m.operand(f"grad.{L}.self_attn.attention_backward_0", 4, f"{L}.self_attn.add.all_to_all"), WRONG),
    # calls
    Mutant("operands swapped", "llama", m.operands_swapped("div"), WRONG),
    Mutant("matrices swapped", "llama", m.operands_swapped(f"grad.{L}.self_attn.o_proj.mm"), WRONG, runs=False),
    Mutant("residual dropped", "llama",
           m.call(f"{L}.add.1", "aten.add.Tensor", f"%{L}.mlp.down_proj.reshape.1", 0), WRONG),
    Mutant("dtype narrowed", "llama", m.narrowed(f"{L}.input_layernorm.to_copy", "bf16"), WRONG),
    Mutant("another eps", "llama", m.argument(m.made("model.norm.add"), 1, lambda eps: 10 * eps), WRONG),
    Mutant("loss scale left out", "plain",
           m.call("grad.nll_loss_backward", "aten.nll_loss_backward.default", "%sum", "%log_softmax",
                  "%reshape.1.shard", None, 2, -100, "%sum"), WRONG),
    Mutant("recomputed from another weight", "llama",
           m.operand(f"recompute.{L}.input_layernorm.mul.1", 0, "model.norm.weight"), WRONG),
    Mutant("another operator", "llama",
           m.call(f"{L}.mlp.act_fn.silu", "aten.sigmoid.default", f"%{L}.mlp.gate_proj.reshape.1"), WRONG),
    Mutant("released too early", "llama", m.released_too_early, ILLEGAL, runs=False),
    Mutant("written into what is read once more", "llama", m.written_too_early, ILLEGAL),
    Mutant("rescaled the other way", "stowed", m.call("grad.lm_head.mm", "autosp.rescale", "%early.grad.lm_head.mm",
           "%early.grad_loss", "%grad_loss"), WRONG),
    Mutant("not rescaled", "stowed", m.without("grad.lm_head.mm"), WRONG),
    Mutant("what is fetched is another value", "stowed", m.operand(f"{L}.self_attn.add.1.all_to_all.fetch", 0,
           f"{L}.self_attn.permute.2.all_to_all.host"), ILLEGAL),
    Mutant("stored where another value waits", "stowed",
           m.argument(m.made(f"{L}.self_attn.attention_1.offload"), 1, lambda at: 0), ILLEGAL),
    Mutant("results of tiles in each other's place", "stowed", m.in_tiles(f"early.grad.{L}.mlp.up_proj.mm",
           m.results_swapped(f"tile.early.grad.{L}.mlp.up_proj.mm", f"tile.early.grad.{L}.mlp.gate_proj.mm")), WRONG),
    Mutant("a tile with another weight", "stowed", m.in_tiles("early.grad.lm_head.mm",
           m.reads(f"tile.early.grad.{L}.post_attention_layernorm.mul", 1, "model.norm.weight")), WRONG),
]  # fmt: skip


@pytest.fixture(scope="module")
def built():
    """Artifacts and inputs, by the name of the model."""
    torch.manual_seed(0)
    batch = llama.example_batch(2, 13)
    configs = {"stowed": BuildConfig(3, tile=3, offload="host")}
    config = lambda name: configs.get(name, BuildConfig(3))  # noqa: E731
    artifacts = {name: compile_model(make(), batch, DIMS, config(name), "") for name, make in MODELS.items()}
    return {name: (artifact, made_up(artifact.whole) | artifact.buffers) for name, artifact in artifacts.items()}


def bodies(mutant, program):
    """The mutated program on its ranks, the right one on the others."""
    wrong = mutant.plant(program) if mutant.plant in AS_IT_IS else m.planted(program, mutant.plant)
    others = tuple(rank for rank in range(3) if rank not in mutant.ranks)
    return [(mutant.ranks, wrong), *([(others, program)] if others else [])]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_the_proof_refuses_it(mutant, built):
    artifact, _ = built[mutant.model]
    with pytest.raises(ArtifactError) as caught:
        for _, program in bodies(mutant, artifact.program):
            verify(program)
        prove(artifact.whole, bodies(mutant, artifact.program))
    assert [problem.code for problem in caught.value.problems] == [mutant.proof]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_numbers_show_it_without_the_proof(mutant, built):
    artifact, inputs = built[mutant.model]
    by_rank = {rank: program.for_rank(rank) for ranks, program in bodies(mutant, artifact.program) for rank in ranks}
    programs = [by_rank[rank] for rank in range(3)]
    if mutant.runs:
        assert difference(artifact.whole, programs, inputs).beyond
        return
    with pytest.raises((AssertionError, LookupError, RuntimeError, ArtifactError)):
        difference(artifact.whole, programs, inputs)


@pytest.mark.parametrize("model", MODELS)
def test_without_a_mutant_both_accept(model, built):
    artifact, inputs = built[model]
    prove(artifact.whole, [((0, 1, 2), artifact.program)])
    programs = [artifact.program.for_rank(rank) for rank in range(3)]
    assert not difference(artifact.whole, programs, inputs).beyond


def test_there_are_enough_kinds():
    assert len({mutant.what for mutant in MUTANTS}) == len(MUTANTS) >= 20
