"""An artifact is proved before it runs, once, and whoever knows its digest can demand it."""

import json
from dataclasses import replace

import pytest
import torch

import autosp_aot
from autosp_aot.artifact.manifest import MANIFEST
from autosp_aot.commands.check.proof import check
from autosp_aot.errors import ArtifactError
from autosp_aot.runtime import proved
from autosp_aot.runtime.comm import Group
from autosp_aot.runtime.proved import digest_of
from tests.sealing import edit_text, reseal

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user of whom nothing is known."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def saved(tiny2, tmp_path):
    """`tiny2` on disk with weights; nobody has proved it."""
    weights = {spec.name: torch.ones(spec.shape, dtype=torch.float64) for spec in tiny2.manifest.parameters}
    return replace(tiny2, weights=weights).save(tmp_path / "a")


@pytest.fixture
def proofs(monkeypatch):
    """The artifacts that were proved."""
    found, real = [], proved.prove_artifact
    monkeypatch.setattr(proved, "prove_artifact", lambda path, manifest: (found.append(path), real(path, manifest)))
    return found


def load(path, **given):
    return autosp_aot.load(path, comm=Group(0, 2, CPU), **given)


def refusal(path, **given) -> str:
    with pytest.raises(ArtifactError) as caught:
        load(path, **given)
    return str(caught.value)


def without_a_parameter(path) -> None:
    trainable = json.loads((path / MANIFEST).read_text())["manifest"]["trainable"]
    reseal(path, trainable=trainable[1:])


EDITS = {
    "a factor": (lambda path: edit_text(path, "scale=0.5", "scale=0.25"), "placement-wrong"),
    "causal attention made full": (lambda path: edit_text(path, "causal=True", "causal=False"), "placement-wrong"),
    "a parameter that is not trained": (without_a_parameter, "manifest-wrong"),
    "a rank that does not meet": (lambda path: edit_text(path, " = all_to_all(", " = all_gather("), "placement-wrong"),
}


@pytest.mark.parametrize("edit, code", EDITS.values(), ids=EDITS)
def test_what_was_edited_and_sealed_anew_does_not_run(saved, edit, code):
    edit(saved)
    for _ in range(2):
        assert refusal(saved).startswith(f"error[{code}]: ")


def test_an_artifact_is_proved_once_and_wherever_it_lies(saved, proofs, tmp_path):
    load(saved)
    load(saved.rename(tmp_path / "b"))
    assert proofs == [saved]
    assert digest_of(tmp_path / "b") not in {path.name for path in (tmp_path / "b").rglob("*")}


def test_who_built_or_checked_it_has_proved_it(saved, proofs):
    check(saved)
    load(saved)
    assert proofs == []


def test_another_artifact_another_version_and_another_torch_are_proved_anew(saved, proofs, monkeypatch):
    load(saved)
    reseal(saved, source="another")
    load(saved)
    monkeypatch.setattr(proved, "_source", lambda: "another")
    load(saved)
    monkeypatch.setattr(torch, "__version__", f"{torch.__version__}.later")
    load(saved)
    assert len(proofs) == 4


def test_without_a_place_for_verdicts_it_is_proved_each_time(saved, proofs, home):
    home.write_text("no folder")
    load(saved)
    load(saved)
    assert len(proofs) == 2


def test_of_a_cache_that_may_not_be_read_nothing_is_known(saved, proofs, home):
    load(saved)
    unreadable = home / ".cache" / "autosp-aot" / "proved"
    for verdict in unreadable.iterdir():
        verdict.unlink()
    unreadable.rmdir()
    unreadable.symlink_to(unreadable)  # a loop: neither there nor not
    load(saved)
    assert len(proofs) == 2


def test_a_digest_is_demanded(saved):
    digest = digest_of(saved)
    load(saved, digest=digest.upper())
    assert refusal(saved, digest="0" * 64) == (
        f"error[artifact-digest]: {saved} is another artifact than was demanded\n"
        f"  why    its digest is {digest}\n"
        "  fix    autosp-aot check DIR --digest prints the digest of the artifact you mean"
    )


def test_the_digest_is_another_for_other_weights_and_for_edits_made_alike(saved, tmp_path):
    digest = digest_of(saved)
    for name in ("whole.program", "body.0.program"):
        text = (saved / name).read_text()
        (saved / name).write_text(text.replace("scale=0.5", "scale=0.25"))
    reseal(saved)
    load(saved)  # it follows from its own unsharded program
    assert digest_of(saved) != digest
