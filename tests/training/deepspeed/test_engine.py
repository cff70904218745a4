"""Real DeepSpeed engines on CPU ranks, against eager training on one device."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import autosp_aot
from autosp_aot.commands.cli import main
from autosp_aot.runtime.comm import Group
from tests.processes import json_lines, run_ranks
from tests.training.deepspeed.replicas import DECAY, LR, config, error, micro_batches, model, reference, steps

RUNS = [{"zero": z, "accumulate": a, "clip": c} for z, a, c in product((0, 1, 2), (1, 3), (0.0, 0.3))]
SCRIPT, DRAWS = (Path(__file__).with_name(name) for name in ("deepspeed_runs.py", "deepspeed_draws.py"))


def trained(
    tmp_path, sp: int, dp: int, dtype: str, runs: list[dict], items: bool = False
) -> list[dict[str, torch.Tensor]]:
    autosp_aot.build(model(dtype), steps(1, items)[0][0], sp, tmp_path / "artifact", target="cpu")
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    run_ranks(dp * sp, SCRIPT, tmp_path / "artifact", tmp_path / "runs.json", tmp_path)
    return [load_file(tmp_path / f"{number}.safetensors") for number in range(len(runs))]


@pytest.mark.parametrize("dp, sp", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_losses_and_parameters_after_20_steps_are_those_of_one_device(tmp_path, dp, sp):
    for run, found in zip(RUNS, trained(tmp_path, sp, dp, "float32", RUNS)):
        assert error(found, reference(run["accumulate"] * dp, run["clip"])) < 1e-5, run


def test_bf16_is_as_near_to_fp32_as_eager_bf16_with_fp32_masters(tmp_path):
    runs = [{"zero": zero, "accumulate": 3, "clip": 0.3} for zero in (0, 1, 2)]
    fp32, eager = reference(6, 0.3), reference(6, 0.3, "bfloat16")
    for run, found in zip(runs, trained(tmp_path, 2, 2, "bfloat16", runs)):
        assert error(found, fp32) < 2 * error(eager, fp32), run


def test_every_label_weighs_alike_where_the_model_takes_their_number(tmp_path):
    runs = [{"zero": zero, "accumulate": 3, "clip": 0.3} for zero in (0, 1, 2)]
    expected = reference(6, 0.3, items=True)
    assert error(reference(6, 0.3), expected) > 1e-3
    for run, found in zip(runs, trained(tmp_path, 2, 2, "float32", runs, items=True)):
        assert error(found, expected) < 1e-5, run


def command(*args) -> Result:
    return CliRunner().invoke(main, [*map(str, args)], catch_exceptions=False)


def test_run_with_a_config_is_run_with_options(tmp_path):
    autosp_aot.build(model(), micro_batches(1)[0], 1, tmp_path / "artifact", target="cpu")
    (tmp_path / "ds.json").write_text(json.dumps(config(zero=1, accumulate=3, clip=0.3, epsilon=1e-8)))
    shared = ["run", tmp_path / "artifact", "--steps", 4]
    options = ["--lr", LR, "--weight-decay", DECAY, "--accumulate", 3, "--clip", 0.3, "--metrics", tmp_path / "a"]
    options = [*options, "--save", tmp_path / "plain"]
    engine = ["--deepspeed", tmp_path / "ds.json", "--metrics", tmp_path / "b", "--save", tmp_path / "saved"]
    for said in (options, engine):
        result = command(*shared, *said)
        assert result.exit_code == 0, result.stderr
    rows = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "ab"]
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in rows[0]] == pytest.approx([row[key] for row in rows[1]], rel=1e-6)
    saved, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "plain"))
    assert all(torch.allclose(saved[name], plain[name], rtol=1e-5, atol=1e-7) for name in plain)


def test_options_that_the_config_says_are_refused_beside_it(tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    result = command("run", tmp_path, "--deepspeed", tmp_path / "ds.json", "--clip", 1, "--min-lr", 0)
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
