"""`explain`: what it says of each kind of value, and that it is what the program does."""

import json
from dataclasses import asdict

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import compile_model
from autosp_aot.commands.cli import main
from autosp_aot.commands.explain import explain
from autosp_aot.errors import ArtifactError
from autosp_aot.ir.program import EARLY, RECOMPUTED, values_of
from examples import plain
from tests.conftest import TINY
from tests.sealing import reseal


@pytest.fixture(scope="module")
def saved(tiny2, tmp_path_factory):
    return tiny2.save(tmp_path_factory.mktemp("explain") / "a")


def rows(path, value) -> dict[str, tuple[str, ...]]:
    return dict(explain(path, value).rows)


def refused(path, value) -> str:
    with pytest.raises(ArtifactError) as caught:
        explain(path, value)
    return str(caught.value)


def test_a_product(saved):
    assert explain(saved, "blocks.0.qkv.addmm").text == """\
blocks.0.qkv.addmm
  made by     aten.addmm.default(blocks.0.qkv.bias @ Replicate, blocks.0.qkv.reshape @ Shard(0), \
blocks.0.qkv.permute @ Replicate)
  at          plain.py:20 in blocks.0.qkv
  is          f64[6/4, 16], of [10, 16]
  placed      Shard(0): of each of the 2 parts of dim 0 rank by rank 0:3 3:5
  sequence    along dim 0: 5 positions in each of 2 parts
  rule        a, b C, C a -> b a
              a=16 b=10 C=8; never cut: C
  taken       b cut at 0:3 3:5 in each of 2 parts: 146 B = 0 B received + 0 B to reshard results + 146 B for local work
  others      the whole on every rank: 578 B = 384 B received + 0 B to reshard results + 194 B for local work; \
gathers, so the last resort
  read by     blocks.0.qkv.reshape.1
  backward    does not need it
  released    in forward after blocks.0.qkv.reshape.1"""


def test_what_waits_in_host_memory(tmp_path):
    torch.manual_seed(0)
    model, dims = plain.build_model(**TINY, dtype="float64"), {"input_ids": 1, "labels": 1}
    config = BuildConfig(2, recompute="none", offload="host")
    path = compile_model(model, plain.example_batch(2, 5), dims, config, "").save(tmp_path / "a")
    name = "blocks.0.attention_0"
    assert rows(path, name)["backward"][0].startswith("saved in host memory, ")
    assert f"{name}.offload" in rows(path, name)["read by"][0]
    for copy, source in (("offload", ""), ("host", ".offload"), ("fetch", ".host"), ("back", ".fetch")):
        said = rows(path, f"{name}.{copy}")
        assert said["copy of"] == (f"{name}{source}, to host memory or back; explain what it was made of for the rest",)
        assert "backward" not in said


def test_attention_is_cut_by_heads_and_its_results_are_kept(saved):
    said = rows(saved, "blocks.0.attention_0")
    assert said["sequence"] == ("along dim 2: 5 positions",)
    assert said["taken"][0].startswith("b cut at 0:1 1:2: ")
    assert said["others"][0].endswith("gathers, so the last resort")
    assert said["backward"][0] == (
        "saved, 320 B on the rank with the most: it comes from attention, whose cost is quadratic in the sequence"
    )
    assert said["moves"][0].startswith("blocks.0.attention_0 by all_to_all to Shard(2), ")


def test_a_moved_value_says_what_it_is_for(saved):
    said = rows(saved, "blocks.0.permute.1.all_to_all")
    assert said["moved from"] == ("blocks.0.permute.1 by all_to_all to Shard(1), 192 B received by the worst rank",)
    assert said["because"][0] == "blocks.0.attention_0 reads it so"
    assert said["placed"] == ("Shard(1): of dim 1 rank by rank 0:1 0:1, copies where they overlap",)


def test_a_summand_and_its_sum(saved):
    said = rows(saved, "div")
    assert said["placed"] == ("Partial: a partial sum on every rank",)
    assert ", the result a partial sum: " in said["taken"][0]
    assert said["moves"][0].startswith("div by all_reduce to Replicate, 8 B received")
    assert said["sequence"] == ("none in it",)


