"""Real processes over gloo: few, since each start takes seconds."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from autosp_aot.artifact_read import read_manifest
from autosp_aot.builder import build
from autosp_aot.runtime.data import open_feed
from examples import plain

TINY = {"vocab_size": 8, "hidden_size": 4, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 8, "dtype": "float64"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """For 2 ranks, which share 5 positions unevenly."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("artifact") / "plain.sp2"
    build(plain.build_model(**TINY), plain.example_batch(2, 5), 2, path, target="cpu")
    return path


@pytest.fixture
def model(artifact):
    model = plain.build_model(**TINY)
    model.load_state_dict(load_file(artifact / "weights" / "model.safetensors"))
    return model


def run(*args):
    command = [sys.executable, "-c", "from autosp_aot.cli import main; main()", "run", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_two_ranks_train_as_one_device_does(artifact, model, tmp_path):
    result = run(artifact, "--steps", 10, "--lr", 0.01, "--metrics", tmp_path / "m.jsonl")
    assert result.returncode == 0, result.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    feed = open_feed(read_manifest(artifact).batch, 0, None, None)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    expected = []
    for step in range(10):
        optimizer.zero_grad()
        loss = model(**feed.at(step))
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 10


def test_dump_holds_the_loss_and_every_gradient_of_eager(artifact, model, tmp_path):
    labels = torch.tensor([[-100, -100, -100, 1, 2], [3, 4, 5, 6, 7]])
    batch = {"input_ids": torch.arange(10).view(2, 5) % 8, "labels": labels}
    save_file(batch, tmp_path / "batch")
    result = run(artifact, "--batch-file", tmp_path / "batch", "--dump", tmp_path / "dump")
    assert result.returncode == 0, result.stderr
    dump = load_file(tmp_path / "dump")
    loss = model(**batch)
    loss.backward()
    gradients = {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    assert set(dump) == {"loss", *gradients}
    floor = 1e-4 * (sum(g.norm() ** 2 for g in gradients.values()) / len(gradients)) ** 0.5
    assert abs(dump["loss"] - loss) < 1e-12 * abs(loss)
    assert max((dump[n] - g).norm() / max(g.norm(), floor) for n, g in gradients.items()) < 1e-12


def test_the_error_of_a_rank_is_the_only_thing_said(artifact, tmp_path):
    save_file({"tokens.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    result = run(artifact, "--init-from", tmp_path / "weights.safetensors")
    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr.startswith("error[weights-mismatch]") and result.stderr.count("error[") == 1
    assert "Traceback" not in result.stderr and "torch" not in result.stderr.replace("torch.float", "")


def test_a_rank_that_breaks_stops_all_of_them(artifact, tmp_path):
    """Rank 0 cannot write the dump to a folder; rank 1 loses its peer. Named is the rank whose end is seen first."""
    (tmp_path / "dump").mkdir()
    code = (
        "from pathlib import Path\n"
        "from autosp_aot.runtime.launch import run\n"
        "from autosp_aot.runtime.train import Training\n"
        f"run(Training(Path({str(artifact)!r}), dump=Path({str(tmp_path / 'dump')!r})), None, None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert re.search(r"error\[rank-failed\]: rank [01] ended", result.stderr)
