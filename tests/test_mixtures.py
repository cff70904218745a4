"""Mixtures of experts, stock, against eager; each rank routes its own tokens."""

import pytest
import torch
import transformers as hf

import autosp_aot
from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import compile_model
from autosp_aot.commands.check.numeric import check_numeric
from autosp_aot.commands.check.proof import check
from autosp_aot.export.canonical.canonical import canonical_program
from autosp_aot.export.joint import capture
from autosp_aot.export.subject import Subject
from autosp_aot.ir.structure.table import meets
from autosp_aot.passes.pipeline import compile_program
from autosp_aot.passes.release import release
from autosp_aot.runtime.comm import Group
from tests.architectures import SMALL
from tests.eager import eager
from tests.steps import half_labelled, sharded, worst

EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
LOCAL = dict(num_local_experts=6, num_experts_per_tok=2)
LATENT = dict(
    kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=8,
    n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=0,
)  # fmt: skip
MODELS = {
    "deepseek_v3": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, LATENT | {"num_key_value_heads": 4}),
    "granitemoe": (hf.GraniteMoeForCausalLM, hf.GraniteMoeConfig, LOCAL),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, LOCAL),
    "olmoe": (hf.OlmoeForCausalLM, hf.OlmoeConfig, EXPERTS),
    "qwen2_moe": (hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig, EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, EXPERTS),
}
AUXILIARY = ("granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def built(name: str, **options):
    torch.manual_seed(0)
    model, config, own = MODELS[name]
    return model(config(**SMALL | own | options)).double().train()


def by_looping(model, batch):
    """Eager's loss and gradients, with a loop over the experts: the one implementation that takes fp64."""
    model.config._experts_implementation = "eager"
    return eager(model, batch)


@pytest.fixture
def batch():
    return half_labelled(13)


def test_loss_and_gradients_equal_eager_s(batch):
    """Of those with an auxiliary loss below; mixtral, gpt_oss and qwen3_moe are in `tests.architectures` besides."""
    model = built("deepseek_v3")
    compiled, results = sharded(model, batch, 3)
    assert not compiled.fallbacks
    assert worst(by_looping(model, batch), results) <= 1e-6


def test_the_auxiliary_loss_leaves_padding_out_as_eager_does(batch):
    model = built("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :4], mask[1, 11:] = 0, 0
    compiled, results = sharded(model, batch | {"attention_mask": mask}, 3)
    assert not compiled.fallbacks
    assert worst(by_looping(model, batch | {"attention_mask": mask}), results) <= 1e-6


@pytest.mark.parametrize("length", [2, 32])
def test_a_rank_without_tokens_and_as_many_tokens_as_channels(length, batch):
    """32 is also the hidden size: nothing is told apart by its size."""
    batch = {key: torch.randint(3, 64, (1, length)) for key in batch}
    model = built("mixtral")
    _, results = sharded(model, batch, 3)
    assert worst(by_looping(model, batch), results) <= 1e-6


@pytest.mark.parametrize("name", AUXILIARY)
def test_loss_with_the_router_s_and_gradients_equal_eager_s(name, batch):
    model = built(name, output_router_logits=True, router_aux_loss_coef=0.5)
    compiled, results = sharded(model, batch, 3)
    assert not compiled.fallbacks
    reference = by_looping(model, batch)
    assert worst(reference, results) <= 1e-6
    plain = built(name, output_router_logits=False)
    assert abs(by_looping(plain, batch)[0] - reference[0]) > 0.1


def test_experts_with_a_weight_copied_for_each_row_are_the_same_products(batch):
    model = built("mixtral")
    model.config._experts_implementation = "batched_mm"
    _, results = sharded(model, batch, 3)
    assert worst(by_looping(model, batch), results) <= 1e-6


def test_bf16_is_as_near_to_fp64_as_eager_bf16(batch):
    model, wide = built("mixtral").bfloat16(), built("mixtral")
    wide.load_state_dict(model.state_dict())
    _, results = sharded(model, batch, 3)
    reference, half = by_looping(wide, batch), by_looping(model, batch)
    own = worst(reference, [{"loss": half[0], **{f"grad.{n}": g for n, g in half[1].items()}}])
    assert 0 < worst(reference, results) <= 2 * own


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_no_collective_outside_of_attention_moves_a_hidden_state(name, auxiliary, batch):
    """Parameters' gradients are summed; of the tokens themselves nothing as wide as the model leaves its rank."""
    whole, _ = canonical_program(capture(Subject(built(name, output_router_logits=auxiliary), batch, "cpu")))
    program = compile_program(whole, dict.fromkeys(batch, 1), BuildConfig(3)).program
    moved = [instr for section in program.sections[:2] for instr in section.instrs if meets(instr.op)]
    outside = [instr for instr in moved if "self_attn" not in instr.where.module]
    assert not [instr for instr in outside if any(value.whole_shape[-1:] >= (32,) for value in instr.values())]
    assert len(outside) < len(moved)


def test_router_logits_that_wait_for_the_loss_do_not_keep_layers_together(batch):
    """As they are computed again, and before anything is put in another order, only one layer's experts are alive."""
    model, made = built("mixtral", output_router_logits=True, num_hidden_layers=3, hidden_size=64), {}
    compile_model(model, batch, {"input_ids": 1, "labels": 1}, BuildConfig(3), "", made.__setitem__)
    alive: set[str] = set()
    for instr in release(made["recompute"]).section("backward").instrs:
        if instr.op == "free":
            alive -= set(instr.refs())
        alive |= {out.name for out in instr.values() if out.name.startswith("recompute.")}
        assert len({name.split("layers.")[1].split(".")[0] for name in alive if "mlp.experts" in name}) <= 1


def test_an_artifact_of_a_mixture_is_proved_and_loaded(batch, tmp_path):
    path = tmp_path / "mixture"
    autosp_aot.build(built("mixtral", output_router_logits=True), batch, 3, path, target="cpu")
    assert check(path)[-1].startswith("operators ")
    assert [line.split()[0] for line in check_numeric(path)] == ["numbers", "evaluation"]
    module = autosp_aot.load(path, comm=Group(2, 3, torch.device("cpu")))
    assert "autosp.expert_mm_weight_grad" in {instr.op for instr in module.executor.program.instrs()}