def test_what_is_computed_again_and_from_what(saved):
    said = rows(saved, "blocks.0.out.reshape")
    assert said["backward"] == (
        "recomputed: its cost is linear in the sequence, and it follows from what is saved",
        "from recompute.blocks.0.permute.3, for grad.blocks.0.out.mm.1",
    )
    again = rows(saved, "recompute.blocks.0.out.reshape")
    assert again["again"] == ("blocks.0.out.reshape, recomputed for backward; explain that for the rest",)


def test_what_costs_much_and_is_done_again_says_its_price(tmp_path):
    model = plain.build_model(**TINY, dtype="float64")
    config = BuildConfig(2, recompute="full")
    artifact = compile_model(model, plain.example_batch(2, 5), {"input_ids": 1, "labels": 1}, config, "")
    path = artifact.save(tmp_path / "a")
    assert rows(path, "blocks.0.attention_0")["backward"][0] == (
        "recomputed: not saved under this plan, so repeats attention's 320 FLOPs on the rank with the most"
    )
    assert "so repeats blocks.0.permute by all_to_all to " in rows(path, "blocks.0.permute.all_to_all")["backward"][0]


def test_what_a_segment_begins_with_is_kept(saved):
    assert "the forward pass goes on from it" in rows(saved, "add")["backward"][0]


def test_positions_are_whole_whatever_else_is_cut(saved):
    said = rows(saved, "arange")
    assert said["taken"][0].startswith("the whole on every rank: ")
    assert said["others"][0].startswith("none considered")


def test_an_input_and_a_gradient(saved):
    said = rows(saved, "labels")
    assert said["is"] == ("the batch i64[2, 5], given whole to every rank",)
    assert said["released"] == ("never: it is an input",)
    assert rows(saved, "grad.head.mm")["moves"][0].endswith("for the result")


def test_without_recomputation_everything_is_kept(tiny2, tmp_path):
    path = tiny2.save(tmp_path / "a")
    reseal(path, config=asdict(BuildConfig(2, recompute="none")))
    assert rows(path, "add")["backward"][0].endswith("nothing is recomputed")


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return torch.cdist(x * self.weight, x + self.weight).mean()


def test_an_operator_without_a_rule_says_what_it_costs(tmp_path):
    artifact = compile_model(Distances(), {"x": torch.ones(2, 6, 4)}, {"x": 1}, BuildConfig(2), "")
    said = rows(artifact.save(tmp_path / "a"), "cdist_forward")
    assert said["rule"] == ("none for this operator: every rank computes all of it, from whole operands",)
    assert said["cost"] == ("gathers 192 B on the worst rank",)


def test_a_unique_end_or_beginning_of_a_name_will_do(saved):
    assert explain(saved, "norm_attention.native_layer_norm_0").value == "blocks.0.norm_attention.native_layer_norm_0"
    assert explain(saved, "gelu").value == "blocks.0.gelu"


def test_what_the_step_gives_is_found_by_its_label(saved):
    assert explain(saved, "loss").value == "div.all_reduce"
    assert explain(saved, "grad.head.weight").value.endswith(".all_reduce")


def test_a_name_that_every_layer_has_is_explained_of_the_first(tmp_path):
    model = plain.build_model(**TINY | {"layers": 3}, dtype="float64")
    artifact = compile_model(model, plain.example_batch(2, 5), {"input_ids": 1, "labels": 1}, BuildConfig(2), "")
    said = explain(artifact.save(tmp_path / "a"), "gelu")
    assert said.value == "blocks.0.gelu"
    assert said.rows[0] == ("one of", ("blocks.{0-2}.gelu: the first of 3, explain another by its whole name",))


def test_a_name_of_several_values_lists_them(saved):
    assert refused(saved, "embedding") == (
        "error[value-ambiguous]: 2 values begin or end with embedding\n"
        f"  where  {saved}\n"
        "  why    tokens.embedding\n"
        "         positions.embedding\n"
        "  fix    give more of the name"
    )
    assert "and 5 more" not in refused(saved, "blocks.0.qkv") and "more\n" in refused(saved, "blocks")


