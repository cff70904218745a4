"""Offload: the same bits with less kept on the device; copies begin, end and overlap where the text says."""

from functools import partial

import pytest
import torch
from torch import nn

from autosp_aot.errors import BuildError
from autosp_aot.ir.text import parse_program, print_program
from autosp_aot.ir.units import bytes_text
from autosp_aot.ir.verify import verify
from autosp_aot.memory.costs import costs, curve
from autosp_aot.passes import offload as offload_pass
from autosp_aot.passes.offload import IN_FLIGHT, stowed, worth_it
from autosp_aot.passes.release import release
from autosp_aot.proof.derive import derive
from examples import llama, plain
from tests.memory.test_memory import answers, compare
from tests.mutants import planted
from tests.steps import built, half_labelled, sharded

HEAD = """\
autosp program 1
ranks 2
layout cut4 = 0:2 2:4
parameter %w: f32[4, 4] @ Replicate
batch %x: f32[4, 4] @ Replicate
"""


def program(forward: str, backward: str, takes: str, gives: str = ""):
    return parse_program(
        f"{HEAD}section forward takes ()\n{lines(forward)}gives ()\n"
        f"section backward takes ({takes})\n{lines(backward)}gives ({gives})\n"
        "section sum_gradients takes ()\ngives ()\n",
        {},
    )


def lines(text: str) -> str:
    return "".join(f"  {line.strip()}\n" for line in text.strip().splitlines())


def section(found, name: str) -> str:
    """The instructions of a section as text."""
    text = print_program(found)[0].partition(f"section {name} takes ")[2]
    return text.partition("\n")[2].partition("gives (")[0]


def product(out: str, a: str) -> str:
    return f"%{out}: f32[4, 4] @ Replicate = aten.mm.default(%{a}, %w)"


@pytest.fixture
def fast_link(monkeypatch):
    """A value of [4, 4] is copied in the time of a product."""
    monkeypatch.setattr(offload_pass, "FLOPS_A_BYTE", 2)


FORWARD = f"""
    {product("a", "x")}
    {product("b", "a")}
    {product("c", "b")}
    {product("d", "c")}
"""
BACKWARD = f"""
    {product("e", "x")}
    {product("f", "e")}
    {product("g", "a")}
"""


def test_a_copy_begins_after_the_last_use_and_takes_as_long_as_the_work_beside_it(fast_link):
    found = stowed(program(FORWARD, BACKWARD, "%a"), ["a"], "cpu")
    assert section(found, "forward") == lines(f"""
        {product("a", "x")}
        {product("b", "a")}
        %a.offload: f32[4, 4] @ Replicate = offload(%a, 0)
        {product("c", "b")}
        %a.host: f32[4, 4] @ Replicate = wait(%a.offload, %a)
        {product("d", "c")}
    """)
    assert section(found, "backward") == lines(f"""
        {product("e", "x")}
        %a.fetch: f32[4, 4] @ Replicate = fetch(%a.host)
        {product("f", "e")}
        %a.back: f32[4, 4] @ Replicate = wait(%a.fetch, %a.host)
        {product("g", "a.back")}
    """)
    assert found.section("backward").takes == ("a.host",)


