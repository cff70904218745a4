import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build
from autosp_aot.runtime.comm import Group, Mesh
from autosp_aot.runtime.load import load
from autosp_aot.runtime.module import StepState
from autosp_aot.training.data import open_feed
from autosp_aot.training.learning_rate import Schedule
from autosp_aot.training.loop import Training, train
from examples import plain
from tests.training_runs import trained

TINY = {"vocab_size": 8, "hidden_size": 4, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 8, "dtype": "float64"}
ALONE = Mesh(Group(0, 1, torch.device("cpu")), Group(0, 1, torch.device("cpu")))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("artifact") / "plain.sp1"
    build(plain.build_model(**TINY), plain.example_batch(2, 4), 1, path, target="cpu")
    return path


@pytest.fixture
def model(artifact):
    model = plain.build_model(**TINY)
    model.load_state_dict(load_file(artifact / "weights" / "model.safetensors"))
    return model


def random_tokens(artifact):
    return open_feed(read_manifest(artifact).batch, 0, None, None)


def test_every_step_is_a_line_and_a_json_line(artifact, tmp_path, capsys):
    training = Training(artifact, steps=3, schedule=Schedule(0.5), metrics=tmp_path / "m.jsonl")
    train(training, random_tokens(artifact), ALONE)
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line.split()[:2] for line in lines] == [["step", "1"], ["step", "2"], ["step", "3"]]
    assert all(list(row) == ["step", "loss", "grad_norm", "lr", "tokens_per_s"] for row in rows)
    assert [(row["step"], row["lr"]) for row in rows] == [(1, 0.5), (2, 0.5), (3, 0.5)]


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 64)

    def forward(self, input_ids):
        return nn.functional.dropout(self.table(input_ids), 0.5).square().mean()


@pytest.mark.parametrize("seed", [0, 7])
def test_a_step_draws_by_the_seed_and_its_number(tmp_path, seed):
    batch = {"input_ids": torch.arange(8).reshape(1, 8)}
    path = build(Dropping(), batch, 1, target="cpu").save(tmp_path / "dropping.sp1")
    save_file(batch, tmp_path / "batch")
    feed = open_feed(read_manifest(path).batch, seed, None, tmp_path / "batch")
    train(Training(path, steps=3, schedule=Schedule(0.0), metrics=tmp_path / "m.jsonl", seed=seed), feed, ALONE)
    module = load(path, comm=ALONE.sequence)
    module.step_state = StepState(seed, 1)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert len(set(losses)) == 3 and [float(module(**batch).detach()) for _ in range(2)] == losses[1:]


def test_micro_batches_draw_alike_however_a_step_is_shared_out(tmp_path):
    path = build(Dropping(), {"input_ids": torch.arange(8).reshape(1, 8)}, 1, target="cpu").save(tmp_path / "a")
    feed, losses = random_tokens(path), []
    for dp, accumulate in ((1, 4), (2, 2), (4, 1)):
        training = Training(path, 2, dp, accumulate, metrics=tmp_path / "m.jsonl")
        losses.append([row["loss"] for row in trained(training, 1, feed)[0]])
    assert all(found == pytest.approx(losses[0], rel=1e-6) for found in losses)
    assert abs(losses[0][0] - losses[0][1]) > 1e-4 * losses[0][0]


def test_the_gradient_norm_is_that_of_all_gradients_together(artifact, model, tmp_path):
    feed = random_tokens(artifact)
    train(Training(artifact, steps=1, metrics=tmp_path / "m.jsonl"), feed, ALONE)
    model(**feed.at(0)).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert json.loads((tmp_path / "m.jsonl").read_text())["grad_norm"] == pytest.approx(float(whole), rel=1e-12)


def test_a_loss_that_is_not_finite_is_said_and_training_goes_on(artifact, tmp_path, capsys):
    labels = torch.full((2, 4), -100)
    save_file({"input_ids": torch.zeros(2, 4, dtype=torch.long), "labels": labels}, tmp_path / "batch")
    feed = open_feed(read_manifest(artifact).batch, 0, None, tmp_path / "batch")
    train(Training(artifact, steps=2, metrics=tmp_path / "m.jsonl"), feed, ALONE)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith("(not finite)") for line in lines)
    assert json.loads((tmp_path / "m.jsonl").read_text().splitlines()[0])["loss"] is None
