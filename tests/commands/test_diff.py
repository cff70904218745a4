"""The difference of two artifacts: what changed in meaning first, then the text."""

import json
from dataclasses import asdict, replace

import pytest

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import compile_model
from autosp_aot.commands.diff import compare
from examples import plain
from tests.conftest import TINY
from tests.edits import edit, named
from tests.sealing import edit_ranks, reseal


@pytest.fixture
def saved(tiny2, tmp_path):
    return tiny2.save(tmp_path / "a")


@pytest.fixture(scope="module")
def deep():
    """Artifacts of 3 layers: with recomputation and without."""
    model = plain.build_model(**{**TINY, "layers": 3}, dtype="float64")
    dims = {"input_ids": 1, "labels": 1}
    return [
        compile_model(model, plain.example_batch(2, 5), dims, BuildConfig(2, recompute=recompute), "")
        for recompute in ("sac", "none")
    ]


def test_an_artifact_is_the_same_as_its_rebuild(tiny2, saved, tmp_path):
    found = compare(saved, tiny2.save(tmp_path / "b"))
    assert (found.same, found.meaning, found.text) == (True, (), "the same")


def test_a_changed_option_is_said_in_the_order_of_weight(deep, tmp_path):
    paths = [artifact.save(tmp_path / name) for artifact, name in zip(deep, "ab")]
    found = compare(*paths)
    assert not found.same
    heads = [line.split(":")[0].split(" ")[0] for line in found.meaning]
    order = ["recompute", "values", "recomputed_flops", "kept_bytes", "flops", "operator", "files"]
    assert [head for head in dict.fromkeys(heads) if head != "peak_bytes"] == order
    assert found.meaning[0] == "recompute: sac -> none"
    assert found.meaning[-1] == "files that differ: body.0.program, report.html"
    assert found.text.startswith("\n".join(found.meaning) + "\n\n--- a/body.0.program\n+++ b/body.0.program\n@@")


def test_hunks_of_equal_layers_are_shown_once(deep, tmp_path):
    paths = [artifact.save(tmp_path / name) for artifact, name in zip(deep, "ab")]
    text = compare(*paths).text
    assert "more that differ from it in numbers only" in text
    assert text.count("-  free(%blocks.1.norm_attention.native_layer_norm_0)") <= 1


def test_a_dropped_collective_is_said_before_its_text(tiny2, saved, tmp_path):
    drop = edit(tiny2.program, named("all_reduce", "div"), lambda i: [replace(i, op="all_gather")])
    found = compare(saved, replace(tiny2, program=drop).save(tmp_path / "b"))
    assert found.meaning == (
        "collective all_reduce of f64 in forward: 1 -> 0",
        "collective all_gather of f64 in forward: 0 -> 1",
        "files that differ: body.0.program, report.html",
    )
    changed = [line for line in found.text.splitlines() if line.startswith(("-  ", "+  "))]
    assert [line.partition(" = ")[2].partition("(")[0] for line in changed] == ["all_reduce", "all_gather"]


def test_a_change_on_one_rank_names_it(tiny2, saved, tmp_path):
    drop = edit(tiny2.program, named("all_reduce", "div"), lambda i: [replace(i, op="all_gather")])
    other, changed = tiny2.save(tmp_path / "b"), replace(tiny2, program=drop).save(tmp_path / "c")
    (other / "body.1.program").write_text((changed / "body.0.program").read_text())
    edit_ranks(other, lambda ranks: ranks[1].update(body="body.1.program"))
    assert compare(saved, other).meaning[0] == "collective all_reduce of f64 in forward: 1 -> 0 on rank 1"


def test_a_changed_constant_is_shown_with_its_rank(tiny2, saved, tmp_path):
    other = tiny2.save(tmp_path / "b")
    edit_ranks(other, lambda ranks: ranks[1]["constants"].update({"$0": 7}))
    found = compare(saved, other)
    assert found.meaning == ("files that differ: ranks.json",)
    assert "--- a/ranks.json" in found.text


