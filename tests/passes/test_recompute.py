"""Recomputation: the same bits with less kept; what costs much is done again only where that is asked for."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import model_values
from autosp_aot.export.canonical.canonical import canonical_program
from autosp_aot.export.joint import capture
from autosp_aot.export.subject import Subject
from autosp_aot.ir.program import RECOMPUTED, Program
from autosp_aot.ir.structure.table import STRUCTURE, meets
from autosp_aot.ir.verify import verify
from autosp_aot.passes.analysis.segments import segments
from autosp_aot.passes.keep.policy import by_policy
from autosp_aot.passes.lay_out import lay_out
from autosp_aot.passes.partition import Partition
from autosp_aot.passes.pipeline import compile_program
from autosp_aot.passes.recompute import Recompute, recompute
from autosp_aot.passes.release import release
from autosp_aot.passes.sections import Sections
from autosp_aot.passes.step import Step
from autosp_aot.proof.derive import derive
from autosp_aot.runtime.simulate import simulate
from examples import llama
from tests.passes.texts import after, parsed

LAYERS, RANKS = 3, 3
DIMS = {"input_ids": 1, "labels": 1}
ATTENTION = "autosp.attention"


class Small:
    """A small llama's step, whole and of every rank with nothing scheduled yet, and what to run it on."""

    def __init__(self):
        torch.manual_seed(0)
        model = llama.build_model(
            num_hidden_layers=LAYERS, hidden_size=32, num_attention_heads=4, head_dim=8, intermediate_size=64
        )
        joint = capture(Subject(model, llama.example_batch(2, 13), "cpu"))
        self.whole, constants = canonical_program(joint)
        ids = torch.randint(256, (2, 13))
        batch = {"input_ids": ids, "labels": ids}
        self.inputs = model_values(model) | dict(model.named_buffers()) | constants | batch
        step = Sections()(Partition(RANKS)(Step(self.whole, self.whole, DIMS)))
        self.split = replace(step, segments=segments(step.program))

    def keeping(self, kept) -> Program:
        program = release(lay_out(recompute(self.split.program, self.split.segments, kept), "cpu"))
        verify(program)
        derive(program, self.whole)
        return program

    def results(self, program: Program):
        return simulate([program.for_rank(rank) for rank in range(RANKS)], self.inputs, torch.ones(()))


@pytest.fixture(scope="module")
def step():
    return Small()


@pytest.fixture(scope="module")
def expected(step):
    return step.results(step.keeping(by_policy(step.split, "none")))


def same_bits(found, expected) -> bool:
    pairs = zip(found, expected)
    return all(set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in b) for a, b in pairs)


def ops(program: Program, section: str) -> Counter[str]:
    return Counter(instr.op for instr in program.section(section).instrs)


@pytest.mark.parametrize("policy", ["sac", "full"])
def test_every_policy_gives_the_bits_of_none(step, expected, policy):
    assert same_bits(step.results(step.keeping(by_policy(step.split, policy))), expected)


def test_sac_runs_attention_and_collectives_once_and_full_again(step):
    none, sac, full = (step.keeping(by_policy(step.split, policy)) for policy in ("none", "sac", "full"))
    costly = lambda program: [ops(program, "backward")[op] for op in (ATTENTION, *filter(meets, STRUCTURE))]  # noqa: E731
    assert costly(sac) == costly(none) and ops(full, "backward")[ATTENTION] == LAYERS
    kept = [len(program.section("backward").takes) for program in (none, sac, full)]
    assert kept[0] > 2 * kept[1] > 4 * kept[2] / 2


def test_one_layer_is_computed_again_at_a_time(step):
    """At no time are recomputed values of two layers' MLPs alive together."""
    alive: set[str] = set()
    for instr in step.keeping(by_policy(step.split, "sac")).section("backward").instrs:
        if instr.op == "free":
            alive -= set(instr.refs())
        alive |= {out.name for out in instr.values() if out.name.startswith(RECOMPUTED)}
        assert len({name.split("layers.")[1].split(".")[0] for name in alive if "mlp" in name}) <= 1


@pytest.mark.parametrize("policy", ["sac", "full"])
def test_without_the_boundary_of_a_layer_the_one_before_is_run_to_it_and_its_own_values_made_once_more(
    step, expected, policy
):
    boundary = step.split.segments[1].boundary
    assert boundary == ("model.layers.0.add.1",)
    program = step.keeping(set(by_policy(step.split, policy)) - set(boundary))
    assert same_bits(step.results(program), expected)
    names = [out.name for instr in program.section("backward").instrs for out in instr.values()]
    again = Counter(name.removeprefix(RECOMPUTED).removeprefix(RECOMPUTED) for name in names if RECOMPUTED in name)
    assert {name for name, count in again.items() if count > 1} and max(again.values()) == 2
    assert {name.split(".")[2] for name, count in again.items() if count > 1} == {"0"}
    assert ops(program, "backward")[ATTENTION] == (LAYERS if policy == "full" else 0), "attention is held on the way"


def test_with_nothing_kept_all_of_forward_is_run_again(step, expected):
    program = step.keeping(())
    assert same_bits(step.results(program), expected) and not program.section("backward").takes


def test_the_pipeline_follows_the_policy(step):
    for policy in ("none", "sac", "full"):
        program = compile_program(step.whole, DIMS, BuildConfig(RANKS, recompute=policy)).program
        assert (ops(program, "backward")[ATTENTION] > 0) == (policy == "full")


TEXT = """\
autosp program 1
ranks 1
parameter %w: f32[4, 4] @ Replicate
batch %x: f32[5, 4] @ Replicate
tangent %t: f32[] @ Replicate
section forward takes ()
  %a: f32[5, 4] @ Replicate = aten.mm.default(%x, %w)
  %b: f32[5, 4] @ Replicate = aten.exp.default(%a)
  %c: f32[5, 4] @ Replicate = aten.sin.default(%b)
  %loss: f32[] @ Replicate = aten.sum.default(%c)
gives (loss=%loss)
section backward takes (TAKES)
AGAIN  %d: f32[5, 4] @ Replicate = aten.cos.default(%BACK)
  %e: f32[5, 4] @ Replicate = aten.mul.Tensor(%d, %t)
  %f: f32[5, 4] @ Replicate = aten.mul.Tensor(%e, %BACK)
  %y: f32[4, 5] @ Replicate = aten.permute.default(%x, [1, 0])
  %g: f32[4, 4] @ Replicate = aten.mm.default(%y, %f)
gives (grad.w=%g)
"""


def text_of(takes: str, again: str, back: str) -> str:
    return TEXT.replace("TAKES", takes).replace("AGAIN", again).replace("BACK", back)


@pytest.mark.parametrize("kept, takes, again", [
    ("a", "%a", "  %recompute.b: f32[5, 4] @ Replicate = aten.exp.default(%a)\n"),
    ("", "", "  %recompute.a: f32[5, 4] @ Replicate = aten.mm.default(%x, %w)\n"
             "  %recompute.b: f32[5, 4] @ Replicate = aten.exp.default(%recompute.a)\n"),
])  # fmt: skip
def test_what_is_not_kept_is_made_from_what_is_right_before_its_first_use(kept, takes, again):
    given = parsed(text_of("%b", "", "b"))
    given = replace(given, segments=segments(given.program), kept=dict.fromkeys(kept, ""))
    assert after(Recompute(), given) == text_of(takes, again, "recompute.b")
