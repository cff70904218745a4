"""What is read is an artifact as it was built, and nothing else is believed."""

import contextlib
import copy
import functools
import json
import operator
import os
from dataclasses import asdict, replace
from math import inf

import pytest

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.manifest import BUFFERS, EVALUATE, MANIFEST, STEP, file_of, sealed
from autosp_aot.artifact.read import read_bodies, read_manifest, read_rank, read_recipe, read_tensors, read_whole
from autosp_aot.artifact.tables import facts
from autosp_aot.commands.check.proof import read_back
from autosp_aot.errors import ArtifactError
from autosp_aot.targets.devices import DEVICES
from tests.sealing import FILES, edit_ranks, edit_text, reseal


def refusal(path, code: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_manifest(path)
    assert [problem.code for problem in caught.value.problems] == [code]
    return str(caught.value)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_refused(saved, name):
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(bytes(data))
    text = refusal(saved, "manifest-damaged" if name == MANIFEST else "file-changed")
    assert str(saved / name) in text


@pytest.mark.parametrize("at", [0, 10, -2])
def test_a_byte_of_the_manifests_frame_is_refused_too(saved, at):
    data = bytearray((saved / MANIFEST).read_bytes())
    data[at] ^= 1
    (saved / MANIFEST).write_bytes(bytes(data))
    refusal(saved, "manifest-damaged")


def test_a_changed_file_is_said_with_what_to_do(saved):
    edited = saved / "whole.program"
    edited.write_text(edited.read_text()[:-100])
    assert refusal(saved, "file-changed") == (
        f"error[file-changed]: {edited} is not what was built\n"
        "  why    its hash is not the manifest's\n"
        "  fix    build the artifact again"
    )


def test_what_was_put_in_place_of_a_file_that_was_hashed_is_not_read(saved):
    manifest = read_manifest(saved)
    for name in ("whole.program", "body.0.program", "buffers.safetensors", "ranks.json", "checkpoint.json"):
        before = (saved / name).read_bytes()
        (saved / name).write_bytes(before + b" ")
        with pytest.raises(ArtifactError) as caught:
            read_whole(saved, manifest)
            read_rank(saved, manifest, 0)
            read_tensors(saved, manifest, BUFFERS)
            read_recipe(saved, manifest)
        assert str(caught.value).startswith(f"error[file-changed]: {saved / name} ")
        (saved / name).write_bytes(before)


def test_an_extra_file_is_refused(saved):
    (saved / "notes.txt").write_text("")
    assert refusal(saved, "artifact-files") == (
        f"error[artifact-files]: {saved} has missing or unexpected files: notes.txt\n"
        "  why    the manifest lists all files\n"
        "  fix    build the artifact again"
    )


@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
def test_a_missing_file_is_refused(saved, name):
    (saved / name).unlink()
    assert name in refusal(saved, "artifact-files")


@pytest.mark.parametrize("name", ["buffers.safetensors", "whole.program", "report.html"])
def test_a_file_that_no_manifest_may_leave_out_is_refused(saved, name):
    (saved / name).unlink()
    reseal(saved)
    assert name in refusal(saved, "artifact-files")


@pytest.mark.parametrize("target", [None, "/dev/zero"])
@pytest.mark.parametrize("name", ["whole.program", "weights/model.safetensors", MANIFEST])
def test_a_pipe_or_a_device_is_refused_at_once(saved, name, target):
    (saved / name).unlink()
    os.mkfifo(saved / name) if target is None else (saved / name).symlink_to(target)
    if name == MANIFEST:
        assert "it has no manifest.json" in refusal(saved, "artifact-missing")
    else:
        assert f"{saved / name} is no regular file\n" in refusal(saved, "artifact-files")


def test_a_link_to_a_regular_file_is_read_as_one(saved, tmp_path):
    (saved / "whole.program").rename(tmp_path / "elsewhere")
    (saved / "whole.program").symlink_to(tmp_path / "elsewhere")
    assert read_manifest(saved).ranks == 2


def test_a_folder_without_manifest_is_no_artifact(tmp_path):
    assert refusal(tmp_path, "artifact-missing") == (
        f"error[artifact-missing]: {tmp_path} is not an artifact\n"
        "  why    it has no manifest.json\n"
        "  fix    build one with autosp-aot build"
    )


# --- what is sealed and still not believed ---------------------------------------------------------------------------


@pytest.mark.parametrize("changes, why", [
    ({"format": "5"}, "format is no number, or the version that wrote it no text"),
    ({"config": asdict(BuildConfig(0))}, "ranks is not a positive number"),
    ({"config": asdict(BuildConfig(True))}, "manifest.config.ranks is true, not a whole number"),
    ({"config": asdict(BuildConfig(2, strict=5))}, "manifest.config.strict is 5, not true or false"),
    ({"config": asdict(BuildConfig(2, recompute=None))}, "manifest.config.recompute is null, not a text"),
    ({"config": asdict(BuildConfig(2, recompute="auto", memory_budget_bytes=-1))},
     "the memory budget is not a positive number"),
    ({"config": asdict(BuildConfig(2, evaluation=False))}, "its programs are not those that were to be built"),
    ({"config": asdict(BuildConfig(2, device=DEVICES["h100"]))},
     "the device is not one of the target, with a memory and rates"),
    ({"config": asdict(BuildConfig(2, device=replace(DEVICES["cpu"], flops_per_s=inf)))},
     "the device is not one of the target, with a memory and rates"),
    ({"config": asdict(BuildConfig(2, device=replace(DEVICES["cpu"], flops_per_s="fast")))},
     'manifest.config.device.flops_per_s is "fast", not a number'),
    ({"batch": [{"name": "x", "dtype": "complex", "shape": [1], "vocabulary": None}]}, "x has no valid type"),
    ({"batch": [{"name": "x", "dtype": "f32", "shape": [-1], "vocabulary": None}]}, "x has no valid type"),
    ({"batch": [{"name": "x", "dtype": "f32", "shape": [1, 2.0], "vocabulary": None}]},
     "manifest.batch[0].shape[1] is 2.0, not a whole number"),
    ({"aliases": {"head.weight": "norm.weight"}}, "an alias is the name of another parameter"),
    ({"sequence_dims": {"nobody": 1}}, "a sequence dim is no dim of the input"),
    ({"files": None}, "manifest.files is null, not an object"),
])  # fmt: skip
def test_a_manifest_of_another_kind_is_refused(saved, changes, why):
    reseal(saved, **changes)
    assert refusal(saved, "manifest-damaged") == (
        f"error[manifest-damaged]: {saved / MANIFEST} cannot be trusted\n"
        f"  why    {why}\n"
        "  fix    build the artifact again"
    )


def test_a_key_that_no_manifest_has_is_refused(saved):
    reseal(saved, surprise=1)
    assert 'is {"' in (text := refusal(saved, "manifest-damaged")) and "not an object of format, versions" in text


PLACES = ((), ("batch", 0), ("config",), ("programs", "step"), ("programs", "step", "costs"),
          ("programs", "step", "costs", "moved", 0))  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("wrong", [None, True, "x", [[]]], ids=str)
def test_no_field_of_another_type_is_a_traceback(saved, place, wrong):
    """Each field in turn; what is still a manifest is read, shown and checked, or refused."""
    whole = json.loads((saved / MANIFEST).read_text())["manifest"]
    for name in list(functools.reduce(operator.getitem, place, whole)):
        changed = copy.deepcopy(whole)
        functools.reduce(operator.getitem, place, changed)[name] = wrong
        (saved / MANIFEST).write_text(sealed(changed))
        for read in (lambda: facts(read_manifest(saved)), lambda: read_back(saved)):
            with contextlib.suppress(ArtifactError):
                read()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "code.py", "weights/../manifest.json"])
