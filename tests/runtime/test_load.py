"""From an artifact to a module: what does not fit this machine, this torch or these ranks is refused before it runs."""

from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

import autosp_aot
from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.read import read_manifest
from autosp_aot.errors import ArtifactError
from autosp_aot.runtime.comm import Group
from autosp_aot.runtime.operators import check_operators
from tests.edits import edit, named
from tests.sealing import edit_text, reseal

CPU = torch.device("cpu")


@pytest.fixture
def saved(tiny2, tmp_path):
    """`tiny2` on disk, its weights all ones."""
    weights = {spec.name: torch.ones(spec.shape, dtype=torch.float64) for spec in tiny2.manifest.parameters}
    return replace(tiny2, weights=weights).save(tmp_path / "a")


def refusal(path, comm=Group(0, 2, CPU), **given) -> str:
    with pytest.raises(ArtifactError) as caught:
        autosp_aot.load(path, comm=comm, **given)
    return str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_loads_its_own_program(saved, tiny2, rank):
    module = autosp_aot.load(saved, comm=Group(rank, 2, CPU))
    assert module.executor.program == tiny2.program.for_rank(rank)
    assert all(bool((parameter == 1).all()) for parameter in module.parameters())


def test_other_weights_are_used_instead_of_the_stored_ones(saved, tiny2, tmp_path):
    weights = {spec.name: torch.zeros(spec.shape, dtype=torch.float64) for spec in tiny2.manifest.parameters}
    save_file(weights, tmp_path / "zeros.safetensors")
    module = autosp_aot.load(saved, tmp_path / "zeros.safetensors", comm=Group(0, 2, CPU))
    assert all(bool((parameter == 0).all()) for parameter in module.parameters())


def test_another_number_of_ranks_is_refused(saved):
    assert refusal(saved, Group(0, 3, CPU)) == (
        "error[world-size]: the artifact is for 2 ranks, and here are 3\n"
        "  why    each rank of a group runs a program of its own\n"
        "  fix    start 2 processes, or build for another --sp"
    )


def test_a_process_alone_is_a_single_rank(saved):
    assert refusal(saved, None).startswith("error[world-size]: the artifact is for 2 ranks, and here are 1\n")


def test_another_device_is_refused(saved):
    assert refusal(saved, device="cuda") == (
        "error[wrong-device]: the artifact is for cpu, the device is cuda\n"
        f"  where  {saved}\n"
        "  why    kernels are fixed when an artifact is built\n"
        "  fix    build with --target for cuda"
    )


def test_an_artifact_for_another_target_is_refused(saved):
    reseal(saved, config=asdict(BuildConfig(2, "cuda")))
    assert refusal(saved).startswith("error[wrong-device]: the artifact is for cuda, the device is cpu\n")


def test_weights_that_do_not_fit_are_refused(saved, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert refusal(saved, init_from=tmp_path / "w.safetensors").startswith("error[weights-mismatch]")


# --- operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [
    "aten.rand_like.default",       # draws random numbers
    "aten.gelu_.default",           # writes to its operand
    "aten.gelu.missing", "aten.missing.default", "aten.gelu", "aten.__class__.default",
    "autosp.missing",
])  # fmt: skip
def test_an_operator_that_is_not_allowed_is_refused(saved, op):
    edit_text(saved, "aten.gelu.default", op)
    assert refusal(saved) == (
        f"error[operator-refused]: {op} is not allowed in a program\n"
        "  why    it is not a pure operator of ATen\n"
        "  fix    build the artifact again"
    )


def test_an_operator_of_another_library_is_refused(saved):
    edit_text(saved, "aten.gelu.default", "prims.exp.default")
    assert refusal(saved).startswith("error[program-illegal]: prims.exp.default is not an operator\n")


def test_an_operator_that_has_changed_is_refused(saved):
    manifest = read_manifest(saved)
    schema = manifest.operators["aten.gelu.default"]
    reseal(saved, operators=manifest.operators | {"aten.gelu.default": "aten::gelu(Tensor self) -> Tensor"})
    assert refusal(saved) == (
        "error[operator-changed]: aten.gelu.default is not what it was when the artifact was built\n"
        "  why    then aten::gelu(Tensor self) -> Tensor\n"
        f"         now  {schema}\n"
        f"  fix    use torch {manifest.versions['torch']}, or build again"
    )


def test_our_own_operators_are_compared_too(saved):
    operators = read_manifest(saved).operators
    reseal(saved, operators=operators | {"autosp.attention": "autosp.attention(q, k, v) -> out"})
    assert refusal(saved).startswith("error[operator-changed]: autosp.attention is not what it was")


def test_an_operator_that_the_manifest_does_not_name_is_refused(saved):
    operators = dict(read_manifest(saved).operators)
    del operators["aten.gelu.default"]
    reseal(saved, operators=operators)
    assert refusal(saved).startswith("error[operator-changed]: aten.gelu.default is not what it was")


def test_all_operators_are_checked_at_once(tiny2):
    random = lambda instr: [replace(instr, op="aten.rand_like.default")]  # noqa: E731
    program = edit(tiny2.program, named("aten.gelu.default"), random)
    manifest = replace(tiny2.manifest, operators={op: "" for op in tiny2.manifest.operators if op.startswith("autosp")})
    with pytest.raises(ArtifactError) as caught:
        check_operators(program.for_rank(0), manifest)
    used = {instr.op for instr in program.instrs() if instr.op.startswith(("aten", "autosp"))}
    assert len(caught.value.problems) == len(used)
    assert {problem.code for problem in caught.value.problems} == {"operator-refused", "operator-changed"}


def test_what_the_build_says_of_its_operators_holds_here(tiny, tiny2):
    for artifact in (tiny, tiny2):
        check_operators(artifact.program.for_rank(0), artifact.manifest)
