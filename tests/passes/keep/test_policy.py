"""Planning: the budget is kept by what is really scheduled, the numbers stay, and what cannot be met is refused."""

import functools
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers as hf

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import model_values
from autosp_aot.export.canonical.canonical import canonical_program
from autosp_aot.export.joint import capture
from autosp_aot.export.subject import Subject
from autosp_aot.ir.program import Program
from autosp_aot.ir.structure.table import STRUCTURE, meets
from autosp_aot.ir.units import bytes_text
from autosp_aot.memory.costs import costs
from autosp_aot.passes.keep.budget_error import BudgetTooSmall
from autosp_aot.passes.pipeline import compile_program
from autosp_aot.runtime.simulate import simulate
from autosp_aot.targets.devices import DEVICES, Device
from examples import llama
from tests.steps import half_labelled

LAYERS = 4
DIMS = {"input_ids": 1, "labels": 1}
SHARES = (0.9, 0.6, 0.3, 0.1, 0.0)  # of the way from the least budget to what `none` takes


class Model:
    """A model's step, and what it takes; what it is built to is planned once for the same options."""

    def __init__(self, model: torch.nn.Module, ranks: int, length: int):
        self.ranks = ranks
        batch = half_labelled(length)
        self.whole, constants = canonical_program(capture(Subject(model, batch, "cpu")))
        self.inputs = model_values(model) | dict(model.named_buffers()) | constants | batch

    @functools.cache
    def build(
        self, recompute: str, budget_bytes: int | None = None, offload: str = "off", device: Device | None = None
    ) -> Program:
        options = dict(recompute=recompute, memory_budget_bytes=budget_bytes, offload=offload, device=device)
        config = BuildConfig(self.ranks, tile="off", **options)
        return compile_program(self.whole, DIMS, config).program

    def taken(self, program: Program) -> int:
        return sum(entry.value.nbytes() for entry in program.inputs) + costs(program, "cpu").peak_bytes

    @functools.cache
    def refused(self, budget_bytes: int) -> BudgetTooSmall:
        with pytest.raises(BudgetTooSmall) as caught:
            self.build("auto", budget_bytes)
        return caught.value

    def least(self) -> int:
        """The least budget that can be kept, as the refusal of one that is far too small has it."""
        return self.taken(self.refused(1).least)

    def results(self, program: Program) -> list[dict]:
        return simulate([program.for_rank(rank) for rank in range(self.ranks)], self.inputs, torch.ones(()))


@pytest.fixture(scope="module")
def deep() -> Model:
    torch.manual_seed(0)
    small = dict(num_hidden_layers=LAYERS, hidden_size=16, num_attention_heads=4, head_dim=4, intermediate_size=32)
    return Model(llama.build_model(vocab_size=64, num_key_value_heads=2, **small), 3, 97)


@pytest.fixture(scope="module")
def planned(deep) -> list[tuple[int, Program]]:
    """Budgets from ample to the least, and the program for each."""
    least, most = deep.least(), deep.taken(deep.build("none"))
    budgets = [least + int(share * (most - least)) for share in SHARES]
    return [(budget, deep.build("auto", budget)) for budget in budgets]


def test_every_budget_is_kept(deep, planned):
    assert all(deep.taken(program) <= budget for budget, program in planned)


def test_every_plan_gives_the_bits_of_none(deep, planned):
    expected = deep.results(deep.build("none"))
    for _, program in planned:
        for found, wanted in zip(deep.results(program), expected):
            assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_less_room_means_less_kept_and_more_done_again(planned):
    """From end to end; in between FLOPs may fall as collectives are done again, and the other way round."""
    ample, least = (costs(program, "cpu") for _, program in (planned[0], planned[-1]))
    assert ample.kept_bytes > least.kept_bytes and ample.recomputed_flops < least.recomputed_flops


def test_collectives_and_attention_are_done_again_only_where_the_budget_needs_it(deep, planned):
    def costly(program: Program) -> int:
        ops = Counter(instr.op for instr in program.section("backward").instrs)
        return sum(ops[op] for op in ("autosp.attention", *filter(meets, STRUCTURE)))

    once = costly(deep.build("none"))
    assert costly(planned[0][1]) == once < costly(planned[-1][1])
    sac = deep.build("auto", deep.taken(deep.build("sac")))
    assert costly(sac) == once


