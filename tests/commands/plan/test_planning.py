"""`autosp-aot plan`: what it prints and what it refuses."""

import functools
import json
import pickle

import pytest
from click.testing import CliRunner

from autosp_aot.commands.cli import main
from autosp_aot.errors import BuildError, Problem
from examples import plain

TINY = {"vocab_size": 8, "hidden_size": 8, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 512}
REPLICAS = ("--sp", "2", "--seq", "4", "--dp", "3")
KINDS = {"parameters", "gradients", "optimizer", "kept", "working", "communication"}


def call(*args, model=plain.__file__):
    options = [f"--set={name}={value}" for name, value in TINY.items()] if model is plain.__file__ else []
    asked = [str(arg) for arg in ("plan", model, "--target", "cpu", "--jobs", 1, *options, *args)]
    return CliRunner().invoke(main, asked, catch_exceptions=False)


@functools.cache
def points(*args):
    """The rows of a call; of the same call they are made once."""
    return json.loads(call(*args, "--json").stdout)


def test_there_is_a_row_for_every_number_of_ranks_and_length():
    found = points("--sp", "1,3", "--seq", "13,26")
    assert [(row["sp"], row["seq"]) for row in found] == [(1, 13), (1, 26), (3, 13), (3, 26)]
    assert all(row["max_seq"] is None for row in found)


def test_the_breakdown_adds_up_to_the_peak():
    for row in points("--sp", "1,3", "--seq", "13,26"):
        assert row["breakdown_bytes"].keys() == KINDS
        assert sum(row["breakdown_bytes"].values()) == row["peak_bytes"]


def test_the_peak_is_never_less_than_what_the_optimizer_s_step_finds():
    row, = points(*REPLICAS, "--zero", "0")  # fmt: skip
    kinds = row["breakdown_bytes"]
    assert row["peak_bytes"] >= 2 * kinds["parameters"] + kinds["optimizer"] > 0


def test_zero_1_shares_the_optimizer_over_dp_x_sp_ranks():
    whole, shared = (points(*REPLICAS, "--zero", zero)[0] for zero in "01")
    assert shared["breakdown_bytes"]["optimizer"] == -(-whole["breakdown_bytes"]["optimizer"] // 6)


def test_an_optimizer_on_the_host_is_counted_there():
    device, host = (points(*REPLICAS, *where)[0] for where in (("--zero", "1"), ("--optimizer", "host")))
    assert host["breakdown_bytes"]["optimizer"] == 0
    assert host["host_bytes"] == device["breakdown_bytes"]["optimizer"]
    assert host["peak_bytes"] == device["peak_bytes"] - host["host_bytes"]


def test_what_fits_is_what_leaves_the_reserve():
    room = points("--sp", "2", "--seq", "13", "--recompute", "sac")[0]["peak_bytes"]
    asked = ("--sp", "2", "--seq", "13", "--recompute", "sac", "--reserve", "1KiB", "--memory")
    assert points(*asked, room + 1024)[0]["fits"]
    assert not points(*asked, room + 1023)[0]["fits"]
    assert points(*asked[:-2], "0MiB", "--memory", room)[0]["fits"]


def test_a_point_that_cannot_be_made_to_fit_is_a_row_with_what_it_would_need():
    small, large = points("--sp", "1", "--seq", "26,256", "--memory", "100KiB", "--reserve", "1KiB")
    assert small["fits"] and not large["fits"]
    assert large["peak_bytes"] > 99 * 1024


def test_max_seq_is_the_longest_that_fits_and_a_row_of_its_own():
    asked = ("--sp", "3", "--memory", "100KiB", "--reserve", "1KiB", "--recompute", "sac", "--seq")
    found = points(*asked, "264", "--max-seq")
    longest = found[0]["max_seq"]
    assert [row["seq"] for row in found] == sorted({264, longest})
    assert found[-1]["fits"] and found[-1]["max_seq"] == longest
    assert not points(*asked, longest + longest // 32)[0]["fits"]


FIFTY = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = torch.nn.Parameter(torch.zeros(50, 4))

    def forward(self, x):
        return (x + self.positions[:x.shape[1]]).square().mean()

build_model = Model

def example_batch(batch_size, seq_len):
    return {"x": torch.zeros(batch_size, seq_len, 4)}
"""


def test_a_length_that_the_model_refuses_does_not_fit(tmp_path):
    model = tmp_path / "model.py"
    model.write_text(FIFTY)
    assert json.loads(call("--sp", "2", "--seq", "32", "--max-seq", "--json", model=model).stdout)[0]["max_seq"] == 50
    assert call("--sp", "2", "--seq", "51", model=model).stderr.startswith("error[")


def test_the_table_has_the_setting_the_rows_and_the_longest():
    out = call("--sp", "2", "--seq", "13,500", "--memory", "1MiB", "--reserve", "1KiB", "--max-seq").stdout
    setting, table, longest = out.strip().split("\n\n")
    assert setting == "1.00 MiB a rank, 1.00 KiB of it reserved; dp 1, ZeRO 1, optimizer adamw, accumulate 1; " \
        "recompute auto, tile auto, offload off"  # fmt: skip
    head, *rows = table.splitlines()
    assert head.startswith("sp  seq") and head.endswith("s a step, unmeasured")
    assert [row.split()[:3] for row in rows[:2]] == [["2", "13", "yes"], ["2", "500", "yes"]]
    assert longest.startswith("sp 2: ") and longest.endswith("is the longest that fits")


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("--sp", "1", "--seq", "4")
    assert not list(tmp_path.iterdir())


def test_processes_change_nothing():
    asked = ("--sp", "1,3", "--seq", "13,26")
    assert points(*asked, "--jobs", "2") == points(*asked)


def test_a_refusal_crosses_to_another_process_whole():
    refused = BuildError(Problem("code", "what", "where"), Problem("other", "what"))
    crossed = pickle.loads(pickle.dumps(refused))
    assert (type(crossed), crossed.problems, str(crossed)) == (BuildError, refused.problems, str(refused))


@pytest.mark.parametrize("args, said", [
    (("--sp", "0", "--seq", "4"), "'0' is not a number of ranks"),
    (("--sp", "1,x", "--seq", "4"), "'x' is not a number of ranks"),
    (("--sp", "1", "--seq", "4,"), "'' is not a length like 4096, 128k or 1M"),
    (("--sp", "1", "--seq", "4", "--memory", "80G"), "'80G' is not a size like 70GiB, 80GB or 512MiB"),
    (("--sp", "1", "--seq", "4", "--memory", "2GiB"), "--reserve leaves nothing of --memory"),
    (("--sp", "1", "--seq", "4", "--tile", "some"), "'some' is not auto, off or a number of slices"),
    (("--sp", "1", "--seq", "4", "--target", "tpu"), "'tpu' is not one of"),
    (("--seq", "4"), "Missing option '--sp'"),
])  # fmt: skip
def test_nonsense_is_refused_before_anything_is_read(args, said, tmp_path):
    result = call(*args, model=tmp_path)
    assert result.exit_code == 2
    assert said in result.stderr
