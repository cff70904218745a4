"""Real processes over gloo: few, since each start takes seconds."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch.nn.utils import clip_grad_norm_

from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build
from autosp_aot.commands.cli import main
from autosp_aot.training.data import open_feed
from autosp_aot.training.learning_rate import Schedule
from examples import plain
from tests.processes import command

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


def run(*args) -> Result:
    """The launcher in this process; ranks are processes of their own."""
    return CliRunner().invoke(main, ["run", *map(str, args)], catch_exceptions=False)


def test_two_replicas_of_two_ranks_train_and_save_what_one_device_does(artifact, model, tmp_path):
    options = ["--dp", 2, "--zero", 1, "--accumulate", 2, "--clip", 1, "--weight-decay", 0.1, "--lr", 0.01]
    options += ["--schedule", "linear", "--warmup", 2, "--min-lr", 0.001]
    files = ["--save", tmp_path / "saved", "--metrics", tmp_path / "m.jsonl"]
    result = run(artifact, "--steps", 6, *options, *files)
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    feed, schedule = open_feed(read_manifest(artifact).batch, 0, None, None), Schedule(0.01, "linear", 6, 2, 0.001)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for step, row in enumerate(rows):
        losses = [model(**feed.at(4 * step + number)) for number in range(4)]
        sum(losses).div(4).backward()
        optimizer.param_groups[0]["lr"] = schedule.at(step)
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected = (torch.stack(losses).mean().item(), norm.item(), schedule.at(step))
        assert (row["loss"], row["grad_norm"], row["lr"]) == pytest.approx(expected, rel=1e-9)
    assert len(rows) == 6 and norm > 1
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    torch.testing.assert_close(saved, dict(model.named_parameters()), rtol=1e-7, atol=1e-9)


def test_what_would_stop_a_run_at_its_end_stops_it_before(artifact, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "mine.txt").write_text("not weights")
    result = run(artifact, "--save", tmp_path / "saved")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error[output-exists]")
    result = run(artifact, "--save", tmp_path / "saved" / "mine.txt" / "x")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error[output-unwritable]")


def test_what_is_no_file_is_not_replaced_by_gradients(artifact, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    result = run(artifact, "--dump", tmp_path / "pipe")
    assert result.exit_code == 2 and result.stderr.startswith("error[output-unwritable]: --dump ")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("option", ["--metrics", "--dump"])
def test_a_file_in_the_artifact_is_refused(artifact, option):
    result = run(artifact, option, artifact / "file")
    assert result.exit_code == 2 and result.stderr.startswith(f"error[output-inside]: {option} ")
    read_manifest(artifact)


def test_fp16_without_a_scaled_loss_is_refused(tmp_path):
    build(plain.build_model(**TINY | {"dtype": "float16"}), plain.example_batch(2, 5), 1, tmp_path / "a", target="cpu")
    result = run(tmp_path / "a")
    assert result.exit_code == 3 and result.stderr.startswith("error[no-loss-scaling]")


def test_dump_holds_the_loss_and_every_gradient_of_eager(artifact, model, tmp_path):
    labels = torch.tensor([[-100, -100, -100, 1, 2], [3, 4, 5, 6, 7]])
    batch = {"input_ids": torch.arange(10).view(2, 5) % 8, "labels": labels}
    save_file(batch, tmp_path / "batch")
    result = run(artifact, "--batch-file", tmp_path / "batch", "--dump", tmp_path / "dump")
    assert result.exit_code == 0, result.stderr
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
    result = command("run", artifact, "--init-from", tmp_path / "weights.safetensors")
    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr.startswith("error[weights-mismatch]") and result.stderr.count("error[") == 1
    assert "Traceback" not in result.stderr and "torch" not in result.stderr.replace("torch.float", "")


KILLS_A_RANK = """
import multiprocessing, threading, time
from pathlib import Path
from autosp_aot.training.launch import run
from autosp_aot.training.loop import Training

def kill():
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.05)
    multiprocessing.active_children()[0].kill()

threading.Thread(target=kill, daemon=True).start()
run(Training(Path({artifact!r}), steps=10**9), None, None)
"""


def test_a_rank_that_breaks_stops_all_of_them(artifact):
    """One is killed, the other loses its peer. Named is the rank whose end is seen first."""
    code = KILLS_A_RANK.format(artifact=str(artifact))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert re.search(r"error\[rank-failed\]: rank [01] ended", result.stderr)
