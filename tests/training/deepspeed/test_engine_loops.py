"""DeepSpeed engines in loops that are not the plain one: forwards without steps, sums for averages, and `run`'s."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch.nn import functional

import autosp_aot
from autosp_aot.commands.cli import main
from tests.processes import command, json_lines, run_ranks
from tests.training.deepspeed.replicas import LR, config, micro_batches, model

SCRIPT = Path(__file__).with_name("deepspeed_loops.py")


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(8, 8)

    def forward(self, input_ids, labels, num_items_in_batch):
        scores = functional.dropout(self.table(input_ids), 0.5).flatten(0, 1)
        return functional.cross_entropy(scores, labels.flatten(), reduction="sum") / num_items_in_batch


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What 2 replicas of such a model, at 2 micro-batches a step by SGD, print."""
    tmp_path = tmp_path_factory.mktemp("loops")
    ids = torch.arange(18).view(2, 9) % 8
    batch = {"input_ids": ids, "labels": ids.flip(1), "num_items_in_batch": torch.tensor(72)}
    path = autosp_aot.build(Dropping(), batch, 1, target="cpu").save(tmp_path / "artifact")
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "zero_allow_untested_optimizer": True}
    (tmp_path / "ds.json").write_text(json.dumps(config(zero=1, accumulate=2, clip=0.0) | sgd))
    save_file(batch, tmp_path / "batch.safetensors")
    ranks = run_ranks(2, SCRIPT, path, tmp_path / "ds.json", tmp_path / "batch.safetensors")
    return [json_lines(rank)[0] for rank in ranks]


def test_forwards_between_two_steps_draw_each_their_own(found):
    drawn = [loss for rank in found for loss in rank["drawn"]]
    assert len(set(drawn)) == len(drawn) == 6


def test_labels_weigh_alike_where_replicas_are_summed(found):
    assert found[0]["sums"] == pytest.approx(found[0]["means"], rel=1e-6)


def test_run_counts_micro_batches_where_the_config_leaves_that_to_the_loop(tmp_path):
    autosp_aot.build(model(), micro_batches(1)[0], 1, tmp_path / "artifact", target="cpu")
    own = config(zero=1, accumulate=3, clip=0.0, epsilon=1e-8) | {"managed_gradient_accumulation": False}
    del own["compile"]
    (tmp_path / "ds.json").write_text(json.dumps(own))
    shared = ["run", tmp_path / "artifact", "--steps", 2, "--metrics"]
    result = command(*shared, tmp_path / "a", "--deepspeed", tmp_path / "ds.json")
    assert result.returncode == 0, result.stderr
    options = ["--accumulate", 3, "--lr", LR, "--weight-decay", 0.1]
    CliRunner().invoke(main, [*map(str, [*shared, tmp_path / "b", *options])], catch_exceptions=False)
    rows = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "ab"]
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in rows[0]] == pytest.approx([row[key] for row in rows[1]], rel=1e-6)