def test_a_change_of_the_evaluation_is_said(tiny2, saved, tmp_path):
    drop = edit(tiny2.evaluation.program, named("all_reduce", "div"), lambda i: [replace(i, op="all_gather")])
    other = replace(tiny2, evaluation=replace(tiny2.evaluation, program=drop)).save(tmp_path / "b")
    evaluation = read_manifest(other).evaluation
    cheaper = replace(evaluation, costs=replace(evaluation.costs, peak_bytes=1))
    reseal(other, programs={"step": asdict(read_manifest(other).step), "evaluate": asdict(cheaper)})
    found = compare(saved, other)
    assert found.meaning == (
        "collective all_reduce of f64 in evaluate: 1 -> 0",
        "collective all_gather of f64 in evaluate: 0 -> 1",
        f"evaluate.peak_bytes: {evaluation.costs.peak_bytes} -> 1 (-100.0%)",
        "files that differ: evaluate.body.0.program",
    )
    assert "--- a/evaluate.body.0.program" in found.text


def test_an_evaluation_that_is_gone_is_said(tiny2, saved, tmp_path):
    config = replace(tiny2.manifest.config, evaluation=False)
    manifest = replace(tiny2.manifest, config=config, programs={"step": tiny2.manifest.step})
    other = replace(tiny2, manifest=manifest, evaluation=None).save(tmp_path / "b")
    assert compare(saved, other).meaning == (
        "evaluation: True -> False",
        "files that differ: evaluate.body.0.program, evaluate.ranks.json, evaluate.whole.program, report.html",
    )


def test_another_version_of_torch_is_said_first(tiny2, saved, tmp_path):
    other = tiny2.save(tmp_path / "b")
    versions = read_manifest(other).versions | {"torch": "2.99.0"}
    reseal(other, versions=versions, config=asdict(BuildConfig(2, recompute="none")))
    now = read_manifest(saved).versions["torch"]
    assert compare(saved, other).meaning == (f"made by another torch: {now} -> 2.99.0", "recompute: sac -> none")


def test_another_source_is_a_difference_though_the_programs_are_equal(tiny2, saved, tmp_path):
    other = tiny2.save(tmp_path / "b")
    reseal(other, source="0" * 64)
    assert compare(saved, other).meaning == ("built from another model file, or with other options",)


def test_other_ranks_are_said(tiny, tiny2, tmp_path):
    found = compare(tiny2.save(tmp_path / "a"), tiny.save(tmp_path / "b"))
    assert found.meaning[0] == "ranks: 2 -> 3"
    assert any(line.startswith("bytes received by all_to_all in forward: ") for line in found.meaning)


def test_parameters_of_equal_layers_are_said_once(tiny2, deep, tmp_path):
    meaning = compare(tiny2.save(tmp_path / "a"), deep[0].save(tmp_path / "b")).meaning
    assert "parameters blocks.*.norm_mlp.weight: None -> f64[8] (x2)" in meaning
    assert "now trained: blocks.*.norm_mlp.weight (x2)" in meaning


def test_an_operator_computed_on_every_rank_is_said(tiny2, saved, tmp_path):
    other = tiny2.save(tmp_path / "b")
    programs = asdict(read_manifest(other))["programs"]
    programs["step"]["fallbacks"] = [{"op": "aten.sort.default", "source": "model.py:3", "gathered_bytes": 5}]
    reseal(other, programs=programs)
    assert compare(saved, other).meaning == ("computed on every rank: aten.sort.default (model.py:3) 0 -> 1",)


def test_json_has_the_same_facts(deep, tmp_path):
    found = compare(*(artifact.save(tmp_path / name) for artifact, name in zip(deep, "ab")))
    assert json.loads(json.dumps(found.as_json)) == {
        "same": False, "meaning": list(found.meaning), "text": found.text
    }  # fmt: skip
