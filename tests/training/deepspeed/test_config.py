"""DeepSpeed configs against an artifact, without DeepSpeed."""

import json

import pytest
import torch

import autosp_aot
from autosp_aot.errors import ArtifactError
from autosp_aot.training.deepspeed.config import check_samples, checked_config, read_config
from tests.training.deepspeed.replicas import config, micro_batches, model

GOOD = config(zero=1, accumulate=3, clip=1.0) | {"train_batch_size": 12}


@pytest.fixture(scope="module")
def manifests():
    """Of an artifact for 2 ranks with 2 rows a batch, by dtype; `mixed` has parameters of both."""
    mixed = model("bfloat16")
    mixed.model.norm.float()
    models = {"f32": model(), "bf16": model("bfloat16"), "f64": model("float64"), "mixed": mixed}
    built = lambda model: autosp_aot.build(model, micro_batches(1)[0], 2, target="cpu", eager_check=False)  # noqa: E731
    return {name: built(model).manifest for name, model in models.items()}


def refusal(manifest, **entries) -> str:
    said = {key: value for key, value in GOOD.items() if key != "bf16" or "bfloat16" not in entries}
    with pytest.raises(ArtifactError) as caught:
        checked_config(said | entries, manifest, replicas=2)
    return str(caught.value)


def test_what_people_have_is_taken_and_gradients_are_added_up_in_fp32(manifests):
    applied = checked_config(GOOD | {"sequence_parallel_size": 2, "data_parallel_size": 2}, manifests["f32"], 2)
    assert "compile" not in applied and "sequence_parallel_size" not in applied
    assert applied["communication_data_type"] == applied["seq_parallel_communication_data_type"] == "fp32"
    assert applied["optimizer"] == GOOD["optimizer"]


def test_a_communication_dtype_that_is_said_holds_for_ranks_that_share_sequences_too(manifests):
    applied = checked_config(GOOD | {"communication_data_type": "bf16"}, manifests["f32"], 2)
    assert applied["communication_data_type"] == applied["seq_parallel_communication_data_type"] == "bf16"


@pytest.mark.parametrize(
    "sizes, filled",
    [
        ({}, (4, 2, 1)),
        ({"gradient_accumulation_steps": 3}, (12, 2, 3)),
        ({"train_batch_size": 8}, (8, 2, 2)),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, (4, 2, 1)),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 3}, (12, 2, 3)),
    ],
)
def test_batch_sizes_that_are_not_said_follow_from_the_artifact(manifests, sizes, filled):
    applied = checked_config(sizes, manifests["f32"], 2)
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(applied[name] for name in names) == filled


def test_auto_of_a_dtype_is_the_artifacts(manifests):
    for name, on in (("f32", False), ("bf16", True)):
        applied = checked_config({"bf16": {"enabled": "auto"}}, manifests[name], 1)
        assert applied["bf16"]["enabled"] is on


