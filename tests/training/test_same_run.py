"""Two agents of torchrun that were not started alike: both say what differs, by name, and end with our exit code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import autosp_aot
from autosp_aot.artifact.manifest import WEIGHTS
from autosp_aot.training.loop import Training
from autosp_aot.training.same_run import BLOCK_BYTES, _of_files, facts_of
from examples import plain
from tests.processes import run_agents

SIZES = {"vocab_size": 256, "hidden_size": 8, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two artifacts that have other weights, files of tokens and batches that differ in order."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        model = plain.build_model(**SIZES, dtype="float32")
        autosp_aot.build(model, plain.example_batch(2, 16), 2, folder / name, target="cpu", weights=True)
    tokens = np.arange(4000) % 256
    np.save(folder / "one.npy", tokens)
    np.save(folder / "two.npy", tokens[::-1].copy())
    rows = torch.arange(64).view(4, 16)
    for name, order in (("rows", rows), ("back", rows.flip(0))):
        save_file({"input_ids": order.contiguous(), "labels": order.clone()}, folder / f"{name}.safetensors")
    return folder


def told(*lines: tuple) -> str:
    """What both agents said, which is the same, and that rank 0's process ended with 3 on its node."""
    texts = set()
    for done in run_agents(*lines):
        assert done.returncode and "exitcode  : 3 " in done.stderr and "SIGABRT" not in done.stderr
        first = done.stderr.index("error[")
        texts.add(done.stderr[first : done.stderr.index("\n  fix", first)])
    (text,) = texts
    return text


@pytest.mark.parametrize("first, second, name", [
    (("a",), ("b",), "artifact"),
    (("a", "--data", "one.npy"), ("a", "--data", "two.npy"), "--data or --batch-file"),
    (("a", "--accumulate", 2, "--batch-file", "rows.safetensors"),
     ("a", "--accumulate", 2, "--batch-file", "back.safetensors"), "--data or --batch-file"),
    (("a", "--lr", 0.5), ("a",), "--lr"),
])  # fmt: skip
def test_what_differs_is_named_on_both(folder, first, second, name):
    lines = [[folder / word if (folder / str(word)).exists() else word for word in line] for line in (first, second)]
    assert told(*lines).startswith(f"error[ranks-differ]: the ranks do not run the same: {name}\n  why    {name}: ")


def test_so_are_other_weights(folder, tmp_path):
    weights = load_file(folder / "a" / WEIGHTS)
    name = min(weights)
    save_file(weights | {name: weights[name] + 1e-3}, tmp_path / "changed.safetensors")
    given = ("--init-from", folder / "a" / WEIGHTS), ("--init-from", tmp_path / "changed.safetensors")
    assert told(*((folder / "a", *init) for init in given)) == (
        f"error[weights-differ]: the ranks begin with different weights: {name}\n"
        "  why    every rank has all weights, and changes them alike"
    )


@pytest.mark.parametrize(("option", "name", "said"), [
    ("--data", "nowhere", "  why    rank 1: error[no-such-file]: --data {path}: there is no such file\n"),
    ("--init-from", "one.npy", "  why    1 of 2 cannot load the artifact or its weights\n"),
])  # fmt: skip
def test_what_only_one_can_not_do_ends_both(folder, option, name, said):
    path = folder / name
    here, there = run_agents((folder / "a",), (folder / "a", option, path))
    text = "error[ranks-differ]: not all ranks can start\n" + said.format(path=path)
    assert text in here.stderr and "exitcode  : 3 " in here.stderr and "Traceback" not in here.stderr.partition(text)[0]
    assert "error[" in there.stderr and there.returncode


def test_places_of_one_s_own_may_differ(folder):
    same = facts_of(Training(folder / "a", digest="d"), [])
    assert facts_of(Training(folder / "b", digest="d", metrics=Path("m"), save=Path("s")), []) == same
    assert facts_of(Training(folder / "a", digest="d", seed=1), []) != same


def test_files_are_what_is_in_them_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("autosp_aot.training.same_run.WHOLE_BYTES", 4 * BLOCK_BYTES)
    paths = [tmp_path / name for name in "abc"]
    for path, byte in zip(paths, b"xyx"):
        path.write_bytes(bytes([byte]) * 5 * BLOCK_BYTES)
    a, b, c = ((path,) for path in paths)
    assert _of_files(a) == _of_files(c) != _of_files(b)
    assert _of_files((paths[0], paths[1])) != _of_files((paths[1], paths[0]))
