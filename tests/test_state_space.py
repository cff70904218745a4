"""State spaces, linear attention and convolutions along the sequence, in the stock models that have them."""

import pytest
import torch
import transformers as hf

from tests.steps import equal_to_eager, half_labelled

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, use_cache=False, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)  # fmt: skip
MIXED = SMALL | dict(num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                     max_position_embeddings=128)  # fmt: skip
HEADS = dict(num_heads=8, head_dim=8, state_size=16, n_groups=2, chunk_size=8)
MAMBA = dict(mamba_d_state=16, chunk_size=8, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=2)
MODELS = {
    "bamba": lambda: hf.BambaForCausalLM(hf.BambaConfig(
        **MIXED, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=2,
        mamba_chunk_size=8)),
    "falcon_mamba": lambda: hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**SMALL, state_size=4)),
    "jamba": lambda: hf.JambaForCausalLM(hf.JambaConfig(
        **MIXED, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=4, mamba_dt_rank=4)),
    "lfm2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**MIXED, layer_types=["conv", "full_attention"])),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**SMALL, state_size=4)),
    "mamba2": lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(**SMALL, **HEADS)),
    "mamba2, one group": lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(**SMALL, **HEADS | {"n_groups": 1})),
    "qwen3_next": lambda: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(
        **MIXED, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, mlp_only_layers=[0, 1])),
    "rwkv": lambda: hf.RwkvForCausalLM(hf.RwkvConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=48,
        context_length=128, use_cache=False)),
    "zamba2": lambda: hf.Zamba2ForCausalLM(hf.Zamba2Config(
        **MIXED | MAMBA, layers_block_type=["mamba", "hybrid"], hybrid_layer_ids=[1], num_mem_blocks=1,
        adapter_rank=4)),
}  # fmt: skip


def model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double().train()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_loss_and_gradients_equal_eager_s(name):
    compiled = equal_to_eager(model(name), half_labelled(13), 3, 1e-6)
    assert not compiled.fallbacks


@pytest.mark.parametrize("length, ranks", [(33, 2), (33, 4), (33, 8), (64, 3), (64, 4), (64, 8)])
def test_chunks_that_do_not_fit_the_ranks_are_exact(length, ranks):
    assert not equal_to_eager(model("mamba2"), half_labelled(length), ranks, 1e-6).fallbacks
