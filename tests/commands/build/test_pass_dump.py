"""`build --dump`: the program after each pass, also of a build that fails later."""

import json

import pytest

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import build_file
from autosp_aot.errors import AutospError
from autosp_aot.ir.text import parse_program
from autosp_aot.passes.pipeline import evaluation_pipeline, pipeline
from examples import plain
from tests.conftest import TINY

STEP = ["capture", *(one.name for one in pipeline(BuildConfig(2)))]
EVALUATION = [f"evaluate.{name}" for name in ("capture", *(one.name for one in evaluation_pipeline(BuildConfig(2))))]
NAMES = [*STEP, *EVALUATION]


def build(folder, model=plain.__file__, strict=False):
    out, dump = folder / "out", folder / "dump"
    build_file(model, BuildConfig(2, strict=strict), 5, 2, TINY, out, weights=False, dump=dump)
    return out, dump


def programs(dump) -> list[str]:
    return sorted(file.stem for file in dump.glob("*.program"))


def test_the_program_after_each_pass_is_there_and_the_last_is_the_artifact_s(tmp_path):
    out, dump = build(tmp_path)
    assert programs(dump) == [f"{at:02}-{name}" for at, name in enumerate(NAMES)]
    assert (dump / "01-query-rows.program").read_text() == (out / "whole.program").read_text()
    for at, body in ((len(STEP) - 1, "body.0.program"), (len(NAMES) - 1, "evaluate.body.0.program")):
        assert (dump / f"{at:02}-{NAMES[at]}.program").read_text() == (out / body).read_text()
    for file in dump.glob("*.program"):
        constants = file.with_suffix(".constants.json")
        table = json.loads(constants.read_text()) if constants.exists() else {}
        parse_program(file.read_text(), {name: tuple(numbers) for name, numbers in table.items()})


def test_the_artifact_has_the_same_bytes_without_a_dump(tmp_path):
    out, _ = build(tmp_path)
    again = build_file(plain.__file__, BuildConfig(2), 5, 2, TINY, tmp_path / "again", weights=False)
    assert (again / "manifest.json").read_bytes() == (out / "manifest.json").read_bytes()


MODEL = """
import torch
from examples.plain import example_batch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 4)

    def forward(self, input_ids, labels):
        return torch.cdist(self.embedding(input_ids), self.embedding(labels)).mean()

def build_model(**options):
    return Model()
"""


def test_what_was_done_before_a_pass_refused_is_there_and_no_artifact_is(tmp_path):
    model = tmp_path / "model.py"
    model.write_text(MODEL)
    with pytest.raises(AutospError, match="operator-without-rule"):
        build(tmp_path, model, strict=True)
    assert programs(tmp_path / "dump") == ["00-capture", "01-query-rows"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("place", "why"), [
    ("full", "it exists and is not an empty folder"),
    ("full/file", "it exists and is not an empty folder"),
    ("out/dump", "which holds nothing else"),
])  # fmt: skip
def test_a_folder_that_is_no_place_for_a_dump_is_refused_before_anything_is_done(tmp_path, place, why):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(AutospError) as caught:
        build_file(plain.__file__, BuildConfig(2), 5, 2, TINY, tmp_path / "out", dump=tmp_path / place)
    assert str(caught.value).startswith("error[dump-refused]") and why in str(caught.value)
    assert not (tmp_path / "out").exists()