def test_the_device_s_memory_counts_until_the_wait_and_from_the_fetch(fast_link):
    kept, gone = (release(stowed(program(FORWARD, BACKWARD, "%a"), names, "cpu")) for names in ([], ["a"]))
    stays, goes = costs(kept, "cpu"), costs(gone, "cpu")
    assert (stays.kept_bytes, stays.host_bytes) == (64, 0)
    assert (goes.kept_bytes, goes.host_bytes, goes.host_moved_bytes) == (0, 64, 128)
    alive = [(moment.name, moment.alive_bytes // 64) for moment in curve(gone, 0, "cpu")]
    assert alive[2:7] == [("a.offload", 2), ("c", 3), ("free", 2), ("a.host", 2), ("free", 1)]
    assert alive[9:15] == [("e", 1), ("a.fetch", 2), ("f", 3), ("free", 1), ("a.back", 1), ("free", 1)]


def test_a_view_that_backward_reads_is_made_again_of_what_came_back():
    forward = f"{product('a', 'x')}\n%t: f32[4, 4] @ Replicate = aten.permute.default(%a, [1, 0])\n{product('b', 't')}"
    found = stowed(program(forward, f"{product('c', 't')}\n{product('d', 'a')}", "%a, %t"), ["t"], "cpu")
    assert section(found, "backward") == lines(f"""
        %a.fetch: f32[4, 4] @ Replicate = fetch(%a.host)
        %a.back: f32[4, 4] @ Replicate = wait(%a.fetch, %a.host)
        %recompute.t: f32[4, 4] @ Replicate = aten.permute.default(%a.back, [1, 0])
        {product("c", "recompute.t")}
        {product("d", "a.back")}
    """)


def test_what_lies_in_an_input_or_is_given_to_the_caller_stays():
    forward = f"{product('a', 'x')}\n%t: f32[4, 4] @ Replicate = aten.permute.default(%w, [1, 0])"
    before = program(forward, product("c", "t"), "%a, %t", "grad.w=%a")
    assert stowed(before, ["a", "t"], "cpu") == before


def test_at_most_so_many_copies_are_under_way_however_slow_the_link_is():
    names = [f"v{at}" for at in range(IN_FLIGHT + 2)]
    forward = "\n".join(product(name, "x") for name in names)
    backward = "\n".join(product(f"{name}.g", name) for name in names)
    found = stowed(program(forward, backward, ", ".join("%" + name for name in names)), names, "cpu")
    for name in ("forward", "backward"):
        under_way, most = 0, 0
        for instr in found.section(name).instrs:
            under_way += {"offload": 1, "fetch": 1, "wait": -1}.get(instr.op, 0)
            most = max(most, under_way)
        assert (under_way, most) == (0, IN_FLIGHT)


def test_small_values_and_those_read_again_soon_are_not_worth_it():
    small = "%s: b8[] @ Replicate = aten.any.default(%x)"
    forward = "\n".join([small, product("a0", "x"), *(product(f"a{n}", f"a{n - 1}") for n in range(1, 20))])
    reads_it = "%n: b8[] @ Replicate = aten.bitwise_not.default(%s)"
    backward = "\n".join([product("b", "a19"), product("c", "a0"), reads_it])
    assert worth_it(program(forward, backward, "%a0, %a19, %s"), "cpu") == ["a0"]


# --- models -------------------------------------------------------------------------------------------------------

MODELS = {
    "llama": lambda: llama.build_model(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=64,
    ),
    "plain": lambda: plain.build_model(64, 32, 2, 4, 2, 16, tied=False, dtype="float32"),
}  # fmt: skip


@pytest.mark.parametrize("name, ranks, recompute, tile", [
    ("llama", 1, "none", "auto"), ("llama", 2, "sac", 3), ("llama", 3, "none", 2), ("plain", 3, "sac", "off"),
    ("plain", 2, "none", 3), ("plain", 1, "sac", 2), ("llama", 3, "full", "off"),
])  # fmt: skip
def test_offload_gives_the_bits_of_none_and_keeps_less(name, ranks, recompute, tile):
    torch.manual_seed(0)
    model, batch, policies = MODELS[name](), half_labelled(13), ("off", "host")
    (off, expected), (host, results) = (
        sharded(model, batch, ranks, recompute=recompute, tile=tile, offload=policy) for policy in policies
    )
    for mine, other in zip(expected, results):
        assert set(mine) == set(other) and all(torch.equal(mine[name], other[name]) for name in mine)
    kept, stays = costs(off.program, "cpu"), costs(host.program, "cpu")
    assert stays.kept_bytes < kept.kept_bytes and stays.peak_bytes <= kept.peak_bytes
    assert stays.host_moved_bytes > 0 == kept.host_moved_bytes


class Stretched(nn.Module):
    """Most is alive where a wide result is made element by element."""

    def __init__(self):
        super().__init__()
        self.table, self.wide, self.head = nn.Embedding(64, 8), nn.Linear(8, 256), nn.Linear(256, 1)

    def forward(self, input_ids, labels):
        return self.head(self.wide(self.table(input_ids)).neg().exp().neg()).square().mean() + 0 * labels.sum()


def test_auto_keeps_every_budget_that_host_keeps():
    torch.manual_seed(0)
    model, batch = Stretched(), half_labelled(64)
    program = built(model, batch, 1, recompute="none", tile="off", offload="host")[0].program
    budget = costs(program, "cpu").peak_bytes + sum(entry.value.nbytes() for entry in program.inputs)
    built(model, batch, 1, recompute="none", tile="off", offload="auto", memory_budget_bytes=budget)


def test_auto_sends_what_the_budget_needs_and_no_more():
    torch.manual_seed(0)
    model, batch = MODELS["llama"](), half_labelled(13)

    def program(offload: str, budget: int | None = None):
        return built(model, batch, 1, recompute="none", offload=offload, memory_budget_bytes=budget)[0].program

    inputs = sum(entry.value.nbytes() for entry in program("off").inputs)
    least, most = (inputs + costs(program(offload), "cpu").peak_bytes for offload in ("host", "off"))
    moved = []
    for budget in (least, (least + most) // 2, most):
        found = costs(program("auto", budget), "cpu")
        assert inputs + found.peak_bytes <= budget
        moved.append(found.host_moved_bytes)
    assert moved[0] > moved[1] > moved[2] == 0
    with pytest.raises(BuildError) as caught:
        program("auto", least - 1)
    (problem,) = caught.value.problems
    assert problem.code == "budget-too-small"
    assert problem.what == f"needs at least {bytes_text(least)} per rank; budget is {bytes_text(least - 1)}"
    assert problem.fix.startswith(f"give {bytes_text(least)}, more ranks, --recompute auto, or a sequence of about 12 ")
    assert inputs + costs(caught.value.least, "cpu").peak_bytes == least


@pytest.mark.parametrize("ranks, recompute", [(1, "none"), (3, "sac")])
def test_measured_bytes_are_the_planned_ones(ranks, recompute):
    torch.manual_seed(0)
    compiled, inputs = built(MODELS["llama"](), half_labelled(13), ranks, recompute=recompute, offload="host")
    assert costs(compiled.program, "cpu").host_bytes > 0
    assert not compare(compiled.program, 0, inputs, answers(compiled.program, inputs)[0])


def test_any_choice_of_values_is_proved(tiny2):
    for name in tiny2.program.section("backward").takes:
        found = planted(tiny2.program, partial(stowed, names=[name], target="cpu"))
        verify(found)
        derive(found, tiny2.whole)