@pytest.mark.parametrize("offload", ["host", "auto"])
def test_what_has_no_room_waits_on_the_host_before_attention_is_done_twice(deep, offload):
    budget = deep.least()
    program = deep.build("auto", budget, offload)
    assert deep.taken(program) <= budget
    ops = Counter(instr.op for instr in program.instrs())
    assert ops["offload"] == ops["fetch"] > 0
    assert costs(program, "cpu").recomputed_flops < costs(deep.build("auto", budget), "cpu").recomputed_flops
    for found, wanted in zip(deep.results(program), deep.results(deep.build("none"))):
        assert all(torch.equal(found[label], wanted[label]) for label in wanted)


def test_nothing_waits_on_the_host_that_has_room(deep):
    budget = deep.taken(deep.build("sac"))
    assert deep.build("auto", budget, "auto") == deep.build("auto", budget)


def test_room_for_all_means_that_nothing_is_computed_again(deep):
    none = deep.build("none")
    assert deep.build("auto", 2 * deep.taken(none)) == none


def test_choices_are_priced_at_the_rates_of_the_device_asked_for(deep, planned):
    budget, program = planned[1]
    cpu = DEVICES["cpu"]
    fast, slow = (replace(cpu, flops_per_s=flops, memory_bytes_per_s=rate) for flops, rate in ((1e30, 1), (1, 1e30)))
    assert deep.build("auto", budget, device=cpu) == program
    dear, cheap = (costs(deep.build("auto", budget, device=device), "cpu").recomputed_flops for device in (slow, fast))
    assert dear < cheap


def test_auto_without_a_budget_is_sac(deep):
    assert deep.build("auto") == deep.build("sac")


def test_what_cannot_be_met_is_refused_with_what_it_takes_and_for_what(deep):
    least = deep.least()
    (problem,) = deep.refused(least - 1).problems
    assert problem.code == "budget-too-small"
    assert problem.what == f"needs at least {bytes_text(least)} per rank; budget is {bytes_text(least - 1)}"
    assert "parameters and batch" in problem.why and "gradients" in problem.why and ".py:" in problem.why
    assert re.match(r"give .* KiB, more ranks, --offload host, or a sequence of about 96 ", problem.fix)


def test_where_gradients_and_sums_of_them_have_no_room_no_other_length_is_advised(deep):
    (problem,) = deep.refused(10_000).problems
    assert problem.what.endswith("; budget is 9.77 KiB")
    assert "or train fewer or narrower parameters: with gradients and sums" in problem.fix
    assert "which neither more ranks nor a shorter sequence changes" in problem.fix and "--" not in problem.fix


def test_what_is_kept_has_a_reason(deep, planned):
    config = BuildConfig(deep.ranks, recompute="auto", memory_budget_bytes=planned[1][0], tile="off")
    compiled = compile_program(deep.whole, DIMS, config)
    assert set(compiled.program.section("backward").takes) <= set(compiled.kept)
    assert all(why for why in compiled.kept.values())


@pytest.mark.parametrize("name", ["t5", "mamba2"])
def test_models_of_other_shapes_are_planned_too(name):
    torch.manual_seed(0)
    small = dict(vocab_size=64, use_cache=False, pad_token_id=0)
    model = {
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(
            **small, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0)),
        "mamba2": lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(
            **small, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=16, n_groups=2,
            chunk_size=8, bos_token_id=1, eos_token_id=2)),
    }[name]().train()  # fmt: skip
    step = Model(model, 2, 64)
    none = step.build("none")
    least, most = step.least(), step.taken(none)
    assert least < most
    expected = step.results(none)
    for budget in (least, (least + most) // 2):
        program = step.build("auto", budget)
        assert step.taken(program) <= budget
        for found, wanted in zip(step.results(program), expected):
            assert all(torch.equal(found[label], wanted[label]) for label in wanted)
