"""What travels, at 65,536 positions: read off the programs of all ranks of decoder models; nothing is run.

Each rank may receive its heads of q, its key/value heads (one that serves heads of several ranks goes to each of them),
and its positions of the output: with n query and m key/value heads of width D on the worst rank, s its positions,

    (n + 2 m) D (S - s) + (N - n) D s         elements a layer in forward
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod

import pytest
import torch
import transformers as hf
from torch import nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.export.canonical.canonical import canonical_program
from autosp_aot.export.fake import weightless
from autosp_aot.export.joint import capture
from autosp_aot.export.subject import Subject
from autosp_aot.ir.placement import disjoint
from autosp_aot.ir.program import ITEMSIZE, TILE, Instr, Program, Value
from autosp_aot.ir.structure.table import STRUCTURE, meets
from autosp_aot.passes.pipeline import compile_program
from autosp_aot.proof.collectives import collectives_of

LENGTH, HEADS, KV_HEADS, WIDTH, EXPERTS = 65536, 16, 4, 64, 8
SMALL = dict(vocab_size=32000, hidden_size=HEADS * WIDTH, num_hidden_layers=1, use_cache=False, bos_token_id=1,
             eos_token_id=2, pad_token_id=0)  # fmt: skip
GROUPED = SMALL | dict(intermediate_size=2816, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=WIDTH,
                       max_position_embeddings=LENGTH)  # fmt: skip
GPT2 = dict(vocab_size=32000, n_embd=HEADS * WIDTH, n_layer=1, n_head=HEADS, n_positions=LENGTH, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=1, eos_token_id=2)  # fmt: skip
LAYERS = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=4096)
ROUTED = dict(num_experts_per_tok=2, output_router_logits=True)
MAMBA2 = dict(num_heads=32, head_dim=64, expand=2, state_size=128, n_groups=1, chunk_size=256)


@dataclass(frozen=True)
class Decoder:
    """How to make a model, its attention layers, and the key/value heads of each."""

    model: type
    config: type
    options: dict
    layers: int = 1
    kv_heads: int = KV_HEADS

    def build(self) -> nn.Module:
        with weightless():
            return self.model(self.config(**self.options)).bfloat16().train()


DECODERS = {
    "gemma3_text": Decoder(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, GROUPED | LAYERS, 2),
    "gpt2": Decoder(hf.GPT2LMHeadModel, hf.GPT2Config, GPT2, kv_heads=HEADS),
    "llama": Decoder(hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
    "mamba2": Decoder(hf.Mamba2ForCausalLM, hf.Mamba2Config, SMALL | MAMBA2, 0),
    "mistral": Decoder(hf.MistralForCausalLM, hf.MistralConfig, GROUPED | {"sliding_window": 4096}),
    "mixtral": Decoder(hf.MixtralForCausalLM, hf.MixtralConfig, GROUPED | ROUTED | {"num_local_experts": EXPERTS}),
    "phi": Decoder(hf.PhiForCausalLM, hf.PhiConfig, GROUPED),
    "qwen3_moe": Decoder(
        hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig,
        GROUPED | ROUTED | {"num_experts": EXPERTS, "moe_intermediate_size": 768},
    ),
}  # fmt: skip
ATTENDING = sorted(name for name, decoder in DECODERS.items() if decoder.layers)
MIXTURES = ("mixtral", "qwen3_moe")


@cache
def whole(name: str) -> Program:
    batch = {key: torch.zeros(1, LENGTH, dtype=torch.long) for key in ("input_ids", "labels")}
    return canonical_program(capture(Subject(DECODERS[name].build(), batch, "cpu")))[0]


@cache
def program(name: str, ranks: int) -> Program:
    compiled = compile_program(whole(name), {"input_ids": 1, "labels": 1}, BuildConfig(ranks))
    assert not compiled.fallbacks
    return compiled.program


def moves(found: Program, *ops: str) -> Iterator[tuple[str, Instr, Value, Value]]:
    """(section, move, what it takes, what it makes) before gradients are summed."""
    values = found.values()
    for section in found.sections:
        for instr in section.instrs if section.name != "sum_gradients" else ():
            if instr.op in ops:
                yield from ((section.name, instr, values[a], b) for a, b in zip(instr.refs(), instr.values()))


def received_bytes(found: Program) -> int:
    """Bytes that the worst rank gets from others in forward, sums that all get (they are small) not counted."""
    by_rank = [
        sum(
            (sum(collective.receive_sizes) - collective.receive_sizes[rank]) * ITEMSIZE[collective.dtype]
            for collective in collectives_of(found.for_rank(rank), rank)
            if collective.section == "forward" and collective.op != "all_reduce"
        )
        for rank in range(found.ranks)
    ]
    return max(by_rank)


def exchanged(heads: int, kv_heads: float, others: int, ranks: int) -> int:
    """Elements the worst rank receives, a unit of width: its heads at all positions, and its positions of all heads.

    Ranks have equal shares of `heads` and of the `others` that come home, and `kv_heads` each.
    """
    here = LENGTH // ranks
    return int((heads / ranks + kv_heads) * (LENGTH - here) + (others - others / ranks) * here)


@pytest.mark.parametrize("name", sorted(DECODERS))
@pytest.mark.parametrize("ranks", [3, 8])
def test_nothing_that_has_an_element_for_every_token_is_whole_on_every_rank(name, ranks):
    found = moves(program(name, ranks), "all_gather", "all_reduce")
    assert [made.name for _, _, _, made in found if prod(made.whole_shape) >= LENGTH] == []


@pytest.mark.parametrize("name", ATTENDING)
@pytest.mark.parametrize("ranks", [3, 8])
def test_keys_and_values_go_only_to_ranks_that_attend_with_them(name, ranks):
    found, group = program(name, ranks), HEADS // DECODERS[name].kv_heads
    values, calls = found.values(), [i for i in found.instrs() if i.op == "autosp.attention"]
    assert len(calls) == DECODERS[name].layers
    for call in calls:
        q, *shared = (values[name].placement.cut for name in call.refs()[:3])
        wanted = tuple((lo // group, -(-hi // group)) for lo, hi in q.bounds)
        assert q.dim == 1 and disjoint(q.bounds)
        assert [(cut.dim, cut.bounds) for cut in shared] == [(1, wanted)] * 2


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_copies_are_key_value_heads_and_the_places_that_a_convolution_reads(name):
    found = program(name, 8)
    for _, move, _, made in moves(found, "all_to_all", "reduce_scatter"):
        if made.placement.cut is None or disjoint(made.placement.cut.bounds):
            continue
        parts = {made.name, TILE + made.name}  # tiles read it in slices
        readers = {instr.op for instr in found.instrs() if not parts.isdisjoint(instr.refs())}
        readers -= {"free", "shard", "tiles"}
        assert readers <= {"autosp.attention", "autosp.attention_backward", "aten.convolution.default",
                           "aten.convolution_backward.default"}, move  # fmt: skip


@pytest.mark.parametrize("name", ATTENDING)
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_the_worst_rank_receives_its_heads_and_positions_and_no_more(name, ranks):
    decoder = DECODERS[name]
    elements = exchanged(HEADS, 2 * max(decoder.kv_heads / ranks, 1), HEADS, ranks) * WIDTH * decoder.layers
    assert received_bytes(program(name, ranks)) == elements * ITEMSIZE["bf16"]


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_a_state_space_receives_less_than_an_exchange_of_its_heads_would(ranks):
    heads, width, state = MAMBA2["num_heads"], MAMBA2["head_dim"], MAMBA2["state_size"]
    elements = exchanged(heads * width + heads, 2 * state, heads * width, ranks)
    assert received_bytes(program("mamba2", ranks)) <= elements * ITEMSIZE["bf16"]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_moves_nothing_but_heads_and_counts_of_experts(name):
    for section, move, taken, made in moves(program(name, 8), *filter(meets, STRUCTURE)):
        assert "self_attn" in made.name or prod(taken.whole_shape) <= EXPERTS, (section, move)