def test_a_manifest_names_no_file_but_an_artifacts(saved, name):
    (saved.parent / "outside").write_text("")
    reseal(saved)
    files = read_manifest(saved).files
    reseal(saved, files=files | {name: files["ranks.json"]})
    assert f"lists {name}" in refusal(saved, "artifact-files")


@pytest.mark.parametrize("body", ["../a/body.0.program", "body.1.program", "whole.program", "/etc/hostname", 7])
def test_a_rank_runs_a_body_of_its_artifact(saved, body):
    edit_ranks(saved, lambda ranks: ranks[1].update(body=body))
    assert "ranks.json cannot be read" in refusal(saved, "ranks-damaged")


@pytest.mark.parametrize("numbers", [[1, 1], [1, 1, 1]])
def test_a_number_outside_of_tiles_is_one_for_a_rank(saved, numbers):
    edit_ranks(saved, lambda ranks: ranks[1]["constants"].update(dict.fromkeys(ranks[1]["constants"], numbers)))
    for read in (lambda: read_rank(saved, read_manifest(saved), 1), lambda: read_bodies(saved, read_manifest(saved))):
        with pytest.raises(ArtifactError, match="has too few or too many numbers"):
            read()


@pytest.mark.parametrize("body", ["body.0.program", "evaluate.body.1.program", "evaluate.whole.program"])
def test_a_rank_evaluates_with_a_body_of_the_evaluation(saved, body):
    edit_ranks(saved, lambda ranks: ranks[1].update(body=body), EVALUATE)
    assert "evaluate.ranks.json cannot be read" in refusal(saved, "ranks-damaged")


