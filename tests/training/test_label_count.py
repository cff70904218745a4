"""The number of labels that count, where the loss reads them, over all batches of a step."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer

from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build
from autosp_aot.errors import ArtifactError
from autosp_aot.training.data import open_feed
from autosp_aot.training.label_count import is_items, open_items
from autosp_aot.training.learning_rate import Schedule
from autosp_aot.training.loop import Training
from tests import training_runs as runs

ITEMS = {"num_items_in_batch": torch.tensor(1)}
COUNT = 6


def batches() -> dict[str, torch.Tensor]:
    """6 micro-batches, the first of which has labels for one position, the first of a row among the rest."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(runs.VOCABULARY, (COUNT * runs.ROWS, runs.LENGTH), generator=draw)
    labels = ids.clone()
    labels[: runs.ROWS, 2:] = labels[0] = labels[3, :5] = -100
    return {"input_ids": ids, "labels": labels}


def rows(number: int) -> dict[str, torch.Tensor]:
    return {name: tensor.split(runs.ROWS)[number] for name, tensor in batches().items()}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    return {sp: runs.artifact(runs.model(), sp, folder / f"llama.sp{sp}", **ITEMS) for sp in (1, 2)}


def test_it_is_what_transformers_trainer_counts(artifacts):
    """Its own method, on a stand-in for a Trainer, which needs accelerate to exist."""
    one = lambda: 1  # noqa: E731
    trainer = SimpleNamespace(
        model_accepts_loss_kwargs=True, compute_loss_func=None, _loss_shifts_labels=True,
        args=SimpleNamespace(average_tokens_across_devices=True, world_size=1, n_gpu=0),
        get_tp_size=one, get_cp_size=one, get_sp_size=one,
    )  # fmt: skip
    items = open_items(artifacts[1], read_manifest(artifacts[1]))
    for number in range(COUNT):
        expected = Trainer._get_num_items_in_batch(trainer, [rows(number)], torch.device("cpu"))
        assert items.count(rows(number)) == expected
    assert items.count(rows(0)) == 1


@pytest.mark.parametrize("dp, sp, accumulate, zero", [(1, 1, 6, 0), (3, 1, 2, 1), (2, 2, 3, 1)])
def test_a_step_weighs_every_label_alike(artifacts, tmp_path, dp, sp, accumulate, zero):
    """Not every micro-batch: the first has one label."""
    save_file(batches(), tmp_path / "batch")
    training = Training(
        artifacts[sp], 20, dp, accumulate, Schedule(3e-3), zero, clip=0.2, metrics=tmp_path / "m.jsonl"
    )
    inputs = tuple(entry for entry in read_manifest(artifacts[sp]).batch if not is_items(entry))
    found, states = runs.trained(training, sp, open_feed(inputs, 0, None, tmp_path / "batch", COUNT))
    model = runs.model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    labels = (batches()["labels"][:, 1:] != -100).sum()
    for row in found:
        loss = sum(model(**rows(number), num_items_in_batch=labels).loss for number in range(COUNT))
        loss.backward()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(nn.utils.clip_grad_norm_(model.parameters(), 0.2).item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert (states[0][name] - parameter).norm() <= 1e-5 * parameter.norm(), name


class Classifier(nn.Module):
    """Labels that are not shifted, and another that does not count. `heads` cross entropies."""

    def __init__(self, heads: int):
        super().__init__()
        self.table, self.heads = nn.Embedding(8, 8), heads

    def forward(self, input_ids, labels, num_items_in_batch):
        scores = self.table(input_ids).flatten(0, 1)
        loss = sum(
            F.cross_entropy(scores, labels.flatten() * (head + 1), ignore_index=7, reduction="sum")
            for head in range(self.heads)
        )
        return loss / num_items_in_batch


def classifier(heads: int, path):
    ids = {name: torch.zeros(1, 4, dtype=torch.int64) for name in ("input_ids", "labels")}
    return build(Classifier(heads), ids | ITEMS, 1, target="cpu").save(path)


def test_labels_count_that_the_loss_reads(tmp_path):
    path = classifier(1, tmp_path / "a")
    items = open_items(path, read_manifest(path))
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "labels": torch.tensor([[7, 1, 7, 2]])}
    assert items.count(batch) == 2
    assert torch.equal(items.filled(batch, torch.tensor(5))["num_items_in_batch"], torch.tensor(5))


def test_several_losses_with_labels_of_their_own_are_refused(tmp_path):
    path = classifier(2, tmp_path / "a")
    with pytest.raises(ArtifactError) as caught:
        open_items(path, read_manifest(path))
    (problem,) = caught.value.problems
    assert (problem.code, problem.why) == (
        "items-unknown", "it has 2 cross entropies whose labels differ; it should have one"
    )  # fmt: skip


def test_a_model_without_that_input_counts_nothing(tmp_path):
    path = runs.artifact(runs.model(), 1, tmp_path / "a")
    assert open_items(path, read_manifest(path)) is None
