"""The training script of examples/deepspeed, before and after, as real ranks."""

import difflib
import re

import pytest
import torch
from safetensors.torch import load_file

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import build_file
from examples import llama
from tests.processes import ROOT, run_ranks

FOLDER = ROOT / "examples" / "deepspeed"
BEFORE, AFTER = FOLDER / "before.py", FOLDER / "after.py"
SP, LENGTH, ROWS = 2, 13, 2


def test_after_differs_from_before_in_at_most_five_lines():
    lines = [path.read_text().splitlines() for path in (BEFORE, AFTER)]
    changed = [line for line in difflib.ndiff(*lines) if line[0] in "-+" and line[2:].strip()]
    removed = [line for line in changed if line[0] == "-"]
    assert max(len(removed), len(changed) - len(removed)) <= 5


def test_both_give_the_same_losses_and_parameters(tmp_path):
    """2 replicas on 2 ranks, and on 4 that share sequences in pairs; the schedule of ds.json ends with the 10 steps."""
    torch.manual_seed(0)
    model = llama.build_model(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "tiny")
    build_file(
        FOLDER / "model.py", BuildConfig(SP, "cpu"), LENGTH, ROWS, {"folder": str(tmp_path / "tiny")},
        tmp_path / f"tiny.sp{SP}", weights=False,
    )  # fmt: skip
    losses = {}
    for script, ranks in ((BEFORE, 2), (AFTER, 2 * SP)):
        said = ["--model", tmp_path / "tiny", "--data", ROOT / "README.md", "--out", tmp_path / script.stem]
        rank, *_ = run_ranks(ranks, script, *said, "--length", LENGTH)
        losses[script] = [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", rank.stdout, re.MULTILINE)]
    assert len(losses[BEFORE]) == 10
    assert losses[AFTER] == pytest.approx(losses[BEFORE], rel=1e-5)
    before, after = (load_file(tmp_path / script.stem / "model.safetensors") for script in (BEFORE, AFTER))
    assert before.keys() == after.keys()
    for name, parameter in before.items():
        assert (after[name] - parameter).norm() <= 1e-5 * parameter.norm(), name
    configs = [(tmp_path / script.stem / "config.json").read_text() for script in (BEFORE, AFTER)]
    assert configs[0] == configs[1]
