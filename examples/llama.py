"""A stock Hugging Face Llama, tiny by default: a byte vocabulary and two layers.

Every field of `LlamaConfig` can be set: `--set hidden_size=4096 --set num_hidden_layers=32 --set dtype=bfloat16`.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TINY = dict(
    vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=131072, use_cache=False,
)  # fmt: skip


def build_model(dtype: str = "float32", **fields) -> LlamaForCausalLM:
    unknown = sorted(set(fields) - set(LlamaConfig().to_dict()))
    if unknown:
        raise ValueError(f"LlamaConfig has no field {', '.join(unknown)}")
    config = LlamaConfig(**{**TINY, **fields})
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))  # .to would narrow rotary tables too


def example_batch(batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
    tokens = torch.zeros(batch_size, seq_len, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens}
