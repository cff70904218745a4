"""Weights from a file or a folder: all that does not fit is said at once, and nothing is guessed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from autosp_aot.artifact.manifest import WEIGHTS
from autosp_aot.artifact.read import read_manifest
from autosp_aot.errors import ArtifactError
from autosp_aot.runtime.weights_in import read_weights


@pytest.fixture(scope="module")
def artifact(tiny2, tmp_path_factory):
    """Without stored weights."""
    return tiny2.save(tmp_path_factory.mktemp("artifact") / "a")


@pytest.fixture
def manifest(artifact):
    """One name is a second one of another parameter."""
    return replace(read_manifest(artifact), aliases={"head.tied": "head.weight"})


@pytest.fixture
def weights(manifest):
    torch.manual_seed(0)
    return {spec.name: torch.randn(spec.shape, dtype=torch.float64) for spec in manifest.parameters}


@pytest.fixture
def refusal(artifact, manifest):
    def refused(init_from) -> str:
        with pytest.raises(ArtifactError) as caught:
            read_weights(artifact, manifest, init_from)
        return str(caught.value)

    return refused


def assert_equal(found, weights):
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


# --- what is accepted ---------------------------------------------------------------------------------------------


def test_a_file_is_read(artifact, manifest, weights, tmp_path):
    save_file(weights, tmp_path / "any.safetensors")
    assert_equal(read_weights(artifact, manifest, tmp_path / "any.safetensors"), weights)


def test_stored_weights_are_read_where_nothing_else_is_given(manifest, weights, tmp_path):
    (tmp_path / "weights").mkdir()
    save_file(weights, tmp_path / WEIGHTS)
    assert_equal(read_weights(tmp_path, replace(manifest, files={WEIGHTS: ""}), None), weights)


def shards(weights, folder) -> list[str]:
    """The weights in two files."""
    names = list(weights)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, (names[:3], names[3:])):
        save_file({name: weights[name] for name in part}, folder / file)
    return files


def test_all_files_of_a_folder_are_read(artifact, manifest, weights, tmp_path):
    shards(weights, tmp_path)
    assert_equal(read_weights(artifact, manifest, tmp_path), weights)


def test_an_index_says_which_files_of_a_folder_are_read(artifact, manifest, weights, tmp_path):
    first, second = shards(weights, tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, second) | {"head.weight": first}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(read_weights(artifact, manifest, tmp_path), weights)


@pytest.mark.parametrize("names", [["head.tied"], ["head.weight", "head.tied"]])
def test_a_tied_weight_has_any_of_its_names(artifact, manifest, weights, tmp_path, names):
    rest = {name: tensor for name, tensor in weights.items() if name != "head.weight"}
    save_file(rest | {name: weights["head.weight"].clone() for name in names}, tmp_path / "w.safetensors")
    assert_equal(read_weights(artifact, manifest, tmp_path / "w.safetensors"), weights)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_said_at_once(refusal, weights, tmp_path):
    del weights["norm.bias"], weights["norm.weight"]
    weights["head.weight"] = torch.zeros(8, 9, dtype=torch.float64)
    weights["tokens.weight"] = weights["tokens.weight"].long()
    weights["lm_head.weight"] = weights["extra"] = torch.zeros(1)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, tmp_path / "w.safetensors")
    assert refusal(tmp_path / "w.safetensors") == (
        "error[weights-mismatch]: the weights are not this model's\n"
        f"  where  {tmp_path / 'w.safetensors'}\n"
        "  why    norm.weight is missing\n"
        "         norm.bias is missing\n"
        "         extra is not the model's\n"
        "         lm_head.weight is not the model's\n"
        "         head.weight is f64 [8, 9], the model's is f64 [8, 8]\n"
        "         tokens.weight is i64 [8, 8], the model's is f64 [8, 8]\n"
        "  fix    give weights saved from the model that was built"
    )


def test_two_values_of_a_tied_weight_are_refused(refusal, weights, tmp_path):
    save_file(weights | {"head.tied": weights["head.weight"] + 1}, tmp_path / "w.safetensors")
    assert " is there twice, with different values" in refusal(tmp_path)


def test_two_files_that_hold_different_values_of_a_name_are_refused(refusal, weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    save_file({"norm.bias": weights["norm.bias"] + 1}, tmp_path / "b.safetensors")
    assert "  why    norm.bias is there twice, with different values\n" in refusal(tmp_path)


def test_an_artifact_without_weights_asks_for_them(artifact, refusal):
    assert refusal(None) == (
        "error[no-weights]: the artifact has no stored weights\n"
        f"  where  {artifact}\n"
        "  why    it was built with --no-weights, or they are 1 GB or more\n"
        "  fix    give --init-from: a safetensors file or a folder of them"
    )


def test_a_folder_without_a_safetensors_file_is_refused(refusal, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    assert refusal(tmp_path) == (
        f"error[weights-unreadable]: {tmp_path} cannot be read\n"
        f"  where  {tmp_path}\n"
        "  why    it holds no safetensors file\n"
        "  fix    give a safetensors file, or a folder of them"
    )


def test_a_file_that_is_not_there_is_refused(refusal, tmp_path):
    missing = tmp_path / "w.safetensors"
    assert refusal(missing).startswith(f"error[weights-unreadable]: {missing} cannot be read\n")


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\xff" * 64])
def test_a_damaged_file_is_refused(refusal, tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    assert refusal(tmp_path).startswith("error[weights-unreadable]")


def test_a_truncated_file_is_refused(refusal, weights, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-1])
    assert refusal(tmp_path).startswith("error[weights-unreadable]")


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"norm.bias": 1}}', "[" * 100_000,
])  # fmt: skip
def test_a_damaged_index_is_refused(refusal, weights, tmp_path, content):
    save_file(weights, tmp_path / "w.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    assert refusal(tmp_path).startswith(f"error[weights-unreadable]: {index} cannot be read\n")


@pytest.mark.parametrize("place", ["../w.safetensors", "in/../../w.safetensors", "absolute"])
def test_an_index_that_leads_out_of_its_folder_is_refused(refusal, weights, tmp_path, place):
    save_file(weights, tmp_path / "w.safetensors")
    place = str(tmp_path / "w.safetensors") if place == "absolute" else place
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, place)}))
    assert refusal(index.parent) == (
        f"error[weights-unreadable]: {index} cannot be read\n"
        f"  where  {index}\n"
        f"  why    {place} would be outside of the folder\n"
        "  fix    give a safetensors file, or a folder of them"
    )


def test_a_file_of_the_index_that_is_not_there_is_refused(refusal, weights, tmp_path):
    first, _ = shards(weights, tmp_path)
    (tmp_path / first).unlink()
    index = {"weight_map": dict.fromkeys(weights, first)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(tmp_path).startswith(f"error[weights-unreadable]: {tmp_path / first} cannot be read\n")
