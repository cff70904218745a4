"""What an ONNX file holds: every instruction, standard operators where ONNX has them, weights by reference."""

import os
import sys
from collections import Counter
from dataclasses import replace

import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from autosp_aot.commands.check.proof import check
from autosp_aot.commands.cli import main
from autosp_aot.commands.interchange.onnx_file import onnx_model
from autosp_aot.errors import BuildError
from autosp_aot.ir.structure.table import FREE, STRUCTURE
from autosp_aot.ir.text import parse_program
from tests.architectures import ARCHITECTURES, Case
from tests.edits import edit, named
from tests.ir.test_structure import RANKS
from tests.steps import built


@pytest.fixture
def saved(tiny2, tmp_path):
    """`tiny2` on disk, its weights drawn."""
    draw = torch.Generator().manual_seed(0)
    specs = tiny2.manifest.parameters
    weights = {spec.name: torch.randn(spec.shape, dtype=torch.float64, generator=draw) for spec in specs}
    return replace(tiny2, weights=weights).save(tmp_path / "a.sp2")


def export(path, *options):
    arguments = ["export", str(path), "--format", "onnx", *map(str, options)]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_every_instruction_but_free_is_a_node_named_as_in_the_text(tiny2, manifest):
    program = tiny2.program.for_rank(1)
    graph = onnx_model(program, manifest, 1).graph
    wanted = [instr for section in program.sections for instr in section.instrs if instr.op != FREE]
    nodes = [node for node in graph.node if node.op_type != "Identity"]
    assert [node.name for node in nodes] == [instr.values()[0].name for instr in wanted]
    known = {info.name: info for info in (*graph.value_info, *graph.input, *graph.output)}
    for node, instr in zip(nodes, wanted):
        assert node.doc_string == instr.where.source
        assert list(filter(None, node.output)) == [value.name for value in instr.values()]
        for value in instr.values():
            shape = known[value.name].type.tensor_type.shape
            assert tuple(dim.dim_value for dim in shape.dim) == value.shape
    labels = [label for section in program.sections for label, _ in section.gives]
    assert [output.name for output in graph.output] == list(dict.fromkeys(labels))


def test_most_of_a_llama_is_standard_operators(manifest):
    compiled, _ = built(ARCHITECTURES["llama"].build(), Case("llama", "none", "half", 13, 2).batch(), 2)
    nodes = onnx_model(compiled.program.for_rank(0), manifest, 0).graph.node
    domains = Counter(node.domain for node in nodes)
    assert domains[""] >= 0.9 * len(nodes)
    assert {node.op_type for node in nodes if node.domain == "aten"} == {
        "_log_softmax_backward_data.default", "embedding_dense_backward.default", "ne.Scalar",
        "nll_loss_backward.default", "rsqrt.default", "silu_backward.default", "sum.default",
    }  # fmt: skip


def test_collectives_have_group_and_sizes(tiny2, manifest):
    nodes = [onnx_model(tiny2.program.for_rank(rank), manifest, rank).graph.node for rank in range(2)]
    for mine, theirs in zip(*nodes):
        if mine.op_type != "all_to_all":
            continue
        a, b = ({x.name: onnx.helper.get_attribute_value(x) for x in node.attribute} for node in (mine, theirs))
        assert a["group"] == b["group"] == [0, 1]
        assert a["send_sizes"][1] == b["receive_sizes"][0]
        assert a["receive_sizes"][1] == b["send_sizes"][0]


def test_bf16_and_tiles_pass_the_full_check(manifest, tmp_path):
    model = ARCHITECTURES["llama"].build().to(torch.bfloat16)
    compiled, _ = built(model, Case("llama", "none", "half", 13, 3).batch(), 3, tile=2)
    for rank in range(3):
        file = tmp_path / f"{rank}.onnx"
        file.write_bytes(onnx_model(compiled.program.for_rank(rank), manifest, rank).SerializeToString())
        onnx.checker.check_model(str(file), full_check=True)
    tiles = next(node for node in onnx.load(file).graph.node if node.op_type == "tiles")
    assert [len(attribute.graphs) for attribute in tiles.attribute if attribute.name == "tiles"] == [2]


