"""Evaluation in a run: the mean over the same held-out batches each time, in eval mode, whatever the replicas."""

import pytest
import torch
from safetensors.torch import save_file

from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build
from autosp_aot.errors import AutospError
from autosp_aot.training.data import open_feed
from autosp_aot.training.label_count import is_items
from autosp_aot.training.launch import run
from autosp_aot.training.learning_rate import Schedule
from autosp_aot.training.loop import Training
from examples import llama
from tests import training_runs as runs
from tests.training.test_label_count import ITEMS, batches, rows

BATCHES = 5


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    return {sp: runs.artifact(runs.model(), sp, folder / f"llama.sp{sp}") for sp in (1, 2)}


@pytest.mark.parametrize("dp, sp", [(1, 1), (2, 2), (3, 1)])
def test_every_so_many_steps_it_is_eager_s_mean_over_the_same_batches(artifacts, tmp_path, dp, sp):
    feed, held_out = (open_feed(read_manifest(artifacts[sp]).batch, seed, None, None) for seed in (0, 1))
    training = Training(
        artifacts[sp], 5, dp, 6 // dp, Schedule(3e-3), eval_every=2, eval_batches=BATCHES, metrics=tmp_path / "m.jsonl"
    )
    found, _ = runs.trained(training, sp, feed, held_out)
    model, expected = runs.model(), []
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(4):
        sum(model(**feed.at(6 * step + number)).loss / 6 for number in range(6)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            expected.append(sum(model(**held_out.at(number)).loss.item() for number in range(BATCHES)) / BATCHES)
    evaluations = [row for row in found if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [2, 4]
    assert [row["eval_loss"] for row in evaluations] == pytest.approx(expected, rel=1e-5)
    assert len(found) == 7 and abs(expected[0] - expected[1]) > 1e-4


def test_every_label_of_all_held_out_batches_weighs_alike(tmp_path):
    path = runs.artifact(runs.model(), 1, tmp_path / "a", **ITEMS)
    inputs = tuple(entry for entry in read_manifest(path).batch if not is_items(entry))
    save_file(batches(), tmp_path / "batch")
    feed = open_feed(inputs, 0, None, tmp_path / "batch", 6)
    training = Training(path, 1, 2, schedule=Schedule(0.0), eval_every=1, eval_batches=6, metrics=tmp_path / "m.jsonl")
    found, _ = runs.trained(training, 1, feed, feed)
    labels = (batches()["labels"][:, 1:] != -100).sum()
    expected = sum(runs.model()(**rows(number), num_items_in_batch=labels).loss.item() for number in range(6))
    assert found[1]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_it_leaves_training_as_it_is(artifacts, tmp_path):
    feed = runs.random_tokens(artifacts[1])
    found = []
    for every in (None, 1):
        training = Training(artifacts[1], 3, 1, eval_every=every, metrics=tmp_path / "m.jsonl")
        _, (state,) = runs.trained(training, 1, feed, feed)
        found.append(state)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_artifact_without_that_program_is_refused_before_training(tmp_path):
    path, batch = tmp_path / "a", llama.example_batch(runs.ROWS, runs.LENGTH)
    build(runs.model(), batch, 1, path, target="cpu", evaluation=False)
    with pytest.raises(AutospError, match="no-evaluation"):
        run(Training(path, eval_every=1), None, None)
