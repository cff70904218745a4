"""`check` on artifacts that were changed and sealed again: what does not follow from the step is found by name."""

import json
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from autosp_aot.artifact.manifest import EVALUATE, MANIFEST, STEP, file_of
from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.check.proof import check
from autosp_aot.commands.cli import main
from autosp_aot.errors import ArtifactError
from autosp_aot.runtime.load import load
from tests.sealing import edit_ranks, edit_text, reseal


@pytest.fixture
def saved(tiny2, tmp_path):
    weights = {spec.name: torch.ones(spec.shape, dtype=torch.float64) for spec in tiny2.manifest.parameters}
    return replace(tiny2, weights=weights).save(tmp_path / "a")


def refused(path) -> str:
    with pytest.raises(ArtifactError) as caught:
        check(path)
    return str(caught.value)


def own_body(path, change) -> None:
    """Give rank 1 a body of its own: the lines of the common one, changed."""
    lines = change((path / "body.0.program").read_text().splitlines())
    (path / "body.1.program").write_text("\n".join(lines) + "\n")
    edit_ranks(path, lambda ranks: ranks[1].update(body="body.1.program"))


def at(lines: list[str], made: str) -> int:
    """The line that makes a value."""
    return next(number for number, line in enumerate(lines) if line.startswith(f"  %{made}:"))


def test_an_artifact_is_proved(saved):
    assert [line.split()[0] for line in check(saved)] == [
        "files", "programs", "collectives", "evaluation", "operators"
    ]  # fmt: skip


def test_a_rank_may_have_a_body_of_its_own(saved):
    own_body(saved, lambda lines: lines)
    assert "2 bodies" in check(saved)[1]


# --- the unsharded program is checked as what runs ----------------------------------------------------------------


LINE = "f64[10, 8] @ Replicate = aten.reshape.default(%norm.native_layer_norm_0, [10, 8])"


