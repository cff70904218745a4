"""What is written is what was built, whole or not at all."""

import stat
from dataclasses import replace

import pytest
import torch

from autosp_aot.artifact.manifest import MANIFEST
from autosp_aot.artifact.read import read_bodies, read_manifest, read_rank, read_recipe, read_tensors, read_whole
from autosp_aot.errors import AutospError, BuildError
from tests.sealing import FILES


def test_what_is_read_is_what_was_built(full, saved):
    manifest = read_manifest(saved)
    assert replace(manifest, files={}) == full.manifest
    assert tuple(sorted(manifest.files)) == tuple(name for name in FILES if name != MANIFEST)
    assert read_whole(saved, manifest) == full.whole
    assert [read_rank(saved, manifest, rank) for rank in (0, 1)] == [full.program.for_rank(rank) for rank in (0, 1)]
    assert read_recipe(saved, manifest) == full.recipe
    assert read_bodies(saved, manifest) == [((0, 1), full.program)]
    assert torch.equal(read_tensors(saved, manifest, "buffers.safetensors")["b"], full.buffers["b"])
    assert read_tensors(saved, manifest, "weights/model.safetensors").keys() == full.weights.keys()


def test_writing_twice_gives_the_same_files_that_all_can_read(full, saved, tmp_path):
    again = full.save(tmp_path / "again")
    for name in FILES:
        assert (again / name).read_bytes() == (saved / name).read_bytes()
        assert stat.S_IMODE((saved / name).stat().st_mode) == 0o644


def test_tensors_that_share_memory_are_stored_apart(full, tmp_path):
    flat = torch.arange(4)
    path = replace(full, buffers={"a": flat[:2], "b": flat[2:], "c": flat.view(2, 2).T}).save(tmp_path / "a")
    assert read_tensors(path, read_manifest(path), "buffers.safetensors")["c"].tolist() == [[0, 2], [1, 3]]


def test_an_artifact_is_replaced_with_all_its_files(full, saved):
    replace(full, weights=None).save(saved)
    assert not read_manifest(saved).has_weights
    assert [entry.name for entry in saved.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_artifact_is_not_replaced(full, tmp_path, kind):
    there = tmp_path / "there"
    if kind == "file":
        there.write_text("mine")
    else:
        there.mkdir()
    with pytest.raises(BuildError) as caught:
        full.save(there)
    assert str(caught.value) == (
        f"error[output-exists]: {there} exists and is not an artifact\n"
        f"  where  {there}\n"
        "  why    only an artifact is ever replaced\n"
        "  fix    give another folder with -o, or move it away"
    )
    assert list(tmp_path.iterdir()) == [there]


def test_a_write_that_fails_midway_leaves_what_was_there(full, saved):
    before = {name: (saved / name).read_bytes() for name in FILES}
    # Any failure will do, and this one needs no full disk: weights are written last, and a meta tensor has no values,
    # which torch says. It is no refusal of ours, since a build has no such weights.
    without_values = replace(full, weights={"x": torch.empty(2, device="meta")})
    with pytest.raises(NotImplementedError, match="no data"):
        without_values.save(saved)
    assert {name: (saved / name).read_bytes() for name in FILES} == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["a"]


def test_a_file_where_a_folder_should_be_is_said(full, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AutospError) as caught:
        full.save(tmp_path / "file" / "a")
    assert "error[output-unwritable]" in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
