"""Ranks of a kind take the same memory, and there are no more kinds than need be."""

import pytest
import torch

from autosp_aot.ir.text import parse_program
from autosp_aot.memory.costs import curve
from autosp_aot.memory.rank_classes import unlike_ranks
from examples import llama
from tests.architectures import ARCHITECTURES
from tests.steps import built, half_labelled

UNEVEN = "autosp program 1\nranks 4\nlayout cut = 0:4 4:7 7:10 10:13\nlayout halo = 0:5 3:8 6:11 9:13\n" \
    "constants $0 $1\nbatch %x: f32[13] @ Replicate\nsection step takes ()\n" \
    "  %a: f32[$0] @ Shard(0, cut) = shard(%x)\n"  # fmt: skip
CONSTANTS = {"$0": (4, 3, 3, 3), "$1": (5, 5, 5, 4)}


def test_even_ranks_are_alike():
    even = "autosp program 1\nranks 4\nlayout rows = 0:2 2:4 4:6 6:8\nlayout columns = 0:1 1:2 2:3 3:4\n" \
        "batch %x: f32[8, 4] @ Replicate\nsection step takes ()\n  %a: f32[2, 4] @ Shard(0, rows) = shard(%x)\n" \
        "  %b: f32[8, 1] @ Shard(1, columns) = all_to_all(%a)\ngives ()\n"  # fmt: skip
    assert unlike_ranks(parse_program(even, {})) == [0]


def test_ranks_differ_by_the_shapes_of_their_boxes():
    assert unlike_ranks(parse_program(UNEVEN + "gives ()\n", CONSTANTS)) == [0, 1]


def test_ranks_differ_by_what_they_send_and_receive():
    program = parse_program(UNEVEN + "  %b: f32[$1] @ Shard(0, halo) = all_to_all(%a)\ngives ()\n", CONSTANTS)
    assert unlike_ranks(program) == [0, 1, 3]


def test_ranks_differ_by_where_their_heads_begin_in_a_group():
    head = "autosp program 1\nranks 2\nlayout heads = 0:3 3:6\nlayout keys = 0:2 1:3\nconstants $0\n" \
        "batch %q: f32[1, 6, 4, 2] @ Replicate\nbatch %k: f32[1, 3, 4, 2] @ Replicate\nsection step takes ()\n" \
        "  %q.mine: f32[1, 3, 4, 2] @ Shard(1, heads) = shard(%q)\n" \
        "  %k.mine: f32[1, 2, 4, 2] @ Shard(1, keys) = shard(%k)\n" \
        "  %o: f32[1, 3, 4, 2] @ Shard(1, heads); %l: f32[1, 3, 4] @ Shard(1, heads) = " \
        "autosp.attention(%q.mine, %k.mine, %k.mine, [], None, 2, $0, scale=0.5)\ngives ()\n"  # fmt: skip
    assert unlike_ranks(parse_program(head, {"$0": (0, 3)})) == [0, 1]


@pytest.mark.parametrize("name, ranks, length, tile", [
    ("mamba2", 4, 13, 3), ("mamba2", 5, 33, "off"), ("llama", 4, 13, "off"), ("llama", 5, 7, 3),
])  # fmt: skip
def test_every_rank_has_the_curve_of_one_of_the_unlike(name, ranks, length, tile):
    torch.manual_seed(0)
    sizes = dict(hidden_size=36, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3, head_dim=4)
    model = llama.build_model(vocab_size=64, **sizes) if name == "llama" else ARCHITECTURES[name].build()
    program = built(model, half_labelled(length), ranks, tile=tile)[0].program
    curves = [curve(program, rank, "cpu") for rank in range(ranks)]
    assert all(any(mine == curves[rank] for rank in unlike_ranks(program)) for mine in curves)