@pytest.mark.parametrize(
    "entries, said",
    [
        ({"sequence_parallel_size": 4}, "sequence_parallel_size is 4, the artifact says 2"),
        ({"data_parallel_size": 4}, "data_parallel_size is 4, the artifact says 2"),
        ({"bf16": {"enabled": True}}, "bf16: enabled is true, the artifact says f32"),
        ({"fp16": {"enabled": True}}, "fp16: enabled is true, the artifact says f32"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu is 1, the artifact says 2"),
        ({"train_batch_size": 16}, "train_batch_size is 16, the artifact says 12"),
        ({"gradient_accumulation_steps": 0}, "train_batch_size is 12, the artifact says a product"),
        ({"scheduler": {"params": {"warmup_num_steps": "auto"}}}, 'scheduler: params: warmup_num_steps is "auto"'),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization: stage 3 would not be applied"),
        ({"zero_optimization": {"stage": "3"}}, "zero_optimization: stage 3 would not be applied"),
        ({"zero_optimization": True}, "zero_optimization is True\n"),
        ({"fp16": None, "compile": "auto"}, "compile is auto\n"),
        ({"bfloat16": {"enabled": True}}, "bf16: enabled is true, the artifact says f32"),
        ({"data_types": {"buffer_dtype": "bf16"}}, "data_types: buffer_dtype would not be applied"),
        ({"data_efficiency": {"data_routing": {"enabled": True}}}, "data_efficiency: data_routing would not be"),
        ({"weight_quantization": {"post_init_quant": {}}}, "weight_quantization would not be applied"),
        ({"compile": {"deepcompile": True}}, "compile: passes not given would not be applied"),
        ({"compile": {"deepcompile": True, "passes": ["autosp", "z1"]}}, "compile: passes ['autosp', 'z1'] would not"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel: autotp_size would not be applied"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast: enabled would not be applied"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "fp16: loss_scale would not be applied"),
        ({"compression_training": {"weight_quantization": {}}}, "compression_training would not be applied"),
    ],
)
def test_what_disagrees_or_would_not_be_applied_is_refused(manifests, entries, said):
    assert said in refusal(manifests["f32"], **entries)


def test_a_part_of_a_batch_at_the_end_of_an_epoch_is_refused(manifests):
    applied = checked_config(GOOD, manifests["f32"], 2)
    check_samples(8, applied, 2)
    check_samples(9, applied | {"dataloader_drop_last": True}, 2)
    with pytest.raises(ArtifactError, match="would have 1 rows, the artifact says 2"):
        check_samples(9, applied, 2)


@pytest.mark.parametrize("dtype, said", [("bf16", "bf16"), ("f64", "f64"), ("mixed", "bf16 and f32")])
def test_parameters_that_are_not_fp32_are_not_taken_for_it(manifests, dtype, said):
    assert f"bf16, fp16: enabled is false, the artifact says {said}\n" in refusal(manifests[dtype])


def test_parameters_of_two_dtypes_would_be_cast(manifests):
    said = refusal(manifests["mixed"], bf16={"enabled": True})
    assert "bf16: enabled is true, the artifact says bf16 and f32\n" in said


def test_all_that_is_wrong_is_said_at_once(manifests):
    said = refusal(manifests["f32"], sequence_parallel_size=3, zero_optimization={"stage": 3}, train_batch_size=5)
    assert said.count("error[") == 3


def test_the_config_given_is_left_alone(manifests):
    given = json.loads(json.dumps(GOOD | {"bf16": {"enabled": "auto"}}))
    checked_config(given, manifests["f32"], 2)
    assert given == GOOD | {"bf16": {"enabled": "auto"}}


@pytest.mark.parametrize("text", ["", "[]", "{'a': 1}", '{"fp16": {"enabled": true, "enabled": false}}'])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ArtifactError, match="error\\[deepspeed-config-unreadable\\]"):
        read_config(tmp_path / "ds.json")


def test_an_artifacts_rows_are_those_of_inputs_with_a_sequence():
    class Positions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.places = torch.nn.Embedding(8, 4), torch.nn.Embedding(8, 4)

        def forward(self, position_ids, input_ids):
            return (self.table(input_ids) * self.places(position_ids)).square().mean()

    batch = {"position_ids": torch.arange(6), "input_ids": torch.zeros(3, 6, dtype=torch.long)}
    built = autosp_aot.build(Positions(), batch, 2, sequence_dims={"position_ids": 0, "input_ids": 1}, target="cpu")
    assert checked_config({}, built.manifest, 1)["train_micro_batch_size_per_gpu"] == 3


def test_a_parameter_that_is_a_number_is_refused_by_name():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.scale = torch.nn.Embedding(8, 4), torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, input_ids):
            return (self.table(input_ids) * self.scale).square().mean()

    built = autosp_aot.build(Scaled(), {"input_ids": torch.zeros(1, 6, dtype=torch.long)}, 2, target="cpu")
    with pytest.raises(ArtifactError, match=r"error\[deepspeed-unsupported\]: scale of the artifact is of shape \[\]"):
        checked_config({}, built.manifest, 1)


def test_the_old_name_of_bf16_is_taken(manifests):
    assert checked_config({"bfloat16": {"enabled": True}}, manifests["bf16"], 1)["bf16"]["enabled"] is True
