"""Tiles: what is local along the sequence in slices of it, exact, proved, and read back from its text."""

from dataclasses import replace

import pytest
import torch

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.read import read_bodies, read_manifest
from autosp_aot.commands.build.builder import compile_model
from autosp_aot.commands.check.proof import check
from autosp_aot.errors import ArtifactError
from autosp_aot.ir.placement import REPLICATE
from autosp_aot.ir.program import Instr, Program, Ref
from autosp_aot.ir.text import parse_program, print_program
from autosp_aot.ir.verify import verify
from autosp_aot.proof.derive import derive
from examples import llama
from tests.steps import equal_to_eager, half_labelled

SIZES = dict(
    vocab_size=64, num_hidden_layers=1, hidden_size=32, num_attention_heads=4, head_dim=8, intermediate_size=40
)


def small(dtype: str = "float64"):
    torch.manual_seed(0)
    return llama.build_model(dtype=dtype, **SIZES)


def built(ranks: int = 2, length: int = 13, **options):
    batch = llama.example_batch(2, length)
    dims = {"input_ids": 1, "labels": 1}
    return compile_model(small(), batch, dims, BuildConfig(ranks, tile=3, **options), "")


def loops(program: Program) -> list[Instr]:
    return [instr for instr in program.instrs() if instr.op == "tiles"]


@pytest.fixture(scope="module")
def tiled():
    return built()


@pytest.mark.parametrize("ranks, length, tiles, recompute", [
    (1, 13, 2, "sac"), (1, 16, 5, "none"), (2, 16, 2, "none"), (2, 13, 4, "sac"), (3, 16, 3, "sac"), (3, 13, 2, "none"),
])  # fmt: skip
def test_tiles_give_the_numbers_of_eager(ranks, length, tiles, recompute):
    compiled = equal_to_eager(small(), half_labelled(length), ranks, 1e-6, tile=tiles, recompute=recompute)
    assert len(loops(compiled.program)) >= 3


def test_there_are_no_more_tiles_than_positions():
    compiled = equal_to_eager(small(), half_labelled(7), 3, 1e-6, tile=50)
    assert {instr.body.tiles for instr in loops(compiled.program)} == {2}


def test_a_small_step_is_not_sliced_unless_it_is_said(tiled):
    assert not loops(built(1).whole) and loops(tiled.program)
    batch = llama.example_batch(2, 13)
    plain = compile_model(small(), batch, {"input_ids": 1, "labels": 1}, BuildConfig(2), "")
    assert not loops(plain.program)


def test_summands_of_half_dtypes_are_added_up_in_fp32():
    """The same bf16 products, added up once in fp32 and once in bf16, differ: tiles do the former."""
    from autosp_aot.runtime.execute import Executor

    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    program = parse_program("""\
autosp program 1
ranks 1
layout cut512 = 0:64 64:128 128:192 192:256 256:320 320:384 384:448 448:512
batch %x: bf16[512, 4] @ Replicate
section forward takes ()
  %s: bf16[4] @ Replicate = tiles(%x) in 8
    %tile.x: bf16[64, 4] @ Shard(0, cut512) = shard(%x)
    %tile.s: bf16[4] @ Partial = aten.sum.dim_IntList(%tile.x, [0])
  gives (%tile.s)
gives (loss=%s)
section backward takes ()
gives ()
section sum_gradients takes ()
gives ()
""", {})
    verify(program)
    values = {"x": x}
    (found,) = list(_finished(Executor(program, 0, torch.device("cpu")).run("forward", values)))
    parts = x.view(8, 64, 4).sum(1)
    assert torch.equal(found["loss"], parts.float().sum(0).bfloat16())
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = one_by_one + part
    assert not torch.equal(found["loss"], one_by_one)


def _finished(run):
    with pytest.raises(StopIteration) as stop:
        next(run)
    yield stop.value.value


def test_the_text_of_tiles_is_read_back(tiled, tmp_path):
    text, constants = print_program(tiled.program)
    assert parse_program(text, constants) == tiled.program
    for rank in range(2):
        own = tiled.program.for_rank(rank)
        assert parse_program(*print_program(own)) == own
    path = tiled.save(tmp_path / "a")
    ((_, read),) = read_bodies(path, read_manifest(path))
    assert read == tiled.program
    check(tmp_path / "a")


def body_edit(program: Program, op: str, change) -> Program:
    """The program with the first instruction of an operator in the body that has one replaced."""
    for section in program.sections:
        for at, instr in enumerate(section.instrs):
            inner = [i for i, x in enumerate(instr.body.instrs) if x.op == op] if instr.body else []
            if inner:
                instrs = list(instr.body.instrs)
                instrs[inner[0] : inner[0] + 1] = change(instrs[inner[0]])
                edited = replace(instr, body=replace(instr.body, instrs=tuple(instrs)))
                return program.with_section(
                    replace(section, instrs=(*section.instrs[:at], edited, *section.instrs[at + 1 :]))
                )
    raise AssertionError(f"no {op} in a body")


def shifted(instr: Instr) -> list[Instr]:
    """The slices of a tile, each one tile on."""
    (out,) = instr.outs
    bounds = out.placement.cut.bounds
    cut = replace(out.placement.cut, bounds=(*bounds[1:], bounds[0]))
    return [replace(instr, outs=(replace(out, placement=replace(out.placement, cut=cut)),))]


def whole(instr: Instr) -> list[Instr]:
    """No slice: the rank's whole share for every tile."""
    (out,) = instr.outs
    return [replace(instr, op="aten.clone.default", outs=(replace(out, placement=REPLICATE),))]


@pytest.mark.parametrize("op, change, said", [
    ("shard", shifted, "cannot take"),
    ("shard", whole, "has no aten.clone"),
    ("aten.mm.default", lambda i: [replace(i, op="aten.addmm.default")], "has no aten.addmm"),
    ("aten.sum.dim_IntList", lambda i: [replace(i, args=(i.args[0], (0,), *i.args[2:]))], "is wrong"),
    ("free", lambda i: [replace(i, args=(*i.args, Ref("model.embed_tokens.weight")))], "not its own"),
    ("free", lambda i: [i, i], "not alive"),
    ("shard", lambda i: [replace(i, op="all_gather")], "in a body"),
])  # fmt: skip
def test_a_wrong_body_is_refused(tiled, op, change, said):
    program = body_edit(tiled.program, op, change)
    with pytest.raises(ArtifactError, match=said):
        verify(program)
        derive(program, tiled.whole)


@pytest.mark.parametrize("change, said", [
    (lambda i: replace(i, body=replace(i.body, gives=i.body.gives[::-1])), "does not make up|has another shape|in the"),
    (lambda i: replace(i, body=replace(i.body, gives=i.body.gives[1:])), "gives something for each result"),
    (lambda i: replace(i, args=i.args[1:]), "not alive"),
    (lambda i: replace(i, body=replace(i.body, tiles=1)), "two tiles or more"),
])  # fmt: skip
def test_wrong_results_of_tiles_are_refused(tiled, change, said):
    backward = tiled.program.section("backward")
    at, loop = next((at, i) for at, i in enumerate(backward.instrs) if i.op == "tiles" and len(i.outs) > 1)
    instrs = (*backward.instrs[:at], change(loop), *backward.instrs[at + 1 :])
    program = tiled.program.with_section(replace(backward, instrs=instrs))
    with pytest.raises(ArtifactError, match=said):
        verify(program)
        derive(program, tiled.whole)
