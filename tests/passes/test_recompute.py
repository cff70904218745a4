"""Recomputation: the same bits with less kept; attention and collectives run once."""

from collections import Counter

import torch

from autosp_aot.builder import compile_model, model_values
from autosp_aot.config import BuildConfig
from autosp_aot.runtime.simulate import simulate
from examples import llama


def built(model, recompute: str):
    dims = {"input_ids": 1, "labels": 1}
    return compile_model(model, llama.example_batch(2, 33), dims, BuildConfig(3, recompute=recompute), "")


def small():
    torch.manual_seed(0)
    return llama.build_model(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=4, head_dim=8, intermediate_size=64
    )


def test_sac_gives_the_bits_of_none():
    model = small()
    ids = torch.randint(256, (2, 33))
    inputs = model_values(model) | dict(model.named_buffers()) | {"input_ids": ids, "labels": ids}
    results = [
        simulate([built(model, policy).program.for_rank(rank) for rank in range(3)], inputs, torch.ones(()))
        for policy in ("sac", "none")
    ]
    for sac, none in zip(*results):
        assert set(sac) == set(none) and all(torch.equal(sac[name], none[name]) for name in none)


def test_sac_keeps_less_and_runs_attention_and_collectives_once():
    sac, none = (built(small(), policy) for policy in ("sac", "none"))
    assert sac.manifest.costs["kept_bytes"] < none.manifest.costs["kept_bytes"] / 2
    assert 0 < sac.manifest.costs["recomputed_flops"] and none.manifest.costs["recomputed_flops"] == 0
    costly = ("autosp.attention", "all_to_all", "reduce_scatter", "all_reduce", "all_gather")
    counts = [Counter(i.op for i in a.program.instrs() if i.op in costly) for a in (sac, none)]
    assert counts[0] == counts[1] and counts[0]["autosp.attention"] == 3


def test_one_layer_is_computed_again_at_a_time():
    """At no time are recomputed values of two layers' MLPs alive together."""
    alive: set[str] = set()
    for instr in built(small(), "sac").program.section("backward").instrs:
        if instr.op == "free":
            alive -= set(instr.refs())
        alive |= {out.name for out in instr.values() if out.name.startswith("recompute.")}
        layers = {name.split("layers.")[1].split(".")[0] for name in alive if "mlp" in name}
        assert len(layers) <= 1
