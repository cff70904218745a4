"""Costs of programs small enough to count by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autosp_aot.ir.text import parse_program
from autosp_aot.memory.costs import Moved, costs, moved

HEAD = """\
autosp program 1
ranks 2
layout cut4 = 0:2 2:4
parameter %w: f32[4, 4] @ Replicate
batch %x: f32[4, 4] @ Replicate
"""


def program(forward: str, backward: str = "", takes: str = ""):
    lines = lambda text: "".join(f"  {line.strip()}\n" for line in text.strip().splitlines())  # noqa: E731
    return parse_program(
        f"{HEAD}section forward takes ()\n{lines(forward)}gives ()\n"
        f"section backward takes ({takes})\n{lines(backward)}gives ()\nsection sum_gradients takes ()\ngives ()\n",
        {},
    )


def test_the_peak_is_reached_where_most_is_alive():
    found = costs(program("""
        %a: f32[4, 4] @ Replicate = aten.neg.default(%x)
        %b: f32[4, 4] @ Replicate = aten.neg.default(%a)
        free(%a)
        %c: f32[4] @ Replicate = aten.sum.dim_IntList(%b, [0])
        free(%b)
    """), "cpu")
    assert (found.peak_bytes, found.peak_at) == (64 + 64, "forward: b")


def test_inputs_are_not_counted_nor_are_views_of_them():
    found = costs(program("%v: f32[4, 4] @ Replicate = aten.permute.default(%w, [1, 0])\nfree(%v)"), "cpu")
    assert (found.peak_bytes, found.kept_bytes) == (0, 0)


def test_a_view_keeps_its_storage_alive_until_its_last_name_is_released():
    found = costs(program("""
        %a: f32[4, 4] @ Replicate = aten.neg.default(%x)
        %v: f32[2, 4] @ Replicate = aten.slice.Tensor(%a, 0, 0, 2)
        free(%a)
        %b: f32[4, 4] @ Replicate = aten.neg.default(%x)
        free(%v)
        %c: f32[4, 4] @ Replicate = aten.neg.default(%x)
    """), "cpu")
    assert found.peak_bytes == 2 * 64
    assert found.peak_at == "forward: b"


def test_a_reshape_that_copies_has_a_storage_of_its_own():
    found = costs(program("""
        %a: f32[4, 4] @ Replicate = aten.neg.default(%x)
        %t: f32[4, 4] @ Replicate = aten.permute.default(%a, [1, 0])
        %r: f32[16] @ Replicate = aten.reshape.default(%t, [16])
    """), "cpu")
    assert found.peak_bytes == 2 * 64


def test_kept_is_what_crosses_from_forward_to_backward_the_storage_of_a_view_whole():
    found = costs(program("""
        %a: f32[4, 4] @ Replicate = aten.neg.default(%x)
        %v: f32[1, 4] @ Replicate = aten.slice.Tensor(%a, 0, 0, 1)
        %h: bf16[4] @ Replicate = aten.sum.dim_IntList(%a, [0], dtype=dtype:bf16)
        free(%a)
    """, takes="%v, %h"), "cpu")  # fmt: skip
    assert found.kept_bytes == 64 + 8


def test_the_rank_with_the_largest_boxes_is_counted():
    found = costs(parse_program(
        "autosp program 1\nranks 2\nlayout cut5 = 0:3 3:5\nconstants $0\nbatch %x: f32[5] @ Replicate\n"
        "section step takes ()\n  %a: f32[$0] @ Shard(0, cut5) = shard(%x)\n"
        "  %b: f32[$0] @ Shard(0, cut5) = aten.neg.default(%a)\ngives ()\n", {"$0": (3, 2)},
    ), "cpu")  # fmt: skip
    assert found.peak_bytes == 12


def test_the_peak_is_that_of_the_rank_where_most_is_alive_at_once_not_of_the_one_with_most_in_all():
    found = costs(parse_program(
        "autosp program 1\nranks 2\nlayout left = 0:4 4:5\nlayout right = 0:1 1:6\nconstants $0 $1\n"
        "batch %x: f32[5] @ Replicate\nbatch %y: f32[6] @ Replicate\nsection step takes ()\n"
        "  %a: f32[$0] @ Shard(0, left) = shard(%x)\n  %b: f32[$0] @ Shard(0, left) = aten.neg.default(%a)\n"
        "  free(%a)\n  free(%b)\n  %c: f32[$0] @ Shard(0, left) = shard(%x)\n  free(%c)\n"
        "  %d: f32[$1] @ Shard(0, right) = shard(%y)\n  %e: f32[$1] @ Shard(0, right) = aten.neg.default(%d)\n"
        "gives ()\n", {"$0": (4, 1), "$1": (1, 5)},
    ), "cpu")  # fmt: skip
    assert (found.peak_bytes, found.peak_at) == (20, "step: e")


# --- FLOPs --------------------------------------------------------------------------------------------------------


EXPERTS = "%e: f32[1, 4, 4] @ Replicate = aten.reshape.default(%w, [1, 4, 4])\n"


@pytest.mark.parametrize("line, flops", [
    ("%a: f32[4, 4] @ Replicate = aten.mm.default(%x, %w)", 2 * 4 * 4 * 4),
    ("%a: f32[4, 4] @ Replicate = aten.addmm.default(%w, %x, %w)", 2 * 4 * 4 * 4),
    ("%b: f32[4] @ Replicate = aten.sum.dim_IntList(%x, [0])\n%a: f32[4] @ Replicate = aten.mv.default(%x, %b)", 32),
    (f"{EXPERTS}%a: f32[1, 4, 4] @ Replicate = aten.baddbmm.default(%e, %e, %e)", 2 * 4 * 4 * 4),
    (f"{EXPERTS}%a: f32[4, 4] @ Replicate = autosp.expert_mm(%x, %x, %e)", 2 * 4 * 4 * 4),
    ("%a: f32[2, 4, 4] @ Replicate = autosp.expert_mm_weight_grad(%x, %x, %w, 2)", 2 * 4 * 4 * 4),
    ("%a: f32[4, 4] @ Replicate = aten.mul.Tensor(%x, %w)", 0),
])  # fmt: skip
def test_the_flops_of_products(line, flops):
    assert costs(program(line), "cpu").flops == flops


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_those_of_convolutions_are_torch_s_own_count(transposed, groups):
    x, weight = torch.ones(2, 4, 9, requires_grad=True), torch.ones(4, 4 // groups, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        y = torch.ops.aten.convolution(x, weight, None, [2], [1], [1], transposed, [0], groups)
    forward = counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    shape = list(y.shape)
    backward = counted.get_total_flops() if groups == 1 else 2 * forward  # torch multiplies that of a weight by groups
    given = f"None, [2], [1], [1], {transposed}, [0], {groups}"
    text = f"""
        %i: f32[2, 4, 9] @ Replicate = aten.full.default([2, 4, 9], 1.0)
        %k: f32[4, {4 // groups}, 3] @ Replicate = aten.full.default([4, {4 // groups}, 3], 1.0)
        %y: f32{shape} @ Replicate = aten.convolution.default(%i, %k, {given})
    """
    assert costs(program(text), "cpu").flops == forward
    made = f"%gi: f32[2, 4, 9] @ Replicate; %gk: f32[4, {4 // groups}, 3] @ Replicate; _"
    call = f"aten.convolution_backward.default(%y, %i, %k, {given}, [True, True, False])"
    assert costs(program(f"{text}{made} = {call}"), "cpu").flops == forward + backward


QKV = """
    %q: f32[1, 2, 8, 4] @ Replicate = aten.full.default([1, 2, 8, 4], 1.0)
    %k: f32[1, 1, 8, 4] @ Replicate = aten.full.default([1, 1, 8, 4], 1.0)
"""
PAIRS = 2 * 8 * 8  # heads x queries x keys


@pytest.mark.parametrize("causal, share", [(False, 1), (True, 2)])
def test_the_flops_of_attention_are_two_products_half_of_them_when_causal(causal, share):
    out = "%o: f32[1, 2, 8, 4] @ Replicate; _"
    call = f"autosp.attention(%q, %k, %k, [], None, 2, 0, scale=0.5, causal={causal})"
    assert costs(program(f"{QKV}{out} = {call}"), "cpu").flops == 2 * (2 * PAIRS * 4) // share


def test_attention_backward_does_five_products():
    outs = "%o: f32[1, 2, 8, 4] @ Replicate; %l: f32[1, 2, 8] @ Replicate"
    order = "%d: f32[1, 2, 8, 4] @ Replicate = relayout(%q, [0, 2, 1, 3])\n"
    forward = f"{QKV}{order}{outs} = autosp.attention(%q, %k, %k, [], None, 2, 0, scale=0.5)"
    grads = "%g: f32[1, 2, 8, 4] @ Replicate; _; _"
    backward = f"{grads} = autosp.attention_backward(%d, %q, %k, %k, %o, %l, None, [], None, 2, 0, scale=0.5)"
    both, one = (costs(program(text), "cpu").flops for text in (f"{forward}\n{backward}", forward))
    assert both - one == 5 * (2 * PAIRS * 4)


def test_what_is_computed_again_is_counted_apart_and_in_the_sum():
    line = "%{}: f32[4, 4] @ Replicate = aten.mm.default(%x, %w)"
    found = costs(program(line.format("a"), line.format("recompute.a")), "cpu")
    assert (found.flops, found.recomputed_flops) == (256, 128)


# --- moved bytes --------------------------------------------------------------------------------------------------

SHARD = "%s: f32[2, 4] @ Shard(0, cut4) = shard(%x)"
SUMMAND = f"{SHARD}\n%p: f32[4, 4] @ Partial = aten.mm.default(%s, %s)"


@pytest.mark.parametrize("made, line, received_bytes", [
    (SHARD, "%m: f32[4, 2] @ Shard(1, cut4) = all_to_all(%s)", 4 * 4),  # the other's 2 rows, 2 columns of them
    (SHARD, "%m: f32[4, 4] @ Replicate = all_gather(%s)", 8 * 4),  # the other's 2 rows
    (SUMMAND, "%m: f32[2, 4] @ Shard(0, cut4) = reduce_scatter(%p)", 8 * 4),  # the other's summand of 2 rows
    (SUMMAND, "%m: f32[4, 4] @ Replicate = all_reduce(%p)", 16 * 4),  # as a ring: 2 (P - 1) / P of 16 elements
])  # fmt: skip
def test_bytes_that_each_collective_moves(made, line, received_bytes):
    op = line.partition(" = ")[2].partition("(")[0]
    assert moved(program(f"{made}\n{line}")) == [Moved("forward", op, 1, received_bytes)]


def test_collectives_of_a_kind_are_added_up_in_each_section():
    line = "%{}: f32[4, 2] @ Shard(1, cut4) = all_to_all(%s)"
    found = moved(program(f"{SHARD}\n{line.format('m')}\n{line.format('n')}", line.format("o"), takes="%s"))
    assert found == [Moved("forward", "all_to_all", 2, 32), Moved("backward", "all_to_all", 1, 16)]


def test_a_bucket_is_one_collective_with_the_bytes_of_all_it_sums():
    line = "%m: f32[4, 4] @ Replicate; %n: f32[4, 4] @ Replicate = all_reduce(%p, %p)"
    assert moved(program(f"{SUMMAND}\n{line}")) == [Moved("forward", "all_reduce", 1, 128)]
