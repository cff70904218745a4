"""Host memory while a program runs: copies done at any time the text allows, buffers for every step under way."""

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import autosp_aot
from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import compile_model, model_values
from autosp_aot.commands.cli import main
from autosp_aot.errors import ArtifactError
from autosp_aot.ir.text import parse_program
from autosp_aot.runtime import host_pool
from autosp_aot.runtime.comm import Group
from autosp_aot.runtime.execute import Executor
from autosp_aot.runtime.host_pool import Direct
from autosp_aot.runtime.simulate import lockstep, simulate
from examples import plain
from tests.eager import difference, eager

CPU = torch.device("cpu")
SIZES = {"vocab_size": 8, "hidden_size": 8, "layers": 2, "heads": 2, "kv_heads": 1, "max_length": 8, "dtype": "float64"}


class Late(Direct):
    """A copy is done when it is waited for, and no earlier; until then there is rubbish."""

    def copy(self, target, source):
        target.fill_(float("nan"))
        return target, source

    def wait(self, ticket):
        target, source = ticket
        target.copy_(source)


def model():
    torch.manual_seed(0)
    return plain.build_model(**SIZES, tied=False)


def tokens(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(8, (2, 5), generator=generator) for name in ("input_ids", "labels")}


@pytest.fixture(scope="module")
def artifact():
    """For 1 rank, all that is worth it in host memory."""
    dims = {"input_ids": 1, "labels": 1}
    return compile_model(model(), plain.example_batch(2, 5), dims, BuildConfig(1, recompute="none", offload="host"), "")


@pytest.fixture
def load(artifact, tmp_path):
    """A new module of the artifact; its weights are the model's."""
    path = replace(artifact, weights=model_values(model())).save(tmp_path / "a")
    return lambda: autosp_aot.load(path, comm=Group(0, 1, CPU))


def equal_gradients(module, expected) -> bool:
    return all(torch.equal(p.grad, expected.get_parameter(name).grad) for name, p in module.named_parameters())


def test_copies_may_be_done_as_late_as_their_waits(monkeypatch, artifact):
    programs, inputs = [artifact.program.for_rank(0)], model_values(model()) | tokens(0)
    one = torch.ones((), dtype=torch.float64)
    (early,) = simulate(programs, inputs, one)
    monkeypatch.setitem(host_pool.LINKS, "cpu", Late)
    (late,) = simulate(programs, inputs, one)
    assert all(torch.equal(early[name], late[name]) for name in early)


def test_steps_one_after_the_other_use_the_memory_that_was_there_at_first(load, artifact):
    module = load()
    (buffer,) = module.executor.host.buffers
    assert buffer.memory.nbytes == artifact.manifest.step.costs.host_bytes > 0
    for seed in range(3):
        module(**tokens(seed)).backward()
    with torch.no_grad():
        module(**tokens(3))
    assert module.executor.host.buffers == [buffer] and not buffer.used


def test_two_losses_before_either_s_backward_do_not_share_memory(load):
    module, expected = load(), load()
    first, second = module(**tokens(0)), module(**tokens(1))
    first.backward()
    second.backward()
    for seed in range(2):
        expected(**tokens(seed)).backward()
    assert len(module.executor.host.buffers) == 2 and equal_gradients(module, expected)


def test_two_models_in_a_process_have_a_pool_each(load):
    module, other, expected = load(), load(), load()
    loss = module(**tokens(0))
    other(**tokens(1)).backward()
    loss.backward()
    expected(**tokens(0)).backward()
    assert equal_gradients(module, expected)


@pytest.mark.parametrize("tensor", [
    torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).t(), torch.arange(24.0).view(2, 3, 4).permute(1, 2, 0),
    torch.empty(0, 3), torch.tensor(1.0),
])  # fmt: skip
def test_what_comes_back_has_the_strides_of_what_went(tensor):
    shape = list(tensor.shape)
    program = parse_program(
        f"autosp program 1\nranks 1\nbatch %x: f32{shape} @ Replicate\nsection step takes ()\n"
        f"  %x.offload: f32{shape} @ Replicate = offload(%x, 64)\n"
        f"  %x.host: f32{shape} @ Replicate = wait(%x.offload, %x)\n"
        f"  %x.fetch: f32{shape} @ Replicate = fetch(%x.host)\n"
        f"  %x.back: f32{shape} @ Replicate = wait(%x.fetch, %x.host)\ngives (x=%x.back)\n", {},
    )  # fmt: skip
    (found,) = lockstep([Executor(program, 0, CPU).run("step", {"x": tensor})])
    assert torch.equal(found["x"], tensor) and found["x"].stride() == tensor.stride()
    assert found["x"].untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or not tensor.numel()


def test_too_little_host_memory_is_refused_before_a_step_runs():
    program = parse_program(
        "autosp program 1\nranks 1\nbatch %x: u8[1125899906842624] @ Replicate\nsection step takes ()\n"
        "  %x.offload: u8[1125899906842624] @ Replicate = offload(%x, 0)\n"
        "  %x.host: u8[1125899906842624] @ Replicate = wait(%x.offload, %x)\ngives ()\n", {},
    )  # fmt: skip
    with pytest.raises(ArtifactError) as caught:
        Executor(program, 0, CPU)
    assert str(caught.value).startswith(
        "error[host-memory]: 1125899906842624 bytes of host memory cannot be had for what a rank keeps there\n  why    "
    )
    assert str(caught.value).endswith("\n  fix    build with --offload off, or run on a host with more memory")


def test_two_real_ranks_train_to_the_gradients_of_eager(tmp_path):
    """Two processes over gloo, a step that dumps its gradients."""
    dims, config = {"input_ids": 1, "labels": 1}, BuildConfig(2, recompute="none", offload="host")
    built = compile_model(model(), plain.example_batch(2, 5), dims, config, "")
    assert built.manifest.step.costs.host_moved_bytes > 0
    path = replace(built, weights=model_values(model())).save(tmp_path / "a")
    save_file(tokens(0), tmp_path / "batch")
    command = ["run", path, "--batch-file", tmp_path / "batch", "--dump", tmp_path / "dump"]
    result = CliRunner().invoke(main, [*map(str, command)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    dump = load_file(tmp_path / "dump")
    gradients = {name.removeprefix("grad."): grad for name, grad in dump.items() if name != "loss"}
    assert difference(eager(model(), tokens(0)), dump["loss"], gradients) <= 1e-12