def test_a_name_of_nothing_says_what_is_near(saved):
    assert refused(saved, "block.0.gelu") == (
        "error[no-such-value]: no value is named block.0.gelu\n"
        f"  where  {saved}\n"
        "  why    near it: blocks.0.gelu, blocks.0.permute, blocks.0.slice\n"
        "  fix    autosp-aot show lists the values"
    )


def test_every_value_can_be_explained_and_is_placed_as_the_decisions_say(saved, tiny2):
    """`explain` refuses where a decision taken again places a value otherwise than the program."""
    for name in tiny2.program.values():
        said = rows(saved, name)
        assert {"is", "placed"} <= set(said)
        made = name in {out.name for instr in tiny2.whole.instrs() for out in instr.values()}
        assert ("taken" in said) == made and (RECOMPUTED in name) == ("again" in said)


def test_a_decision_that_is_not_the_program_s_is_refused(tiny2, tmp_path):
    path = tiny2.save(tmp_path / "a")
    programs = asdict(tiny2.manifest)["programs"]
    del programs["step"]["decisions"]["blocks.0.gelu"]
    reseal(path, programs=programs)
    assert "error[decision-wrong]: the recorded decision of blocks.0.gelu" in refused(path, "blocks.0.gelu")


def test_the_command(saved):
    result = CliRunner().invoke(main, ["explain", str(saved), "gelu"], catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout == explain(saved, "gelu").text + "\n"
    found = json.loads(CliRunner().invoke(main, ["explain", str(saved), "gelu", "--json"]).stdout)
    assert found["value"] == "blocks.0.gelu" and found["placed"] == ["Shard(1): of dim 1 rank by rank 0:3 3:5"]
    assert CliRunner().invoke(main, ["explain", str(saved), "nothing.here"]).exit_code == 3


def test_whatever_is_computed_in_tiles_early_or_after_a_copy_to_the_host_is_explained(tmp_path):
    torch.manual_seed(0)
    config, dims = BuildConfig(2, tile=2, offload="host"), {"input_ids": 1, "labels": 1}
    model = plain.build_model(**TINY | {"vocab_size": 64})
    artifact = compile_model(model, plain.example_batch(2, 8), dims, config, "")
    path = artifact.save(tmp_path / "tiled")
    bodies = [instr.body.instrs for instr in artifact.program.instrs() if instr.body]
    for name in artifact.program.values() | values_of(max(bodies, key=len)):
        assert rows(path, name)["placed"]
    made = [out.name for instr in artifact.program.instrs() if instr.body for out in instr.values()]
    assert any(name.startswith(EARLY) for name in made)
    assert all(rows(path, name)["made by"][0].startswith("tiles(") for name in made)
    assert all(rows(path, name)["rule"] for name in made if not name.startswith(RECOMPUTED))


def test_what_tiles_give_and_what_they_make_on_the_way(tmp_path):
    model, config = plain.build_model(**TINY | {"vocab_size": 64}), BuildConfig(2, tile=2)
    artifact = compile_model(model, plain.example_batch(2, 8), {"input_ids": 1, "labels": 1}, config, "")
    path = artifact.save(tmp_path / "tiled")
    given, inner = rows(path, "add"), rows(path, "blocks.0.gelu")
    assert given["made by"][0].endswith(" in 2")
    assert given["in a tile"][0].startswith("aten.add.Tensor(tile.tokens.embedding @ Shard(1), ")
    assert given["at"] == ("plain.py:40",) and "Shard(1): of dim 1 rank by rank 0:4 4:8" in given["placed"]
    assert explain(path, "blocks.0.gelu").value == "tile.blocks.0.gelu"
    assert inner["tiles"][0].startswith("2 a rank, one after the other, for ")
    assert inner["placed"] == ("Shard(1): of dim 1 tile by tile 0:2 2:4 4:6 6:8",)
    assert inner["stands for"] == ("a tile's part of blocks.0.gelu",)
    assert inner["taken"] and inner["released"][0].startswith("in each tile after tile.")
