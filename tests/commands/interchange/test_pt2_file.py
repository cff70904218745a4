"""A `.pt2` file loads where this package is not, and gives the same numbers."""

import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from autosp_aot.commands.build.builder import build
from autosp_aot.commands.check.proof import check
from autosp_aot.commands.cli import main
from autosp_aot.commands.interchange.pt2_file import write_pt2
from autosp_aot.errors import ArtifactError
from autosp_aot.ir.operators import DTYPES
from autosp_aot.ops.random import step_seed
from autosp_aot.runtime.comm import present_target
from autosp_aot.runtime.simulate import simulate
from examples import plain
from tests.architectures import ARCHITECTURES, GPT2, Case
from tests.eager import eager
from tests.steps import worst

# What someone runs who has torch and the files, and no autosp_aot.
LOAD = """
import sys
sys.modules["autosp_aot"] = None
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

rank, ranks, artifact, given, found = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{found}.store", rank=int(rank), world_size=int(ranks))
program = torch.export.load(f"{artifact}.rank{rank}.pt2").module()
program.load_state_dict(load_file(f"{artifact}/weights/model.safetensors"), assign=True)
save_file(program(**load_file(given)), f"{found}.{rank}")
"""


def export(path, *options):
    arguments = ["export", str(path), "--format", "pt2", *map(str, options)]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def results(path, given, *options):
    """What the only rank's file gives for its artifact's weights."""
    file = export(path, *options).stdout.strip()
    program = torch.export.load(file).module()
    program.load_state_dict(load_file(path / "weights/model.safetensors"), assign=True)
    return program(**given)


def ones(artifact):
    """The tangent of an artifact's step, and where it has one its guess, by keyword."""
    entries = [entry for entry in artifact.program.inputs if entry.kind in ("tangent", "guess")]
    return {e.value.name.replace(".", "_"): torch.ones((), dtype=DTYPES[e.value.dtype]) for e in entries}


@pytest.mark.parametrize("name, mask, options", [
    ("llama", "none", {"tile": 2, "offload": "host"}),
    ("mixtral", "none", {}),
    ("t5", "right", {"recompute": "full"}),
])  # fmt: skip
def test_a_file_for_one_rank_gives_eager_s_numbers(name, mask, options, tmp_path):
    architecture, batch = ARCHITECTURES[name], Case(name, mask, "half", 13, 1).batch()
    artifact = build(architecture.build(), batch, 1, tmp_path / "a.sp1", target="cpu", **options)
    reference = architecture.build()
    reference.config._experts_implementation = "eager"
    assert worst(eager(reference, batch), [results(tmp_path / "a.sp1", batch | ones(artifact))]) <= architecture.limit


def test_files_of_two_ranks_meet_where_this_package_is_not(tmp_path):
    torch.manual_seed(0)
    model, batch = plain.build_model(64, 24, 1, 3, 1, 16, dtype="float64"), Case("", "none", "half", 13, 2).batch()
    path, given, found = tmp_path / "a.sp2", tmp_path / "given", tmp_path / "found"
    save_file(batch | ones(build(model, batch, 2, path, target="cpu")), given)
    assert [export(path, "--rank", rank).exit_code for rank in range(2)] == [0, 0]
    arguments = [[str(rank), "2", str(path), str(given), str(found)] for rank in range(2)]
    processes = [subprocess.Popen([sys.executable, "-c", LOAD, *mine], cwd=tmp_path) for mine in arguments]
    assert [process.wait() for process in processes] == [0, 0]
    assert worst(eager(model, batch), [load_file(f"{found}.{rank}") for rank in range(2)]) <= 1e-12


def test_what_is_drawn_follows_from_the_seed_and_an_evaluation_draws_nothing(tmp_path):
    torch.manual_seed(0)
    architecture, batch = ARCHITECTURES["gpt2"], Case("gpt2", "none", "all", 13, 1).batch()
    model = architecture.model(architecture.config(**GPT2 | {"resid_pdrop": 0.1, "attn_pdrop": 0.1})).double()
    artifact = build(model, batch, 1, tmp_path / "a.sp1", target="cpu")
    given = batch | ones(artifact) | {"seed": step_seed(3, 5)}
    inputs = artifact.weights | artifact.buffers | given
    wanted = simulate([artifact.program.for_rank(0)], inputs, given["grad_loss"])[0]
    (loss,) = results(tmp_path / "a.sp1", batch, "--evaluation").values()
    assert torch.equal(loss, model.eval()(**batch).loss)
    found = results(tmp_path / "a.sp1", given)
    assert all(torch.equal(found[label], tensor) for label, tensor in wanted.items())


def test_weights_are_asked_for_by_name_and_shape(tiny2, tmp_path):
    path = tiny2.save(tmp_path / "a.sp2")
    assert export(path).exit_code == 0
    program = torch.export.load(f"{path}.rank0.pt2").module()
    values = {spec.name: torch.ones(spec.shape, dtype=torch.float64) for spec in tiny2.manifest.parameters}
    assert set(program.state_dict()) == set(values)
    assert all(bool(tensor.isnan().all()) for tensor in program.state_dict().values())
    missing = next(iter(values))
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        program.load_state_dict({name: tensor for name, tensor in values.items() if name != missing}, assign=True)
    with pytest.raises(RuntimeError, match=f"size mismatch for {missing}"):
        program.load_state_dict(values | {missing: torch.ones(1)}, assign=True)


def test_no_weights_and_no_path_of_this_machine_are_in_the_file(tiny2, tmp_path):
    path = tiny2.save(tmp_path / "a.sp2")
    result = export(path, "--rank", 1)
    file = tmp_path / "a.sp2.rank1.pt2"
    assert (result.exit_code, result.stdout) == (0, f"{file}\n")
    with zipfile.ZipFile(file) as archive:
        texts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    assert texts["data/sample_inputs/model.pt"] == b"", "no pickle"
    assert {len(text) for name, text in texts.items() if name.startswith("data/weights/weight_")} == {8}
    assert b"autosp_aot/" not in texts["models/model.json"] and b"site-packages" not in texts["models/model.json"]
    check(path)


def test_a_target_that_is_not_here_is_refused(tiny2, tmp_path):
    other = "cuda" if present_target() != "cuda" else "rocm"
    manifest = replace(tiny2.manifest, config=replace(tiny2.manifest.config, target=other))
    with pytest.raises(ArtifactError, match=f"wrong-device.*the artifact is for {other}"):
        write_pt2(tiny2.program.for_rank(0), manifest, 0, tmp_path, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())
