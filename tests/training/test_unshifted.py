"""A model that does not shift its targets is not trained on tokens that are its inputs and its labels alike."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build
from autosp_aot.errors import ArtifactError
from autosp_aot.training import launch
from autosp_aot.training.loop import Training
from autosp_aot.training.unshifted import refuse_unshifted

V = 300
BATCH = {name: torch.zeros(2, 8, dtype=torch.int64) for name in ("input_ids", "labels")}


class Model(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.table, self.head, self.loss = nn.Embedding(V, 8), nn.Linear(8, V), loss

    def forward(self, input_ids, labels=None):
        return self.loss(self.head(self.table(input_ids)), input_ids if labels is None else labels)


def outside(logits, labels):
    return F.cross_entropy(logits.view(-1, V), labels.view(-1), ignore_index=-1)


def sliced(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def padded(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=-100)[:, 1:].flatten())


def two_ahead(logits, labels):
    return sliced(logits, labels) + F.cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten())


def gathered(logits, labels):
    return -logits.log_softmax(-1).gather(-1, labels[..., None]).mean()


def gathered_and_sliced(logits, labels):
    return gathered(logits[:, :-1], labels[:, 1:])


def one_hot(logits, labels):
    return -(logits.log_softmax(-1) * (labels[..., None] == torch.arange(V))).sum()


def smoothed(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.clamp(max=V - 1).flatten())


def saved(loss, path, batch=BATCH) -> Path:
    return build(Model(loss), batch, 1, target="cpu").save(path / "a")


@pytest.mark.parametrize("loss", [sliced, padded, two_ahead, gathered_and_sliced])
def test_labels_that_a_model_shifts_are_the_next_tokens(loss, tmp_path):
    path = saved(loss, tmp_path)
    refuse_unshifted(path, read_manifest(path))


@pytest.mark.parametrize(("loss", "code"), [
    (outside, "targets-not-shifted"), (gathered, "targets-not-shifted"),
    (one_hot, "targets-unknown"), (smoothed, "targets-unknown"),
])  # fmt: skip
def test_tokens_are_no_labels_of_other_models(loss, code, tmp_path):
    path = saved(loss, tmp_path)
    with pytest.raises(ArtifactError) as caught:
        refuse_unshifted(path, read_manifest(path))
    assert {problem.code for problem in caught.value.problems} == {code}


@pytest.mark.parametrize(("loss", "refused"), [(outside, True), (sliced, False), (one_hot, False)])
def test_tokens_may_be_all_that_a_model_takes(loss, refused, tmp_path):
    path = saved(loss, tmp_path, {"input_ids": BATCH["input_ids"]})
    if refused:
        with pytest.raises(ArtifactError, match="targets-not-shifted"):
            refuse_unshifted(path, read_manifest(path))
    else:
        refuse_unshifted(path, read_manifest(path))


def test_the_message_of_run_has_a_line_and_ways_out_that_work(tmp_path):
    (tmp_path / "text").write_text("to be or not to be " * 9)
    path = saved(outside, tmp_path)
    for data, eval_data in ((tmp_path / "text", None), (None, tmp_path / "text")):
        with pytest.raises(ArtifactError) as caught:
            launch.run(Training(path, 1), data, None, eval_data)
        assert str(caught.value) == (
            "error[targets-not-shifted]: the loss asks at a position for the very token of that position\n"
            f"  where  test_unshifted.py:{outside.__code__.co_firstlineno + 1}\n"
            "  why    data fills every input with the same tokens: a model that does not shift its targets learns to "
            "copy them\n"
            "  fix    shift in forward, as in cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()); or "
            "give inputs and targets with --batch-file"
        )
    launch.run(Training(saved(sliced, tmp_path / "b"), 1), tmp_path / "text", None)