def test_weights_beside_the_file_are_its_initializers_by_reference(saved):
    result = export(saved, "--rank", 1)
    file = saved.parent / "a.sp2.rank1.onnx"
    assert (result.exit_code, result.stdout) == (0, f"{file}\n")
    model, wanted = onnx.load(file), load_file(saved / "weights/model.safetensors")
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, tensor in wanted.items():
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(found[name]).copy()), tensor)
    stored = onnx.load(file, load_external_data=False).graph.initializer
    assert {tensor.name for tensor in stored if tensor.external_data} == set(wanted)
    assert {value.name for value in model.graph.input} >= set(wanted), "they can be given instead"
    check(saved)


def test_weights_out_of_reach_are_inputs_alone(saved, tmp_path):
    file = tmp_path / "elsewhere" / "x.onnx"
    assert export(saved, "-o", file).exit_code == 0
    initializers = onnx.load(file).graph.initializer
    assert not any(tensor.external_data for tensor in initializers)


def test_an_evaluation_is_a_loss_without_gradients(saved):
    result = export(saved, "--evaluation")
    file = saved.parent / "a.sp2.rank0.evaluation.onnx"
    assert (result.exit_code, result.stdout) == (0, f"{file}\n")
    assert [output.name for output in onnx.load(file).graph.output] == ["loss"]


def test_a_file_inside_the_artifact_is_refused(saved):
    file = saved / "x.onnx"
    result = export(saved, "-o", file)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error[output-inside]: {file} is in the artifact\n"
        f"  where  {file}\n"
        "  why    an artifact holds what its manifest lists and nothing else\n"
        "  fix    give a file beside the artifact with -o\n"
    )
    check(saved)


def test_a_rank_that_is_not_there_is_refused_and_nothing_is_written(saved):
    result = export(saved, "--rank", 2)
    assert result.exit_code == 3 and "error[no-such-rank]: there is no rank 2" in result.stderr
    assert sorted(saved.parent.iterdir()) == [saved]


def test_where_it_cannot_be_written_nothing_is_left(saved, tmp_path):
    (tmp_path / "file").write_text("")
    result = export(saved, "-o", tmp_path / "file" / "x.onnx")
    assert result.exit_code == 2 and "error[output-unwritable]" in result.stderr
    assert sorted(saved.parent.iterdir()) == [saved, tmp_path / "file"]


def test_what_is_no_file_is_not_replaced_by_one(saved, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    result = export(saved, "-o", tmp_path / "pipe")
    assert result.exit_code == 2
    assert "  why    it is no file that could be replaced\n" in result.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_without_the_package_it_says_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = export(saved)
    assert result.exit_code == 2
    assert result.stderr == (
        "error[package-missing]: --format onnx needs the package onnx, which is not installed\n"
        "  fix    pip install autosp-aot[onnx]\n"
    )


def test_all_operators_that_onnx_cannot_carry_are_in_one_message(tiny2, manifest):
    program = tiny2.program.for_rank(0)
    for op in ("aten.mm.default", "aten.permute.default"):
        program = edit(program, named(op), lambda instr: [replace(instr, kwargs=(("much", 2**63),))])
    with pytest.raises(BuildError) as caught:
        onnx_model(program, manifest, 0)
    assert {problem.what for problem in caught.value.problems} == {
        "aten.mm.default cannot be a node of ONNX", "aten.permute.default cannot be a node of ONNX"
    }  # fmt: skip
    assert "much is 9223372036854775808, which 64 bits do not hold" in str(caught.value)


def test_a_result_that_is_named_as_another_value_is_refused(tiny2, manifest):
    program = tiny2.program.for_rank(0)
    loss = lambda e: replace(e, value=replace(e.value, name="loss")) if e.kind == "tangent" else e  # noqa: E731
    inputs = tuple(map(loss, program.inputs))
    with pytest.raises(BuildError, match="onnx-cannot-carry.: loss is a result and the name of another value"):
        onnx_model(replace(program, inputs=inputs, sections=program.sections[:1]), manifest, 0)


@pytest.mark.parametrize("op", [record.name for record in STRUCTURE.values() if record.attributes])
def test_what_a_node_says_of_a_move_or_copy_is_in_its_record(manifest, monkeypatch, op):
    program = parse_program(RANKS, {}).for_rank(1)
    before = onnx_model(program, manifest, 1).graph.node
    monkeypatch.setitem(STRUCTURE, op, replace(STRUCTURE[op], attributes=None))
    try:
        after = onnx_model(program, manifest, 1).graph.node
    except (AssertionError, StopIteration):  # it is not written as a shard is
        return
    assert [node for node in after if node.name] != [node for node in before if node.name]
