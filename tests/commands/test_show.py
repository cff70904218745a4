"""What people are shown of an artifact."""

import json
import re
from dataclasses import replace

import pytest

from autosp_aot.artifact.manifest import Fallback
from autosp_aot.artifact.read import read_manifest
from autosp_aot.artifact.tables import facts
from autosp_aot.commands.show import show, show_json
from autosp_aot.errors import ArtifactError
from autosp_aot.ir.text import parse_program
from autosp_aot.ir.units import bytes_text


@pytest.fixture
def saved(tiny2, tmp_path):
    return tiny2.save(tmp_path / "a")


TOKENS = "grad.tokens.embedding_dense_backward.all_reduce"


def test_show_says_what_was_built_and_what_it_costs(saved, tiny2):
    costs, evaluation = tiny2.manifest.step.costs, tiny2.manifest.evaluation.costs
    facts = show(saved, 0).split("\n\n")[0]
    assert dict(re.split("  +", line, maxsplit=1) for line in facts.splitlines()) | {"recompute": ""} == {
        "ranks": "2",
        "target": "cpu",
        "inputs": "input_ids i64[2, 5], labels i64[2, 5]",
        "parameters": "17, 7.88 KiB on every rank",
        "recompute": "",
        "tiles": "auto",
        "offload": "off",
        "saved for backward": bytes_text(costs.kept_bytes),
        "peak of activations and gradients": f"{bytes_text(costs.peak_bytes)} at sum_gradients: {TOKENS}",
        "peak of an evaluation": f"{bytes_text(evaluation.peak_bytes)} at {evaluation.peak_at}",
        "computed on every rank": "nothing",
        "compared with eager": "nothing: it was not asked for",
    }


def test_show_says_what_waits_in_host_memory(tiny2):
    manifest = tiny2.manifest
    step = replace(manifest.step, costs=replace(manifest.step.costs, host_bytes=1024, host_moved_bytes=3072))
    config = replace(manifest.config, offload="host")
    said = dict(facts(replace(manifest, config=config, programs=manifest.programs | {"step": step})))["offload"]
    assert said == "host, 1.00 KiB of host memory, 3.00 KiB there and back"


def test_show_has_a_table_of_what_moves(saved):
    # q, k, v and the output: [2, 1, 3, 4] of f64 to the rank that has 2 of 5 positions, or [2, 1, 2, 4] to the other
    table = [re.split("  +", line) for line in show(saved, 0).split("\n\n")[1].splitlines()]
    assert table == [
        ["section", "collective", "count", "received by the worst rank"],
        ["forward", "all_to_all", "4", "768 B"],
        ["forward", "all_reduce", "1", "8 B"],
        ["backward", "all_to_all", "2", "384 B"],
        ["backward", "reduce_scatter", "2", "384 B"],
        ["sum_gradients", "all_reduce", "1", "7.88 KiB"],
        ["evaluate", "all_to_all", "4", "768 B"],
        ["evaluate", "all_reduce", "1", "8 B"],
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_show_ends_with_the_program_of_the_rank_its_numbers_filled_in(tiny2, saved, rank):
    text = show(saved, rank).split("\n\n")[2]
    assert "$" not in text
    assert parse_program(text, {}) == tiny2.program.for_rank(rank)


def test_a_rank_that_is_not_there_is_refused(saved):
    with pytest.raises(ArtifactError) as caught:
        show(saved, 2)
    assert str(caught.value) == (
        "error[no-such-rank]: there is no rank 2\n"
        f"  where  {saved}\n"
        "  why    the artifact has ranks 0 to 1\n"
        "  fix    give another --rank"
    )


def test_json_has_manifest_collectives_and_program(saved):
    found = json.loads(json.dumps(show_json(saved, 1)))
    assert found["rank"] == 1
    assert found["manifest"]["programs"]["step"]["costs"]["moved"][0] == {
        "section": "forward", "op": "all_to_all", "count": 4, "received_bytes": 768
    }  # fmt: skip
    first = found["collectives"][0]
    assert (first["op"], first["value"]) == ("all_to_all", "blocks.0.permute.all_to_all")
    assert first["send_sizes"] == [16, 16] and first["receive_sizes"] == [24, 16]
    assert found["program"].startswith("autosp program 1\nranks 2\n")


def test_an_operator_that_every_rank_computes_is_named_with_its_line_and_cost(tiny2, saved):
    fallback = Fallback("aten.sort.default", "model.py:3", 2048)
    step = replace(tiny2.manifest.step, fallbacks=(fallback, fallback))
    manifest = replace(tiny2.manifest, programs=tiny2.manifest.programs | {"step": step})
    path = replace(tiny2, manifest=manifest).save(saved)
    assert read_manifest(path).step.fallbacks == (fallback, fallback)
    assert re.search("computed on every rank +aten.sort.default\n", show(path, 0))
    assert re.search("\naten.sort.default +model.py:3 +2.00 KiB\n", show(path, 0))
