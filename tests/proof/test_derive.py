"""Wrong rewrites, planted one at a time: each is found without numbers, by name."""

from dataclasses import replace

import pytest

from autosp_aot.errors import ArtifactError
from autosp_aot.ir.placement import REPLICATE
from autosp_aot.ir.program import PerRank, Ref
from autosp_aot.ir.verify import verify
from autosp_aot.proof.derive import derive
from tests.edits import edit, named
from tests.mutants import copies_not_summed, made, option, planted, released_too_early, swapped_dims, to, twice, without


def refused(program, whole) -> str:
    with pytest.raises(ArtifactError) as caught:
        verify(program)
        derive(program, whole)
    return str(caught.value)


def test_the_untouched_program_is_proved(tiny, tiny2):
    for artifact in (tiny, tiny2):
        verify(artifact.program)
        derive(artifact.program, artifact.whole)


def test_a_missing_sum_of_the_loss_is_found(tiny2):
    program = planted(tiny2.program, without("div.all_reduce"))
    assert "loss is Partial at the end of the step" in refused(program, tiny2.whole)


def test_a_missing_sum_of_gradients_is_found(tiny2):
    section = replace(tiny2.program.section("sum_gradients"), instrs=())
    gives = tuple((label, name) for label, name in tiny2.program.section("backward").gives)
    assert "a reduction is missing" in refused(tiny2.program.with_section(replace(section, gives=gives)), tiny2.whole)


def test_a_doubled_sum_is_found(tiny2):
    program = planted(tiny2.program, twice(made("div.all_reduce")))
    said = "all_reduce cannot take div.all_reduce.once from Replicate to Replicate"
    assert said in refused(program, tiny2.whole)


def test_swapped_dims_of_an_all_to_all_are_found(tiny2):
    program = planted(tiny2.program, to("blocks.0.permute.all_to_all", swapped_dims))
    assert "has another shape than rank 0's box" in refused(program, tiny2.whole)


def test_a_shifted_position_on_one_rank_is_found(tiny):
    program = edit(tiny.program, named("autosp.attention_rows"), lambda i: [_last(i, 1)])
    assert "an argument of autosp.attention_rows is wrong on rank 1" in refused(program, tiny.whole)


def _last(instr, rank):
    values = list(instr.args[-1].values)
    values[rank] += 1
    return replace(instr, args=(*instr.args[:-1], PerRank(tuple(values))))


def test_a_scale_applied_twice_is_found(tiny2):
    program = option(named("autosp.attention"), "scale", lambda scale: scale**2)(tiny2.program)
    assert "an argument of autosp.attention is wrong on rank 0" in refused(program, tiny2.whole)


def test_a_mean_over_local_tokens_is_found(tiny2):
    mean = lambda instr: [replace(instr, args=(*instr.args[:3], 1, instr.args[4]))]  # noqa: E731
    program = edit(tiny2.program, named("aten.nll_loss_forward.default"), mean)
    assert "an argument of aten.nll_loss_forward.default is wrong" in refused(program, tiny2.whole)


def test_a_skipped_label_shift_is_found(tiny2):
    whole = lambda instr: [replace(instr, args=(instr.args[0], 1, 0, 4, 1))]  # noqa: E731
    shifts = lambda instr: instr.op == "aten.slice.Tensor" and instr.args[0] == Ref("labels")  # noqa: E731
    assert "an argument of aten.slice.Tensor is wrong" in refused(edit(tiny2.program, shifts, whole), tiny2.whole)


def test_another_operand_is_found(tiny2):
    other = lambda instr: [replace(instr, args=(instr.args[1], instr.args[0], *instr.args[2:]))]  # noqa: E731
    program = edit(tiny2.program, named("autosp.attention"), other)
    assert "is computed from" in refused(program, tiny2.whole)


def test_a_copy_of_a_key_value_head_whose_gradient_is_not_summed_is_found(tiny2):
    program = planted(tiny2.program, copies_not_summed)
    assert "no strategy of its sharding rule has these placements" in refused(program, tiny2.whole)


def test_a_value_released_too_early_is_found(tiny2):
    text = refused(released_too_early(tiny2.program), tiny2.whole)
    assert "is used but not alive" in text and "it was released before" in text


def test_a_value_made_on_every_rank_but_called_a_shard_is_found(tiny2):
    def claim(instr):
        out = instr.outs[0]
        return [replace(instr, outs=(replace(out, placement=REPLICATE),))]

    program = edit(tiny2.program, named("aten.embedding.default"), claim)
    assert "error[placement-wrong]" in refused(program, tiny2.whole)


def test_another_whole_step_is_not_proved(tiny, tiny2):
    assert "error[placement-wrong]" in refused(tiny2.program, replace(tiny.whole, inputs=tiny.whole.inputs[1:]))


def test_a_label_given_twice_or_for_another_value_is_found(tiny2):
    section = tiny2.program.section("forward")
    twice = replace(section, gives=(*section.gives, section.gives[0]))
    assert "gives one label twice" in refused(tiny2.program.with_section(twice), tiny2.whole)
    wrong = replace(section, gives=(*section.gives, ("grad.head.weight", section.gives[0][1])))
    said = refused(tiny2.program.with_section(wrong), tiny2.whole)
    assert "grad.head.weight is div, in the unsharded program" in said