@pytest.mark.parametrize("line, said", [
    (LINE.replace("[10, 8])", "[11, 8])"), "aten.reshape.default cannot be called like this"),
    (LINE.replace("[10, 8])", f"[{2**60}, 8])"), "aten.reshape.default cannot be called like this"),
    (LINE.replace("[10, 8])", "%norm.native_layer_norm_0)"), "aten.reshape.default cannot be called like this"),
    (LINE.replace("f64[10, 8] @", "f64[2, 5, 8] @"), "head.reshape is not what aten.reshape.default makes"),
    (LINE.replace("aten.reshape", "aten.no_such"), "aten.no_such.default is not allowed in a program"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [STEP, EVALUATE])
def test_a_line_of_the_unsharded_program_that_cannot_run(saved, kind, line, said):
    whole = saved / file_of(kind, "whole.program")
    assert whole.read_text().count(LINE) == 1
    whole.write_text(whole.read_text().replace(LINE, line))
    reseal(saved)
    assert said in refused(saved)


# --- collectives of one rank --------------------------------------------------------------------------------------

SUM = "div.all_reduce"


def without_sum(lines: list[str]) -> list[str]:
    """The sum of the loss is not there, and the summand is used in its place."""
    kept = [line for line in lines if not line.startswith((f"  %{SUM}:", "  free(%div)"))]
    return [line.replace(f"%{SUM}", "%div") for line in kept]


def test_a_dropped_collective_on_one_rank(saved):
    own_body(saved, without_sum)
    assert refused(saved) == (
        "error[collective-mismatch]: collective 4 of rank 1 is all_to_all of grad.blocks.0.permute.all_to_all in"
        " backward\n"
        f"  why    that of rank 0 is all_reduce of {SUM} in forward\n"
        "  fix    build the artifact again"
    )


def test_swapped_collectives_on_one_rank(saved):
    def swap(lines):
        first, second = (at(lines, f"blocks.0.{name}.all_to_all") for name in ("permute", "permute.1"))
        lines.insert(second, lines.pop(first))
        return [line for line in lines if line != "  free(%blocks.0.permute)"]

    own_body(saved, swap)
    assert "collective 0 of rank 1 is all_to_all of blocks.0.permute.1.all_to_all" in refused(saved)


def test_a_resized_collective_on_one_rank(saved):
    own_body(saved, lambda lines: [line.replace("cut5 = 0:3 3:5", "cut5 = 0:2 2:5") for line in lines])
    assert "error[collective-mismatch]: in all_to_all of blocks.0.permute.all_to_all" in refused(saved)


def test_another_collective_on_one_rank(saved):
    def change(lines):
        lines[at(lines, SUM)] = lines[at(lines, SUM)].replace(" = all_reduce(", " = all_gather(")
        return lines

    own_body(saved, change)
    assert "collective 4 of rank 1 is all_gather of" in refused(saved)


def test_another_dtype_of_a_collective_on_one_rank(saved):
    def change(lines):
        lines[at(lines, SUM)] = lines[at(lines, SUM)].replace("f64[]", "f32[]")
        return lines

    own_body(saved, change)
    assert "of rank 1 is f32" in refused(saved)


# --- the same on all ranks ----------------------------------------------------------------------------------------


def test_a_removed_reduction(saved):
    body = saved / "body.0.program"
    body.write_text("\n".join(without_sum(body.read_text().splitlines())) + "\n")
    reseal(saved)
    assert refused(saved) == (
        "error[placement-wrong]: loss is Partial at the end of the step\n"
        "  why    a reduction is missing\n"
        "  fix    build the artifact again"
    )


def test_a_shifted_position(saved):
    edit_text(saved, "aten.arange.start_step(0, 5, 1", "aten.arange.start_step(1, 6, 1")
    assert "an argument of aten.arange.start_step is wrong" in refused(saved)


def test_the_evaluation_is_proved_as_the_step_is(saved):
    facts = asdict(read_manifest(saved))["programs"]
    evaluation = facts["evaluate"]
    for costs in ({"peak_bytes": 1}, {"moved": []}):
        reseal(saved, programs=facts | {"evaluate": evaluation | {"costs": evaluation["costs"] | costs}})
        assert f"error[manifest-wrong]: the manifest is wrong about {next(iter(costs))}" in refused(saved)
    reseal(saved, programs=facts | {"evaluate": evaluation | {"decisions": {}}})
    assert "the manifest is wrong about the decision of" in refused(saved)
    reseal(saved, programs=facts)
    edit_text(saved, "aten.slice.Tensor(%labels, 1, 1, 5, 1)", "aten.slice.Tensor(%labels, 1, 0, 4, 1)", EVALUATE)
    assert "an argument of aten.slice.Tensor is wrong" in refused(saved)


def test_a_shifted_label(saved):
    edit_text(saved, "aten.slice.Tensor(%labels, 1, 1, 5, 1)", "aten.slice.Tensor(%labels, 1, 0, 4, 1)")
    assert "an argument of aten.slice.Tensor is wrong" in refused(saved)


@pytest.mark.parametrize("kind", [STEP, EVALUATE], ids=["step", "evaluation"])
def test_every_constant_of_every_rank_is_proved(saved, kind):
    table = json.loads((saved / file_of(kind, "ranks.json")).read_text())
    for rank in (0, 1):
        for name, number in table[rank]["constants"].items():
            edit_ranks(saved, lambda ranks: ranks[rank]["constants"].update({name: number + 1}), kind)  # noqa: B023
            assert f"rank {rank}" in refused(saved)
            edit_ranks(saved, lambda ranks: ranks[rank]["constants"].update({name: number}), kind)  # noqa: B023
    check(saved)


ADDED = "aten.add.Tensor(%tokens.embedding, %positions.embedding, into=%tokens.embedding)"

# --- operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [
    'aten.from_file.default("/etc/hostname")',
    "aten.add_.Tensor(%tokens.embedding, %positions.embedding)",
    "aten.bernoulli.default(%tokens.embedding)",
    "aten.add.Tensor.__class__(%tokens.embedding)",
    "aten.item.default(%tokens.embedding)",
])  # fmt: skip
def test_an_operator_that_could_do_harm_is_refused_before_anything_is_allocated(saved, call):
    edit_text(saved, ADDED, call)
    op = call.partition("(")[0]
    said = (
        f"error[operator-refused]: {op} is not allowed in a program\n"
        "  why    it is not a pure operator of ATen\n"
        "  fix    build the artifact again"
    )
    assert refused(saved) == said
    with pytest.raises(ArtifactError) as caught:
        load(saved, comm=Alone())
    assert str(caught.value) == said


