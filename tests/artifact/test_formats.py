"""An artifact of each format is read, or refused with the version that reads it."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from autosp_aot import __version__
from autosp_aot.artifact.checkpoint_layout import Piece, Place, Recipe, Stored
from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.manifest import FORMAT, READ_BY, Fallback, Manifest, ProgramFacts, TensorSpec
from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.check.numeric import check_numeric
from autosp_aot.commands.check.proof import read_back
from autosp_aot.errors import ArtifactError
from autosp_aot.memory.costs import Costs, Moved
from autosp_aot.targets.devices import Device
from tests.sealing import reseal

REFERENCES = {int(path.name[1:]): path for path in Path(__file__).with_name("formats").glob("v[0-9]*")}
DOCS = Path(__file__).resolve().parents[2] / "docs"


def refusal(path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_manifest(path)
    return str(caught.value)


def test_the_present_format_has_a_reference_artifact():
    assert FORMAT in REFERENCES, "ci/reference_artifact writes it"


@pytest.mark.parametrize("number", [number for number in REFERENCES if number == FORMAT])
def test_a_reference_artifact_is_read_proved_and_run(number):
    read_back(REFERENCES[number])
    assert len(check_numeric(REFERENCES[number])) == 4


@pytest.mark.parametrize("number", [number for number in REFERENCES if number != FORMAT])
def test_a_reference_artifact_of_another_format_is_refused_with_who_reads_it(number):
    reader = READ_BY.get(number)
    why = f"autosp-aot {reader} reads format {number}" if reader else f"no released version reads format {number}"
    assert f"  why    {why}\n" in refusal(REFERENCES[number])


def test_a_format_that_was_never_released_is_said_to_be_read_by_nobody(saved):
    reseal(saved, format=1)
    assert refusal(saved) == (
        f"error[artifact-format]: {saved} has format 1, and autosp-aot {__version__} reads format {FORMAT}\n"
        "  why    no released version reads format 1\n"
        "  fix    build the artifact again"
    )


def test_a_later_format_is_read_by_the_version_that_wrote_it(saved):
    reseal(saved, format=99, versions={"autosp-aot": "7.1.0"}, surprise=1)
    assert refusal(saved) == (
        f"error[artifact-format]: {saved} has format 99, and autosp-aot {__version__} reads format {FORMAT}\n"
        "  why    autosp-aot 7.1.0 reads format 99\n"
        "  fix    use autosp-aot 7.1.0, or build the artifact again"
    )


RECORDS = (
    BuildConfig, Device, Manifest, ProgramFacts, TensorSpec, Costs, Moved, Fallback, Recipe, Stored, Piece, Place,
)  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_every_field_is_in_the_docs(record):
    cells = re.findall(r"^\| (`[^|]+) \|", (DOCS / "format.md").read_text(), re.MULTILINE)
    documented = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert {field.name for field in fields(record)} <= documented


def test_the_history_begins_with_the_present_format():
    history = (DOCS / "format.md").read_text().partition("## History")[2]
    assert re.findall(r"^\| (\d+) \|", history, re.MULTILINE) == [str(n) for n in range(FORMAT, 0, -1)]
