import itertools
import string

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autosp_aot.artifact.manifest import TensorSpec
from autosp_aot.errors import ArtifactError
from autosp_aot.training.data import open_feed

INPUTS = (TensorSpec("input_ids", "i64", (3, 4), 256), TensorSpec("labels", "i64", (3, 4)))


def codes(error) -> list[str]:
    return [problem.code for problem in error.value.problems]


def test_every_token_input_is_the_same_windows_of_the_text(tmp_path):
    text = string.printable.encode()
    (tmp_path / "text").write_bytes(text)
    batch = open_feed(INPUTS, 0, tmp_path / "text", None).at(5)
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert all(bytes(row.tolist()) in text for row in batch["input_ids"])


def test_batches_follow_from_seed_and_step_alone(tmp_path):
    (tmp_path / "text").write_text(string.ascii_letters * 4)
    feeds = [open_feed(INPUTS, seed, tmp_path / "text", None) for seed in (0, 0, 1)]
    first, again, other = [[feed.at(step)["input_ids"].tolist() for step in range(3)] for feed in feeds]
    assert first == again
    assert first != other
    assert all(a != b for a, b in itertools.combinations(first, 2))


def test_random_tokens_stay_within_the_vocabulary():
    inputs = (TensorSpec("ids", "i32", (2, 50), 3),)
    batch = open_feed(inputs, 0, None, None).at(0)
    assert batch["ids"].dtype == torch.int32
    assert set(batch["ids"].flatten().tolist()) == {0, 1, 2}


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    np.save(tmp_path / "ids.npy", np.full(10, 256))
    with pytest.raises(ArtifactError) as error:
        open_feed(INPUTS, 0, tmp_path / "ids.npy", None).at(0)
    assert str(error.value) == (
        "error[token-out-of-range]: token ids reach from 256 to 256\n"
        "  where  samples 0 to 2 of the data\n"
        "  why    the model has embeddings for 0 to 255\n"
        "  fix    give data made with this model's tokenizer, or build the model with a larger vocabulary"
    )


@pytest.mark.parametrize("token", [2**31, -1])
def test_a_token_that_its_input_cannot_hold_is_refused(token, tmp_path):
    np.save(tmp_path / "ids.npy", np.full(9, token))
    feed = open_feed((TensorSpec("input_ids", "i32", (3, 4)),), 0, tmp_path / "ids.npy", None)
    with pytest.raises(ArtifactError, match="the model has inputs for 0 to 2147483647"):
        feed.at(0)


def test_what_is_no_token_input_is_refused_all_at_once():
    others = (TensorSpec("weights", "f32", (3, 4)), TensorSpec("attention_mask", "i64", (3, 4)))
    with pytest.raises(ArtifactError) as error:
        open_feed((*INPUTS, *others), 0, None, None)
    assert codes(error) == ["no-tokens-for-input"] * 2


def test_random_tokens_need_a_vocabulary():
    with pytest.raises(ArtifactError) as error:
        open_feed(INPUTS[1:], 0, None, None)
    assert codes(error) == ["vocabulary-unknown"]


def test_a_stored_batch_is_every_step(tmp_path):
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "labels": torch.full((3, 4), -100)}
    save_file(batch, tmp_path / "batch.safetensors")
    found = open_feed(INPUTS, 0, None, tmp_path / "batch.safetensors").at(7)
    assert all(torch.equal(found[name], tensor) for name, tensor in batch.items())


def test_a_sample_follows_from_its_number_whatever_the_batch():
    one, three = (open_feed((TensorSpec("ids", "i64", (rows, 4), 9),), 0, None, None) for rows in (1, 3))
    for number in range(2):
        apart = torch.cat([one.at(3 * number + row)["ids"] for row in range(3)])
        assert torch.equal(three.at(number)["ids"], apart)


def test_a_stored_step_is_cut_into_its_micro_batches(tmp_path):
    """What is as long as one micro-batch is the same for all."""
    inputs = (*INPUTS, TensorSpec("position_ids", "i64", (1, 4)), TensorSpec("scale", "f32", ()))
    ids, scale = torch.arange(24).view(6, 4), torch.tensor(0.5)
    positions = torch.arange(4).view(1, 4)
    step = {"input_ids": ids, "labels": ids, "position_ids": positions, "scale": scale}
    save_file({name: tensor.clone() for name, tensor in step.items()}, tmp_path / "batch")
    feed = open_feed(inputs, 0, None, tmp_path / "batch", 2)
    for number in range(4):
        batch, rows = feed.at(number), ids[3 * (number % 2) :][:3]
        assert torch.equal(batch["input_ids"], rows) and torch.equal(batch["labels"], rows)
        assert torch.equal(batch["position_ids"], positions) and torch.equal(batch["scale"], scale)


def test_a_stored_step_has_all_rows_of_inputs_of_one_shape(tmp_path):
    ids = torch.zeros(6, 4, dtype=torch.long)
    save_file({"input_ids": ids, "labels": ids[:3].clone()}, tmp_path / "batch")
    with pytest.raises(ArtifactError) as error:
        open_feed(INPUTS, 0, None, tmp_path / "batch", 2)
    (problem,) = error.value.problems
    assert problem.what == "labels: the file holds int64 [3, 4]"
    assert problem.why == "the program was built for int64 [6, 4]"


def test_a_stored_batch_is_checked_by_name_shape_and_dtype(tmp_path):
    save_file({"input_ids": torch.ones(3, 5, dtype=torch.int32), "mask": torch.ones(1)}, tmp_path / "batch.safetensors")
    with pytest.raises(ArtifactError) as error:
        open_feed(INPUTS, 0, None, tmp_path / "batch.safetensors")
    assert [problem.what for problem in error.value.problems] == [
        "input_ids: the file holds int32 [3, 5]",
        "labels: the file holds nothing of that name",
        "mask: the file holds float32 [1]",
    ]


def test_ids_beyond_the_vocabulary_of_a_stored_batch_are_refused(tmp_path):
    path = tmp_path / "batch.safetensors"
    save_file({"input_ids": torch.full((3, 4), 256), "labels": torch.full((3, 4), -100)}, path)
    with pytest.raises(ArtifactError, match="token-out-of-range") as caught:
        open_feed(INPUTS, 0, None, path)
    assert "the model has embeddings for 0 to 255" in str(caught.value)


def test_a_batch_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "batch").write_text("nonsense")
    with pytest.raises(ArtifactError) as error:
        open_feed(INPUTS, 0, None, tmp_path / "batch")
    assert codes(error) == ["batch-unreadable"]