class Alone:
    """Rank 0 of two, before anybody meets."""

    rank, size = 0, 2


@pytest.mark.parametrize("op", ["os.system", "torch.load", "eval"])
def test_what_is_no_operator_is_refused(saved, op):
    edit_text(saved, ADDED, f'{op}("x")')
    assert f"error[program-illegal]: {op} is not an operator" in refused(saved)


def test_an_operator_that_torch_changed_is_refused(saved):
    operators = dict(read_manifest(saved).operators)
    now = operators["aten.mm.default"]
    reseal(saved, operators=operators | {"aten.mm.default": "aten::mm(Tensor self) -> Tensor"})
    assert refused(saved) == (
        "error[operator-changed]: aten.mm.default is not what it was when the artifact was built\n"
        "  why    then aten::mm(Tensor self) -> Tensor\n"
        f"         now  {now}\n"
        f"  fix    use torch {torch.__version__.partition('+')[0]}, or build again"
    )


# --- what the manifest says ---------------------------------------------------------------------------------------


def test_a_manifest_about_another_shape(saved):
    parameters = json.loads((saved / MANIFEST).read_text())["manifest"]["parameters"]
    parameters[0]["shape"] = [8, 9]
    reseal(saved, parameters=parameters)
    assert refused(saved) == (
        "error[manifest-wrong]: the manifest is wrong about tokens.weight\n"
        "  why    it says ('f64', (8, 9))\n"
        "         the artifact holds ('f64', (8, 8))\n"
        "  fix    build the artifact again"
    )


def test_a_manifest_about_other_inputs_training_or_costs(saved):
    manifest = json.loads((saved / MANIFEST).read_text())["manifest"]
    facts = manifest["programs"]
    step = lambda **changes: {"programs": facts | {"step": facts["step"] | changes}}  # noqa: E731
    decisions = {name: text for name, text in facts["step"]["decisions"].items() if "gelu" not in name}
    extra = {"name": "x", "dtype": "f32", "shape": [], "vocabulary": None}
    for changes, about in (
        ({"batch": [*manifest["batch"], extra]}, "the inputs"),
        ({"batch": [entry | {"vocabulary": 7} for entry in manifest["batch"]]}, "vocabularies"),
        ({"trainable": manifest["trainable"][1:]}, "the trained parameters"),
        (step(costs=facts["step"]["costs"] | {"peak_bytes": 1}), "peak_bytes"),
        ({"buffers": [extra]}, "buffers.safetensors"),
        (step(fallbacks=[{"op": "aten.sort.default", "source": "", "gathered_bytes": 0}]), "fallbacks"),
        (step(decisions=decisions), "the decision of"),
    ):
        reseal(saved, **(manifest | changes | {"files": read_manifest(saved).files}))
        assert f"error[manifest-wrong]: the manifest is wrong about {about}" in refused(saved)
        reseal(saved, **manifest)


def test_weights_of_another_shape(saved):
    weights = {"tokens.weight": torch.ones(1)}
    safetensors.torch.save_file(weights, saved / "weights" / "model.safetensors")
    reseal(saved)
    text = refused(saved)
    assert "error[weights-mismatch]" in text
    assert "head.weight is missing" in text


def test_tensors_that_cannot_be_read(saved):
    (saved / "buffers.safetensors").write_bytes(b"no tensors")
    reseal(saved)
    assert f"error[tensors-unreadable]: {saved / 'buffers.safetensors'} cannot be read" in refused(saved)


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "show", "run"])
@pytest.mark.parametrize("damage", [
    lambda path: (path / "whole.program").write_text(""),
    lambda path: (path / "extra").write_text(""),
    lambda path: (path / MANIFEST).unlink(),
    lambda path: edit_text(path, "aten.add.Tensor(%tokens.embedding", "os.system(%tokens.embedding"),
    lambda path: edit_ranks(path, list.pop),
])  # fmt: skip
def test_what_is_refused_is_exit_code_3(saved, command, damage):
    damage(saved)
    result = CliRunner().invoke(main, [command, str(saved)], catch_exceptions=False)
    assert result.exit_code == 3
    assert result.stdout == "" and result.stderr.startswith("error[")
