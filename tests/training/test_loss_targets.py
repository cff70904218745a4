"""A model that does not shift its targets is not trained on tokens that are its inputs and its labels alike."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build
from autosp_aot.errors import ArtifactError
from autosp_aot.training import launch
from autosp_aot.training.data import open_feed
from autosp_aot.training.loop import Training
from autosp_aot.training.loss_targets import shifted_inputs
from tests.architectures import ARCHITECTURES
from tests.steps import half_labelled

V = 300
BATCH = {name: torch.zeros(2, 8, dtype=torch.int64) for name in ("input_ids", "labels")}


class Model(nn.Module):
    def __init__(self, loss, mix=None):
        super().__init__()
        self.table, self.head, self.loss, self.mix = nn.Embedding(V, 8), nn.Linear(8, V), loss, mix

    def forward(self, input_ids, labels=None):
        x = self.table(input_ids)
        x = x if self.mix is None else self.mix(x)
        return self.loss(self.head(x), input_ids if labels is None else labels)


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


def ahead_alone(logits, labels):
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, 1:].flatten())


def in_chunks(logits, labels):
    y = F.pad(labels, (0, 1), value=-100)[:, 1:]
    parts = zip(logits.chunk(2, 1), y.chunk(2, 1))
    return sum(F.cross_entropy(x.flatten(0, 1), t.flatten(), reduction="sum") for x, t in parts)


def rolled(logits, labels):
    y = torch.full_like(labels, -100)
    y[:, :-1] = labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def sequence_first(logits, labels):
    return F.cross_entropy(logits.transpose(0, 1)[:-1].flatten(0, 1), labels.t()[1:].flatten())


def last_alone(logits, labels):
    return F.cross_entropy(logits[0, -2], labels[0, -1])


def saved(loss, path, batch=BATCH, mix=None) -> Path:
    return build(Model(loss, mix), batch, 1, target="cpu").save(path / "a")


def causal(x):
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]


def windowed(x):
    at = torch.arange(x.shape[1])
    mask = (at[None] <= at[:, None]) & (at[None] > at[:, None] - 3)
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]


def summed(x):
    return x.cumsum(1)


def convolved(x):
    return F.conv1d(F.pad(x.mT, (2, 0)), torch.ones(8, 1, 3), groups=8).mT


def looking_ahead(x):
    return F.conv1d(F.pad(x.mT, (1, 1)), torch.ones(8, 1, 3), groups=8).mT


def both_ways(x):
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def averaged(x):
    return x + x.mean(1, keepdim=True)


def hidden_by_numbers(x):
    at = torch.arange(x.shape[1])
    scores = (x @ x.mT).masked_fill(at[None] > at[:, None], -1e9)
    return scores.softmax(-1) @ x


def from_the_middle(x):
    return x.slice_scatter(x[:, 4:5], 1, 0, 1)


def of_one_row(x):
    rows = x.reshape(1, 1, -1, x.shape[2])
    return F.scaled_dot_product_attention(rows, rows, rows, is_causal=True).view_as(x)


@pytest.mark.parametrize(("loss", "mix"), [
    (in_chunks, None), (rolled, causal), (sequence_first, causal), (last_alone, causal), (sliced, hidden_by_numbers),
    (sliced, from_the_middle), (sliced, of_one_row),
])  # fmt: skip
def test_what_shifts_its_targets_itself_is_tried_where_it_cannot_be_read_off(loss, mix, tmp_path):
    path = saved(loss, tmp_path, mix=mix)
    assert shifted_inputs(path, read_manifest(path)) == frozenset()


@pytest.mark.parametrize("name", ["bloom", "gemma2", "mpt", "mistral", "mixtral", "mamba2"])
def test_stock_causal_models_shift_their_targets(name, tmp_path):
    batch = half_labelled(9)
    path = build(ARCHITECTURES[name].build(), batch, 1, target="cpu", eager_check=False).save(tmp_path / "a")
    assert shifted_inputs(path, read_manifest(path)) == frozenset()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_stock_models_that_see_later_tokens_are_refused(name, tmp_path):
    path = tmp_path / "a"
    build(ARCHITECTURES[name].build(), half_labelled(13), 2, path, target="cpu", eager_check=False, weights=False)
    with pytest.raises(ArtifactError) as caught:
        shifted_inputs(path, read_manifest(path))
    assert [problem.code for problem in caught.value.problems] == ["targets-not-causal"]


@pytest.mark.parametrize("mix", [None, causal, windowed, summed, convolved])
@pytest.mark.parametrize(("loss", "shifted"), [
    (sliced, set()), (padded, set()), (gathered_and_sliced, set()),
    (outside, {"labels"}), (gathered, {"labels"}), (ahead_alone, {"labels"}),
])  # fmt: skip
def test_a_causal_model_that_does_not_shift_is_given_the_next_tokens(loss, shifted, mix, tmp_path):
    path = saved(loss, tmp_path, mix=mix)
    assert shifted_inputs(path, read_manifest(path)) == shifted


def test_of_a_model_that_reads_one_token_ahead_the_one_after_it_is_asked_for(tmp_path):
    path = saved(sliced, tmp_path, mix=looking_ahead)
    assert shifted_inputs(path, read_manifest(path)) == {"labels"}


@pytest.mark.parametrize(("loss", "mix", "code"), [
    (outside, both_ways, "targets-not-causal"), (sliced, both_ways, "targets-not-causal"),
    (two_ahead, None, "targets-several"), (outside, looking_ahead, "targets-not-shifted"),
    (sliced, averaged, "targets-not-causal"), (outside, averaged, "targets-not-causal"),
    (outside, hidden_by_numbers, "targets-not-shifted"), (outside, from_the_middle, "targets-not-shifted"),
    (outside, of_one_row, "targets-not-shifted"), (one_hot, None, "targets-unknown"),
])  # fmt: skip
def test_other_models_are_refused_by_name(loss, mix, code, tmp_path):
    path = saved(loss, tmp_path, mix=mix)
    with pytest.raises(ArtifactError) as caught:
        shifted_inputs(path, read_manifest(path))
    assert {problem.code for problem in caught.value.problems} == {code}


@pytest.mark.parametrize(("loss", "refused"), [(outside, True), (sliced, False), (one_hot, False)])
def test_tokens_may_be_all_that_a_model_takes(loss, refused, tmp_path):
    path = saved(loss, tmp_path, {"input_ids": BATCH["input_ids"]})
    if refused:
        with pytest.raises(ArtifactError, match="targets-not-shifted"):
            shifted_inputs(path, read_manifest(path))
    else:
        assert shifted_inputs(path, read_manifest(path)) == frozenset()


def test_windows_of_targets_are_one_token_later(tmp_path, capsys):
    (tmp_path / "text").write_text("to be or not to be " * 9)
    path = saved(outside, tmp_path, mix=causal)
    inputs = read_manifest(path).batch
    batch = open_feed(inputs, 0, tmp_path / "text", None, shifted=frozenset({"labels"})).at(3)
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert bytes(batch["labels"][0].tolist()) in (tmp_path / "text").read_bytes()
    launch.run(Training(path, 1), tmp_path / "text", None)
    said = "labels: the next tokens, since the loss compares position with position\n"
    assert capsys.readouterr().out.startswith(said)


def test_the_message_of_run_has_a_line_and_ways_out(tmp_path):
    (tmp_path / "text").write_text("to be or not to be " * 9)
    path = saved(outside, tmp_path, mix=both_ways)
    for data, eval_data in ((tmp_path / "text", None), (None, tmp_path / "text")):
        with pytest.raises(ArtifactError) as caught:
            launch.run(Training(path, 1), data, None, eval_data)
        assert str(caught.value) == (
            "error[targets-not-causal]: the scores of a position follow from the tokens after it\n"
            f"  where  test_loss_targets.py:{outside.__code__.co_firstlineno + 1}\n"
            "  why    data fills every input with the same tokens, and with attention that is not causal "
            f"(test_loss_targets.py:{both_ways.__code__.co_firstlineno + 1}) the model reads what it is to name\n"
            "  fix    give inputs and targets with --batch-file"
        )


@pytest.mark.parametrize(("bad", "refused"), [(-100, True), (V, True), (-1, False), (V - 1, False)])
def test_targets_of_a_stored_batch_are_classes_or_ignored(tmp_path, bad, refused):
    path, file = saved(outside, tmp_path), tmp_path / "batch.safetensors"
    labels = torch.ones(2, 8, dtype=torch.int64)
    labels[1, 3] = bad
    save_file({"input_ids": BATCH["input_ids"], "labels": labels}, file)
    if not refused:
        launch.run(Training(path, 1), None, file)
        return
    with pytest.raises(ArtifactError) as caught:
        launch.run(Training(path, 1), None, file)
    assert str(caught.value) == (
        f"error[target-out-of-range]: 1 targets are no class, {bad} among them\n"
        f"  where  {file}\n"
        f"  why    the loss (test_loss_targets.py:{outside.__code__.co_firstlineno + 1}) has scores for 0 to 299 and "
        "passes over -1\n"
        "  fix    give targets among these, or build the model with the ignore_index of the file"
    )


def test_one_target_alone_is_checked_too(tmp_path):
    path, file = saved(last_alone, tmp_path, mix=causal), tmp_path / "batch.safetensors"
    save_file({"input_ids": BATCH["input_ids"], "labels": torch.full((2, 8), V)}, file)
    with pytest.raises(ArtifactError, match="target-out-of-range"):
        launch.run(Training(path, 1), None, file)