def test_a_step_has_the_sections_of_a_step_and_an_evaluation_its_own(saved):
    step, evaluation = (saved / file_of(kind, "body.0.program") for kind in (STEP, EVALUATE))
    texts = step.read_text(), evaluation.read_text()
    tables = (saved / "ranks.json").read_text(), (saved / "evaluate.ranks.json").read_text()
    step.write_text(texts[1])
    evaluation.write_text(texts[0])
    (saved / "ranks.json").write_text(tables[1].replace("evaluate.body", "body"))
    (saved / "evaluate.ranks.json").write_text(tables[0].replace("body.0", "evaluate.body.0"))
    reseal(saved)
    for kind, sections in ((STEP, "forward, backward, sum_gradients"), (EVALUATE, "evaluate")):
        with pytest.raises(ArtifactError, match=f"it has {sections}\n"):
            read_rank(saved, read_manifest(saved), 0, kind)


def test_files_of_an_evaluation_that_the_manifest_denies_are_refused(saved):
    config = asdict(BuildConfig(2, evaluation=False))
    reseal(saved, config=config, programs={STEP: asdict(read_manifest(saved).step)})
    assert "lists evaluate.body.0.program, evaluate.ranks.json" in refusal(saved, "artifact-files")


@pytest.mark.parametrize("change, what", [
    (lambda ranks: ranks.pop(), "has 1 ranks"),
    (lambda ranks: ranks.append(ranks[0]), "has 3 ranks"),
    (lambda ranks: ranks[0].update(extra=1), "cannot be read"),
    (lambda ranks: ranks[0].update(constants={"$0": 0.5}), "cannot be read"),
    (lambda ranks: ranks.__setitem__(0, "body.0.program"), "cannot be read"),
])  # fmt: skip
def test_a_table_of_ranks_is_one_entry_a_rank(saved, change, what):
    edit_ranks(saved, change)
    assert what in refusal(saved, "ranks-damaged")


def test_ranks_of_one_body_name_the_same_constants(saved):
    edit_ranks(saved, lambda ranks: ranks[1]["constants"].update({"$9": 1}))
    with pytest.raises(ArtifactError, match="ranks-damaged"):
        read_bodies(saved, read_manifest(saved))


@pytest.mark.parametrize("old, new", [
    ("section backward", "section Backward("),
    ("ranks 2", "ranks two"),
    ("aten.embedding.default(", "aten.embedding.default(__import__, "),
    ("f64[", "f80["),
])  # fmt: skip
def test_a_text_that_the_printer_would_not_write_is_refused(saved, old, new):
    edit_text(saved, old, new)
    with pytest.raises(ArtifactError, match=r"error\[program-syntax\]: line \d+ of a program cannot be read"):
        read_rank(saved, read_manifest(saved), 0)


def test_a_truncated_program_is_refused_though_it_is_sealed(saved):
    body = saved / "body.0.program"
    body.write_text(body.read_text()[:2000])
    reseal(saved)
    with pytest.raises(ArtifactError, match="the text does not end with a line end"):
        read_rank(saved, read_manifest(saved), 0)


def test_a_body_that_is_no_text_is_refused(saved):
    (saved / "body.0.program").write_bytes(b"\xff\xfe")
    reseal(saved)
    with pytest.raises(ArtifactError, match="error.program-unreadable"):
        read_rank(saved, read_manifest(saved), 0)


def test_a_body_for_another_number_of_ranks_is_refused(saved, tiny):
    body = replace(tiny, buffers={}).save(saved.parent / "b") / "body.0.program"
    constants = "\n".join(line for line in body.read_text().splitlines() if line.startswith("constants"))
    names = constants.split(" ")[1:]
    (saved / "body.0.program").write_text(body.read_text())
    edit_ranks(saved, lambda ranks: [rank.update(constants=dict.fromkeys(names, 0)) for rank in ranks])
    with pytest.raises(ArtifactError, match="body.0.program is for 3 ranks"):
        read_rank(saved, read_manifest(saved), 0)
