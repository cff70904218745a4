"""`report.html` and the page of a plan: whole, self-contained, and adding up."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.html.chart import COLUMNS, areas
from autosp_aot.artifact.html.memory_tables import at_peak, by_layer, by_section
from autosp_aot.artifact.html.page import artifact_page
from autosp_aot.artifact.manifest import Fallback
from autosp_aot.commands.build.builder import compile_model
from autosp_aot.commands.plan.planning import Point, Setting
from autosp_aot.commands.plan.report import plan_page
from autosp_aot.memory.timeline import MEMORY_KINDS, breakdown, timeline
from autosp_aot.memory.training_state import training_state
from autosp_aot.targets.devices import DEVICES
from examples import llama


class Page(HTMLParser):
    """Tags with attributes, the text, and whether tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = set(), [], [], []
        self.feed(text)
        assert not self.open
        assert self.tags <= {
            "html", "head", "body", "meta", "title", "style", "h1", "h2", "p", "span", "div", "table", "tr", "td", "th",
            "svg", "desc", "path", "line", "polyline", "circle", "text",
        }  # fmt: skip
        assert not any(name.startswith("on") or name in ("href", "src", "style") for name, _ in self.attributes)
        assert not re.search(r"https?:|//|url\(|@import", text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def layers3():
    """A llama of three layers for two ranks."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    model = llama.build_model(num_hidden_layers=3, **sizes)
    return compile_model(model, llama.example_batch(1, 13), {"input_ids": 1, "labels": 1}, BuildConfig(2), "")


def test_the_page_of_an_artifact_has_its_facts_and_loads_nothing(tiny2, tmp_path):
    page = Page((tiny2.save(tmp_path / "a") / "report.html").read_text())
    assert "768 B" in page.text and "all_to_all" in page.text
    assert {"Memory over the step", "Live at the peak", "Bytes a layer", "What moves"} <= set(page.text)
    assert {"svg", "title", "desc"} <= page.tags and ("role", "img") in page.attributes


def test_the_same_build_gives_the_same_page(tiny2, tmp_path):
    pages = [(tiny2.save(tmp_path / name) / "report.html").read_text() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_markup_in_names_is_shown_as_text(tiny2):
    hostile = "<script>alert('&')</script>"
    fallback = Fallback(hostile, f'"{hostile}', 1)
    spec = replace(tiny2.manifest.batch[0], name=hostile)
    programs = {"step": replace(tiny2.manifest.step, fallbacks=(fallback,))}
    manifest = replace(tiny2.manifest, programs=programs, batch=(spec,), versions={hostile: hostile})
    assert f'"{hostile}' in Page(artifact_page(manifest, tiny2.program)).text


def test_the_levels_of_every_moment_are_its_peak_and_the_batch(layers3):
    found = timeline(layers3.program, "cpu")
    batch = 2 * 13 * 8 + 4  # input_ids, labels, and the gradient of the loss
    assert [sum(level.values()) for level in found.levels] == [moment.peak_bytes + batch for moment in found.moments]


def test_the_breakdown_is_that_of_the_peak(layers3):
    state = training_state(layers3.whole, "adamw", zero=1, ranks=2)
    found = breakdown(layers3.program, state, "cpu")
    assert found["optimizer"] == state.optimizer and found["parameters"] == state.parameters
    peak = sum(found[kind] for kind in MEMORY_KINDS)
    assert peak == layers3.manifest.step.costs.peak_bytes + 2 * 13 * 8 + 4


def test_kept_is_what_backward_begins_with_and_gradients_what_is_left_of_it(layers3):
    found = timeline(layers3.program, "cpu")
    last = max(at for at, moment in enumerate(found.moments) if moment.section == "forward")
    assert found.levels[last]["kept"] == layers3.manifest.step.costs.kept_bytes
    gradients = sum(value.nbytes for value in layers3.weights.values()) if layers3.weights else 0
    state = training_state(layers3.whole, "none", zero=0, ranks=2)
    assert found.levels[-1]["gradients"] >= max(gradients, state.gradients)


def test_equal_layers_are_one_row(layers3):
    rows = by_layer(layers3.program, timeline(layers3.program, "cpu"))
    names = [row[0] for row in rows]
    assert "model.layers 0-1 (x2)" in names or "model.layers 0-2 (x3)" in names
    assert {"model.embed_tokens", "lm_head", "model.norm"} <= set(names)


def test_values_at_the_peak_are_named_with_their_line_alike_ones_together(layers3):
    rows = at_peak(layers3.program, timeline(layers3.program, "cpu"))
    assert rows[0] == ("value", "kind", "bytes", "made at")
    assert all(re.fullmatch(r"\S+\.py:\d+", row[3]) for row in rows[1:] if "more" not in row[0])
    assert any("*" in row[0] and row[0].endswith("(x3)") for row in rows)


def test_every_section_has_a_row_with_its_worst_moment(layers3):
    found = timeline(layers3.program, "cpu")
    rows = by_section(found, parameters=0)
    assert [row[0] for row in rows[1:]] == ["forward", "backward", "sum_gradients"]


def test_a_long_curve_is_thinned_and_keeps_its_peak():
    levels = [{"kept": 10}] * 100_000
    levels[54_321] = {"kept": 1000}
    chart = areas("title", "said", levels, ["kept"], {"forward": 0})
    assert chart.count("V") <= COLUMNS + 2
    assert len(re.findall(r"V26\.0H", chart)) == 1  # one column reaches the top


def test_the_page_of_a_plan_has_a_line_for_each_number_of_ranks():
    kinds = dict.fromkeys(("parameters", "optimizer", *MEMORY_KINDS), 1)
    point = Point(1, 4096, 7, "backward: x", kinds, 3, 0, 0, 0, 10, 1, 0.5, True)
    points = [replace(point, sp=sp, seq=seq, peak_bytes=seq // sp) for sp in (1, 2) for seq in (4096, 8192)]
    text = plan_page(points, Setting(DEVICES["h100"], 80 * 2**30, 3 * 2**30))
    page = Page(text)
    assert text.count("<polyline") == 2 and text.count("<circle") == 4
    assert {"sp 1", "sp 2", "4k", "8k"} <= set(page.text)
