import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from autosp_aot.commands.build.builder import build
from autosp_aot.commands.cli import main
from examples import plain

TINY = {"vocab_size": 8, "hidden_size": 4, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 8}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Artifacts of one model: `a` and `same` for 2 ranks, `other` without recomputation."""
    folder = tmp_path_factory.mktemp("artifacts")
    batch = plain.example_batch(1, 4)
    for name, recompute in (("a", "sac"), ("same", "sac"), ("other", "none")):
        torch.manual_seed(0)
        build(plain.build_model(**TINY), batch, 2, folder / name, target="cpu", recompute=recompute)
    return folder


def call(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def test_the_command_line_starts_without_torch():
    code = "import sys, autosp_aot.commands.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_build_prints_the_path_to_stdout_and_the_summary_to_stderr(tmp_path):
    out = tmp_path / "x.sp2"
    options = [f"--set={name}={value}" for name, value in TINY.items()]
    result = call("build", plain.__file__, "--sp", 2, "--seq", 4, "--target", "cpu", "-o", out, *options)
    assert result.exit_code == 0
    assert result.stdout == f"{out}\n"
    assert "input_ids i64[1, 4]" in result.stderr


def test_a_build_without_evaluation_says_so_and_show_prints_the_program_where_there_is_one(artifacts, tmp_path):
    out = tmp_path / "x.sp2"
    options = ["--no-evaluation", "--no-weights", *(f"--set={name}={value}" for name, value in TINY.items())]
    result = call("build", plain.__file__, "--sp", 2, "--seq", 4, "-o", out, *options)
    assert "not built (--no-evaluation)" in result.stderr
    assert call("show", out, "--evaluation").exit_code == 3
    text = call("show", artifacts / "a", "--evaluation", "--rank", 1).stdout
    found = json.loads(call("show", artifacts / "a", "--evaluation", "--rank", 1, "--json").stdout)
    assert text.endswith(found["program"] + "\n") and "\nsection evaluate" in found["program"]
    assert {collective["section"] for collective in found["collectives"]} == {"evaluate"}


def test_a_model_that_is_refused_is_exit_code_2_and_leaves_nothing(tmp_path):
    model, out = tmp_path / "model.py", tmp_path / "out"
    model.write_text("x = 1\n")
    result = call("build", model, "--sp", 2, "-o", out)
    assert result.exit_code == 2
    assert result.stdout == "" and result.stderr.startswith("error[")
    assert sorted(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("pair", ["heads", "=2", "a b=1"])
def test_set_takes_pairs_only(pair):
    result = call("build", plain.__file__, "--sp", 2, "--set", pair)
    assert result.exit_code == 2
    assert "is not key=value" in result.stderr


def test_set_reads_numbers_truths_and_text():
    pairs = ("a=1", "b=2.5", "c=true", "d=None", "e=float64", "f=[1, 2]")
    build_command = main.commands["build"]
    option = next(param for param in build_command.params if param.name == "options")
    assert option.callback(None, option, pairs) == {
        "a": 1, "b": 2.5, "c": True, "d": None, "e": "float64", "f": [1, 2]
    }  # fmt: skip


@pytest.mark.parametrize("command", ["run", "show", "check"])
def test_what_is_no_artifact_is_exit_code_3(command, tmp_path):
    result = call(command, tmp_path)
    assert result.exit_code == 3
    assert result.stdout == "" and "error[artifact-missing]" in result.stderr


def test_check_accepts_an_artifact_and_rejects_a_changed_byte(artifacts, tmp_path):
    assert call("check", artifacts / "a").exit_code == 0
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", artifacts / "a", copy], check=True)
    program = copy / "body.0.program"
    program.write_text(program.read_text().replace("forward", "Forward", 1))
    result = call("check", copy)
    assert result.exit_code == 3
    assert "error[file-changed]" in result.stderr


def test_diff_is_0_for_the_same_1_for_different_2_for_trouble(artifacts):
    assert call("diff", artifacts / "a", artifacts / "same").exit_code == 0
    assert call("diff", artifacts / "a", artifacts / "other").exit_code == 1
    assert call("diff", artifacts / "a", artifacts / "missing").exit_code == 2


@pytest.mark.parametrize("command", [("show", "a"), ("check", "a"), ("diff", "a", "other")])
def test_json_is_the_whole_of_stdout(command, artifacts):
    name, *paths = command
    json.loads(call(name, *(artifacts / path for path in paths), "--json").stdout)


def test_run_takes_data_or_a_batch_and_not_both(artifacts, tmp_path):
    file = tmp_path / "data"
    file.write_text("text")
    assert call("run", artifacts / "a", "--data", file, "--batch-file", file).exit_code == 2


@pytest.mark.parametrize("options, said", [
    (("--eval-every", 2), "go together"),
    (("--eval-data", __file__), "go together"),
    (("--lr", 0.1, "--schedule", "cosine", "--min-lr", 0.2), "above --lr"),
    (("--min-lr", 1e-4), "cosine or linear"),
    (("--save", "out", "--dump", "dump"), "stops before"),
    (("--data", __file__, "--batch-file", __file__), "exclude each other"),
])  # fmt: skip
def test_run_refuses_options_that_do_not_go_together(artifacts, options, said):
    result = call("run", artifacts / "a", *options)
    assert result.exit_code == 2 and said in result.stderr and result.stdout == ""
