"""Real DeepSpeed engines on CPU ranks, against eager training on one device."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import autosp_aot
from autosp_aot.commands.cli import main
from autosp_aot.runtime.comm import Group
from tests.processes import command, json_lines, run_ranks
from tests.training.deepspeed.replicas import DECAY, LR, config, error, micro_batches, model, reference, steps

SCRIPT, DRAWS = (Path(__file__).with_name(name) for name in ("deepspeed_runs.py", "deepspeed_draws.py"))
SHAPES = [(1, 1), (1, 4), (2, 2), (4, 1)]  # replicas, and ranks that share sequences
CLIPPED = [{"zero": zero, "accumulate": 3, "clip": 0.3} for zero in (0, 1, 2)]


def paired(shape: tuple[int, int]) -> list[dict]:
    """Every two of shape, ZeRO stage, accumulation and clipping meet in some run."""
    others = list(product((1, 3), (0.0, 0.3)))
    return [
        {"zero": zero, "accumulate": accumulate, "clip": clip}
        for zero in (0, 1, 2)
        for accumulate, clip in [others[(SHAPES.index(shape) + zero) % len(others)]]
    ]


# Runs by replicas, ranks that share sequences, dtype, and whether the model takes the number of labels.
RUNS = {(*shape, "float32", False): paired(shape) for shape in SHAPES}
RUNS |= {(2, 2, "bfloat16", False): CLIPPED, (2, 2, "float32", True): CLIPPED}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[tuple, list[dict[str, torch.Tensor]]]:
    """Losses and parameters of all runs: those of as many ranks are in the same processes."""
    found = {}
    for ranks in (1, 4):
        out, runs, kinds = tmp_path_factory.mktemp(f"ranks{ranks}"), [], [k for k in RUNS if k[0] * k[1] == ranks]
        for dp, sp, dtype, items in kinds:
            path = out / f"{dtype}.{items}.sp{sp}"
            autosp_aot.build(model(dtype), steps(1, items)[0][0], sp, path, target="cpu", eager_check=False)
            runs += [{"artifact": str(path), **run} for run in RUNS[dp, sp, dtype, items]]
        (out / "runs.json").write_text(json.dumps(runs))
        run_ranks(ranks, SCRIPT, out / "runs.json", out, timeout_s=900)
        results = (load_file(out / f"{number}.safetensors") for number in range(len(runs)))
        found |= {kind: [next(results) for _ in RUNS[kind]] for kind in kinds}
    return found


@pytest.mark.parametrize("dp, sp", SHAPES)
def test_losses_and_parameters_after_20_steps_are_those_of_one_device(trained, dp, sp):
    for run, found in zip(RUNS[dp, sp, "float32", False], trained[dp, sp, "float32", False], strict=True):
        assert error(found, reference(run["accumulate"] * dp, run["clip"])) < 1e-5, run


def test_bf16_is_as_near_to_fp32_as_eager_bf16_with_fp32_masters(trained):
    fp32, eager = reference(6, 0.3), reference(6, 0.3, "bfloat16")
    for run, found in zip(CLIPPED, trained[2, 2, "bfloat16", False], strict=True):
        assert error(found, fp32) < 2 * error(eager, fp32), run


def test_every_label_weighs_alike_where_the_model_takes_their_number(trained):
    expected = reference(6, 0.3, items=True)
    assert error(reference(6, 0.3), expected) > 1e-3
    for run, found in zip(CLIPPED, trained[2, 2, "float32", True], strict=True):
        assert error(found, expected) < 1e-5, run


def test_run_with_a_config_is_run_with_options(tmp_path):
    autosp_aot.build(model(), micro_batches(1)[0], 1, tmp_path / "artifact", target="cpu")
    (tmp_path / "ds.json").write_text(json.dumps(config(zero=1, accumulate=3, clip=0.3, epsilon=1e-8)))
    shared = ["run", tmp_path / "artifact", "--steps", 4]
    options = ["--lr", LR, "--weight-decay", DECAY, "--accumulate", 3, "--clip", 0.3, "--metrics", tmp_path / "a"]
    options = [*options, "--save", tmp_path / "plain"]
    engine = ["--deepspeed", tmp_path / "ds.json", "--metrics", tmp_path / "b", "--save", tmp_path / "saved"]
    result = command(*shared, *engine)  # DeepSpeed patches the process that it is in
    assert result.returncode == 0, result.stderr
    CliRunner().invoke(main, [*map(str, [*shared, *options])], catch_exceptions=False)
    rows = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "ab"]
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in rows[0]] == pytest.approx([row[key] for row in rows[1]], rel=1e-6)
    saved, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "plain"))
    assert all(torch.allclose(saved[name], plain[name], rtol=1e-5, atol=1e-7) for name in plain)


def test_options_that_the_config_says_are_refused_beside_it(tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    said = ["run", tmp_path, "--deepspeed", tmp_path / "ds.json", "--clip", 1, "--min-lr", 0]
    result = CliRunner().invoke(main, [*map(str, said)], catch_exceptions=False)
    assert result.exit_code == 2
    assert "--min-lr, --clip and --deepspeed exclude each other" in result.stderr


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(8, 64)

    def forward(self, input_ids):
        return torch.nn.functional.dropout(self.table(input_ids), 0.5, self.training).square().mean()


def test_what_is_drawn_follows_from_the_number_of_the_micro_batch_since_the_first_step(tmp_path):
    torch.manual_seed(0)
    ids = torch.arange(18).view(2, 9) % 8
    model = Dropping()
    path = autosp_aot.build(model, {"input_ids": ids}, 1, target="cpu").save(tmp_path / "artifact")
    still = config(zero=1, accumulate=2, clip=0.0)
    still["optimizer"]["params"]["lr"] = 0.0
    (tmp_path / "ds.json").write_text(json.dumps(still))
    save_file({"input_ids": ids}, tmp_path / "batch.safetensors")
    results = run_ranks(2, DRAWS, path, tmp_path / "ds.json", tmp_path / "batch.safetensors", tmp_path / "saved")
    module = autosp_aot.load(path, comm=Group(0, 1, torch.device("cpu")))
    losses = [float(module(input_ids=ids).detach()) for _ in range(8)]
    assert [json_lines(result)[0]["losses"] for result in results] == [losses[0::2], losses[1::2]]
    for result in results:
        assert json_lines(result)[0]["evaluated"] == pytest.approx(model.eval()(ids).item(), rel=1e-6)
